"""Dense checkpoint -> U, V, S checkpoint, one layer in memory at a time."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import torch
from torch import Tensor

from .budget.recipe import Recipe
from .checkpoint.companions import copy_companions
from .checkpoint.config import write_config
from .checkpoint.fingerprint import digest
from .checkpoint.finish import close, finished, versions
from .checkpoint.journal import Journal, Unit
from .checkpoint.output import begin, check_output, check_resume, clear_away, publish
from .checkpoint.report import LayerReport, Report
from .checkpoint.source import TIMING, Checkpoint
from .checkpoint.writer import ShardWriter, sha256, tensor_part, write_json
from .compression.calibrated import CalibratedRun
from .compression.calibrated import Progress as BlockProgress
from .compression.decisions import Progress as DecisionProgress
from .compression.decisions import allocated, kept_text, own_text
from .compression.estimate import Estimate, estimate
from .compression.fingerprint import fingerprint
from .compression.plan import Job, prepare
from .compression.solve import encode, solve_layer
from .errors import OutputError, write_errors
from .models.device import peak_memory
from .shim.layouts import LayerSpec


class Progress(DecisionProgress, BlockProgress, Protocol):
    """What a caller may watch. Bytes are of the dense model."""

    def start(self, job: Job, layers_done: int, bytes_done: int) -> None: ...


@dataclass(frozen=True)
class Took:
    """seconds of this run alone; peak_bytes: of the whole process, ever; predicted: for a calibrated run."""

    seconds: float
    peak_bytes: int
    predicted: Estimate | None


@dataclass(frozen=True)
class Result:
    """output: the finished folder. took: time and memory. resumed: units found finished.

    needs_package: True if only a machine with losparse installed can load it (see `write_config`).
    """

    output: Path
    report: Report
    took: Took
    resumed: int
    needs_package: bool

    @property
    def seconds(self) -> float:
        return self.took.seconds


def compress(
    model: str | Path,
    output: Path | None = None,
    recipe: Recipe | None = None,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Compress a Hub id or folder into `output`; options as in `prepare`.

    The result appears at `output` whole or not at all. A killed run goes on where it was when called
    again; resume `required` insists on that, `never` discards what was done. Raises as `prepare`, and
    OutputError or ResumeError if the result cannot be written.
    """
    return run(prepare(model, output, recipe, **options), resume=resume, overwrite=overwrite, progress=progress)


def run(job: Job, *, resume: str = "auto", overwrite: bool = False, progress: Progress | None = None) -> Result:
    """Carry out a prepared job; see `compress`."""
    check_resume(resume)
    started = time.monotonic()
    expected = fingerprint(job)
    with write_errors(job.output):
        done = finished(job.output, digest(expected)) if not overwrite else None
        if done is not None:
            clear_away(job.output)
            took = Took(0.0, 0, None)
            return Result(job.output, done, took, len(job.units), not _ships_loader(job.source.config))
        check_output(job.output, overwrite=overwrite, source=job.source.folder)
        work, journal = begin(job.output, expected, resume)
    try:
        job = replace(job, windows=job.windows or kept_text(job, work, journal))
        # Before the model's own text is written, which may be what takes the most memory.
        need = estimate(job) if job.calibration is not None else None
        if job.recipe.allocate == "error":
            if progress is not None:
                progress.start(job, 0, 0)
            if job.windows is None:
                job = replace(job, windows=own_text(job, work, progress))
            job = allocated(job, work, journal, progress)
        writer = ShardWriter(work, job.shards, journal, job.blocks.values())
        resumed = writer.done
        _check_space(job, work, sum(u.end - u.begin for u in journal.units))
        if progress is not None:
            units = job.units[:resumed]
            progress.start(job, sum(p is not None for _, p in units), sum(e.nbytes for e, _ in units))
        if job.calibration is not None and job.windows is None:
            job = replace(job, windows=own_text(job, work, progress))
        stop = Event()
        with ThreadPoolExecutor(1, "hash") as hasher:
            try:
                hashes = hasher.submit(_source_hashes, job.source, stop)
                if job.calibration is None:
                    _compress_units(job, writer, progress)
                else:
                    CalibratedRun(job, writer, progress, estimate(job)).run()
                writer.finish()
                report = _finish(job, work, journal, hashes.result(), digest(expected))
                took = Took(time.monotonic() - started, peak_memory(), need)
                _write_timing(work, job, journal, took)
            finally:
                stop.set()  # an error is told at once, not after the rest of the source has been read
        publish(work, job.output)
    finally:
        journal.close()
    return Result(job.output, report, took, resumed, not _ships_loader(job.source.config))


# --- before -----------------------------------------------------------------------------------------


def _check_space(job: Job, work: Path, written: int) -> None:
    need = job.plan.expected_bytes + job.copied_bytes - written
    free = shutil.disk_usage(work).free
    if need > free:
        raise OutputError(
            f"{work.parent} has {free:,} bytes free, and the result needs about {need:,} more. Free some space, or "
            "choose another disk with --output."
        )


# --- the work ---------------------------------------------------------------------------------------


def _compress_units(job: Job, writer: ShardWriter, progress: Progress | None) -> None:
    """Read ahead, solve, and write behind: one thread each, one layer between them."""
    files = {file.path: file for file in job.source.files}
    todo = job.units[writer.done :]
    upcoming = iter([entry for entry, plan in todo if plan is not None])

    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as pen:

        def read_next() -> Future[Tensor] | None:
            entry = next(upcoming, None)
            return None if entry is None else reader.submit(files[entry.path].read, entry)

        ahead: Future[Tensor] | None = read_next()
        behind: Future[Unit] | None = None
        for entry, plan in todo:
            stats, seconds = None, 0.0
            if plan is None:
                parts: Any = [
                    (entry.name, entry.dtype, entry.shape, _watched(files[entry.path].chunks(entry), progress))
                ]
            else:
                assert ahead is not None, "one read is submitted for each layer"
                begun = time.monotonic()
                stored, ahead = ahead.result(), read_next()
                solved = solve_layer(plan, stored, job.recipe, job.device)
                report, tensors = encode(plan, solved, stored.dtype)
                parts = [tensor_part(f"{plan.layer.disk_module}.{suffix}", t) for suffix, t in tensors.items()]
                stats, seconds = {"spec": report.spec.to_dict(), **report.measured()}, time.monotonic() - begun
                if progress is not None:
                    progress.layer(report)
                    progress.advance(entry.nbytes)
            if behind is not None:
                behind.result()  # a unit that could not be written ends the run before the next is begun
            behind = pen.submit(writer.append, parts, stats, seconds)
        if behind is not None:
            behind.result()


def _watched(pieces: Iterator[bytes], progress: Progress | None) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        if progress is not None:
            progress.advance(len(piece))


# --- after ------------------------------------------------------------------------------------------


def _ships_loader(config: dict[str, Any]) -> bool:
    return "AutoConfig" not in (config.get("auto_map") or {})


def _source_hashes(source: Checkpoint, stop: Event) -> dict[str, dict[str, Any]]:
    files = {}
    for file in source.files:
        if stop.is_set():
            break
        blob = file.path.resolve().name  # in the Hub's cache a file's target is named by its SHA-256
        known = blob if file.path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob) else sha256(file.path, stop)
        files[file.path.name] = {"size": file.path.stat().st_size, "sha256": known}
    return files


def _finish(job: Job, work: Path, journal: Journal, hashes: dict[str, Any], run_digest: str) -> Report:
    """Config, shim, companions, card, report: all that stands beside the weights."""
    order = {p.layer.name: k for k, p in enumerate(job.plan.layers)}  # the model's, not the files'
    stats = sorted((u.stats for u in journal.units if u.stats is not None), key=lambda line: order[line["name"]])
    specs = {line["name"]: LayerSpec.from_dict(line["spec"]) for line in stats}
    with write_errors(work):
        copy_companions(job.source.folder, work)
        write_config(work, job.source.config, specs, job.plan.skipped)
        report = Report(
            layers=tuple(LayerReport.from_dict(line, specs[line["name"]]) for line in stats),
            skipped=job.plan.skipped,
            model_bytes_before=job.source.nbytes,
            model_bytes_after=sum(unit.end - unit.begin for unit in journal.units),
            parameters=job.parameters,
            source={
                "name": job.source.name,
                "commit": job.source.commit,
                "architecture": (job.source.config.get("architectures") or [None])[0],
                "files": hashes,
            },
            recipe=job.recipe.to_dict() if job.start is None else job.start.report().get("recipe", {}),
            versions=versions(),
            fingerprint=run_digest,
            calibration=_calibration(job),
            blocks=tuple(line["block"] for line in stats if "block" in line),
        )
        return close(work, report, job.source.folder, job.output.name)


def _write_timing(work: Path, job: Job, journal: Journal, took: Took) -> None:
    """losparse_timing.json, which alone differs between two equal runs."""
    content: dict[str, Any] = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "threads": torch.get_num_threads(),
        "run": {"seconds": took.seconds, "peak_memory_bytes": took.peak_bytes},
    }
    if took.predicted is not None:
        content["predicted"] = {"seconds": took.predicted.seconds, "peak_memory_bytes": took.predicted.peak_bytes}
    content["seconds"] = {
        job.units[unit.number][0].name: unit.seconds for unit in journal.units if unit.stats is not None
    }
    with write_errors(work):
        write_json(work / TIMING, content)


def _calibration(job: Job) -> dict[str, Any]:
    """What text was used, for the report."""
    if job.calibration is None or job.windows is None:
        return {}
    counted = {"tokens_used": job.windows.tokens, "windows": len(job.windows.ids), "sha256": job.windows.digest()}
    return asdict(job.calibration) | counted
