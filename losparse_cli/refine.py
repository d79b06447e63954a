"""Compressed checkpoint -> the same one, its U, V and S trained to match the dense model block by block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint.finish import read_report
from .checkpoint.output import output_path
from .checkpoint.source import open_checkpoint
from .compress import Result, run
from .compression.plan import Job, prepare
from .compression.request import Refinement, make_request
from .errors import UsageError
from .progress import Progress
from .text.request import Calibration


def refine(
    source: str | Path,
    output: str | Path | None = None,
    *,
    calibration: Calibration | Mapping[str, Any] | str | Path,
    refinement: Refinement | None = None,
    against: str | Path | None = None,
    device: str | None = None,
    memory_limit: str | None = None,
    max_shard_size: str | None = None,
    resume: str = "auto",
    overwrite: bool = False,
    revision: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Refine a compressed checkpoint into `output`; options as in `prepare_refinement`, errors as in `compress`.

    Ranks, supports and sizes stay; a layer or block is left as it is where training does not bring it closer.
    """
    job = prepare_refinement(
        source,
        output,
        calibration=calibration,
        refinement=refinement,
        against=against,
        device=device,
        memory_limit=memory_limit,
        max_shard_size=max_shard_size,
        revision=revision,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
    )
    return run(job, resume=resume, overwrite=overwrite, progress=progress)


def prepare_refinement(
    source: str | Path,
    output: str | Path | None = None,
    *,
    calibration: Calibration | Mapping[str, Any] | str | Path,
    refinement: Refinement | None = None,
    against: str | Path | None = None,
    device: str | None = None,
    memory_limit: str | None = None,
    max_shard_size: str | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
) -> Job:
    """The job that refines the compressed checkpoint `source` (folder or Hub id).

    calibration: or its source alone, or its fields. against: the dense model, None for the Hub model and commit that
    the report names. `revision` is of `source`; the other options are as in `compress`. UsageError if `source` is not
    compressed, or names no dense model.
    """
    start = open_checkpoint(source, revision=revision, cache_dir=cache_dir)
    if not start.is_compressed:
        raise UsageError(
            f"{start.address} is not compressed, so there is nothing to refine. Compress it first, with: losparse "
            f"compress {start.address} --calibration FILE --refine blocks"
        )
    report = read_report(start.folder)  # CheckpointError now if it is damaged, not halfway
    made_from = report.source if report is not None else {}
    commit = made_from.get("commit")
    if against is None and commit is None:
        raise UsageError(f"{start.address} does not say where its dense model is. Give it with --against.")
    return prepare(
        against or made_from["name"],
        output_path(output or f"{start.name.rpartition('/')[2]}-refined"),
        make_request(
            calibration=calibration,
            refinement=refinement or Refinement(),
            device=device,
            memory_limit=memory_limit,
            max_shard_size=max_shard_size,
        ),
        start=start,
        revision=None if against is not None else commit,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
    )
