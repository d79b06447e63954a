"""What a run leaves beside its weights: the report, how long it took; or what a part of it says of itself."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch

from ..checkpoint.config import fused_of
from ..checkpoint.finish import About, finish, versions
from ..checkpoint.journal import Unit
from ..checkpoint.part import PartFile, contents, write_part
from ..checkpoint.report import LayerReport, Report
from ..checkpoint.source import TIMING, Checkpoint
from ..checkpoint.workfolder import WorkFolder
from ..checkpoint.writer import ShardWriter, sha256, write_json
from ..errors import write_errors
from ..shim.layouts import LayerSpec
from ..text.sample import account
from ..text.windows import Sample
from .estimate import Estimate
from .fingerprint import fingerprint
from .plan import Job
from .schedule import Schedule, units_of


@dataclass(frozen=True)
class Took:
    """seconds of this run alone; peak_bytes: of the whole process, ever; predicted: for a calibrated run."""

    seconds: float
    peak_bytes: int
    predicted: Estimate | None


def source_hashes(source: Checkpoint, files: Collection[str], stop: Event) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of these of the model's weight files; of the first of them alone, once `stop` is set."""
    found = {}
    for file in source.files:
        if stop.is_set():
            break
        if file.path.name not in files:
            continue
        blob = file.path.resolve().name  # in the Hub's cache a file's target is named by its SHA-256
        known = blob if file.path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob) else sha256(file.path, stop)
        found[file.path.name] = {"size": file.path.stat().st_size, "sha256": known}
    return found


def hashed_here(job: Job) -> list[str]:
    """Weight files of the model whose hashes this job finds: all, or of a part those in which its units come first;
    of the first part those, too, from which nothing comes."""
    names = [file.path.name for file in job.source.files]
    if job.part is None:
        return names
    here = units_of(replace(job, part=None).scheduled(), job.part)
    first: dict[str, int] = {}
    for number, entry in enumerate(job.entries):
        first.setdefault(entry.path.name, number)
    return [name for name in names if first.get(name, 0) in here]


def about(job: Job, made: Schedule, windows: Sample | None, nats: float | None) -> About:
    """What the result of the whole run says of itself. nats: the text's, a token."""
    before = {} if job.start is None else job.start.report()
    trained = before.get("refinement") or {}
    return About(
        order=[p.layer.name for p in made.plan.layers],  # the model's, not the files'
        skipped=made.plan.skipped,
        model_bytes=job.source.nbytes,
        parameters=job.parameters,
        source={
            "name": job.source.name,
            "commit": job.source.commit,
            "architecture": (job.source.config.get("architectures") or [None])[0],
        },
        recipe=job.recipe.to_dict() if job.start is None else before.get("recipe", {}),
        versions=versions(),
        calibration=account(job.calibration, windows, nats) if job.calibration is not None else {},
        fused={tensor: asdict(one) for tensor, one in fused_of(job.source.entries.values()).items()},
        refinement=trained and trained | {"followed_by": "blocks"},
    )


def finish_whole(
    job: Job, made: Schedule, windows: Sample | None, work: WorkFolder, hashes: dict[str, Any], mark: str,
    nats: float | None,
) -> Report:  # fmt: skip
    """All that stands beside the weights of a whole run."""
    said, units = about(job, made, windows, nats), work.journal.units
    return finish(work.path, job.source.folder, job.source.config, said, units, hashes, mark, job.output.name)


def finish_part(job: Job, writer: ShardWriter, work: WorkFolder, hashes: dict[str, Any], mark: str) -> Report:
    """What stands beside the weights of a part; the report of its layers alone, which is written nowhere."""
    whole = replace(job, part=None)
    assert job.part is not None
    made = whole.scheduled()
    units = tuple(work.journal.units)
    with write_errors(work.path):
        part = PartFile(
            work.path,
            job.part.number,
            job.part.count,
            mark,
            fingerprint(whole),
            contents(job.source),
            units,
            writer.places,
            tuple((shard.file, shard.header, shard.slots.start, shard.slots.stop) for shard in made.shards),
            hashes,
            {file: (work.path / file).stat().st_size for file, _ in writer.places},
            vars(about(whole, made, None, None)) if job.part.number == 1 else None,
        )
        write_part(work.path, part, job.source)
    return report_of_part(job, units)


def report_of_part(job: Job, units: Sequence[Unit]) -> Report:
    """Of the layers among these units of a part."""
    entries = [entry for entry, _ in job.scheduled().units]
    lines = [unit.stats for unit in units if unit.stats is not None]
    return Report(
        layers=tuple(LayerReport.from_dict(line, LayerSpec.from_dict(line["spec"])) for line in lines),
        skipped={},
        model_bytes_before=sum(entry.nbytes for entry in entries),
        model_bytes_after=sum(unit.end - unit.begin for unit in units),
        parameters=sum(entry.elements for entry in entries),
        recipe=job.recipe.to_dict(),
    )


def write_timing(folder: Path, units: Iterable[Unit], took: Took, ranks: Sequence[tuple[float, int]] = ()) -> None:
    """losparse_timing.json, which alone differs between two equal runs. ranks: of several processes, seconds that each
    waited for others, and bytes of memory that it had resident."""
    content: dict[str, Any] = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "threads": torch.get_num_threads(),
        "run": {"seconds": took.seconds, "peak_memory_bytes": took.peak_bytes},
    }
    if took.predicted is not None:
        content["predicted"] = {"seconds": took.predicted.seconds, "peak_memory_bytes": took.predicted.peak_bytes}
    if len(ranks) > 1:
        waited, peaks = zip(*ranks, strict=True)
        content["ranks"] = {"waited_seconds": list(waited), "peak_memory_bytes": list(peaks)}
    content["seconds"] = {
        next(name for name, *_ in unit.tensors if name.endswith(".weight")): unit.seconds
        for unit in units
        if unit.stats is not None
    }
    with write_errors(folder):
        write_json(folder / TIMING, content)
