"""Compressed checkpoint -> the same one, its U, V and S trained to match the dense model block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint.output import check_output, output_path
from .checkpoint.source import open_checkpoint
from .compress import Progress, Result, run
from .compression.matching import Refinement
from .compression.plan import Job, prepare
from .errors import UsageError
from .text.request import Calibration


def refine(
    source: str | Path,
    output: Path | None = None,
    *,
    calibration: Calibration,
    resume: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Refine a compressed checkpoint into `output`; options as in `prepare_refinement`, errors as in `compress`.

    Ranks, supports and sizes stay; a layer or block is left as it is where training does not bring it closer.
    """
    job = prepare_refinement(source, output, calibration=calibration, overwrite=overwrite, **options)
    return run(job, resume=resume, overwrite=overwrite, progress=progress)


def prepare_refinement(
    source: str | Path,
    output: Path | None = None,
    *,
    calibration: Calibration,
    refinement: Refinement | None = None,
    against: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    cache_dir: Path | None = None,
    **options: Any,
) -> Job:
    """The job that refines the compressed checkpoint `source` (folder or Hub id).

    against: the dense model, None for the Hub model and commit that the report names (UsageError if it names none).
    `revision` is of `source`; other options go to `compression.plan.prepare`.
    """
    start = open_checkpoint(source, revision=revision, cache_dir=cache_dir)
    output = output_path(output or f"{start.name.rpartition('/')[2]}-refined")
    check_output(output, overwrite=True, source=start.folder)
    made_from = start.report().get("source", {})
    commit = made_from.get("commit")
    if against is None and commit is None:
        raise UsageError(f"{start.address} does not say where its dense model is. Give it with --against.")
    return prepare(
        against or made_from["name"],
        output,
        calibration=calibration,
        refinement=refinement or Refinement(),
        start=start,
        cache_dir=cache_dir,
        revision=None if against is not None else commit,
        **options,
    )
