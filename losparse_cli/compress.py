"""Dense checkpoint -> U, V, S checkpoint, one layer or block in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from .budget.plan import plan_as_stored
from .budget.recipe import Recipe
from .checkpoint.config import layer_specs
from .checkpoint.fingerprint import digest
from .checkpoint.finish import read_report
from .checkpoint.output import TRAINING, check_space
from .checkpoint.part import read_part
from .checkpoint.report import Report
from .checkpoint.source import open_checkpoint
from .checkpoint.workfolder import WorkFolder
from .checkpoint.writer import ShardWriter
from .compression.calibrated import CalibratedRun
from .compression.closing import (
    Took,
    finish_part,
    finish_whole,
    hashed_here,
    report_of_part,
    source_hashes,
    write_timing,
)
from .compression.decisions import allocated_plan, kept_text, own_text
from .compression.estimate import estimate, space_needed
from .compression.fingerprint import fingerprint
from .compression.parts import Part
from .compression.plan import Job, prepare
from .compression.request import ModelRefinement, Refinement, make_request
from .compression.schedule import Schedule
from .compression.steps import Steps, foreseen_steps
from .compression.stream import compress_stream
from .models.device import peak_memory
from .progress import Progress, listener
from .refinement.run import train_into
from .text.request import Calibration
from .text.sample import doubts, strangeness


@dataclass(frozen=True)
class Result:
    """output: the finished folder. report: of all of it, or of a part's layers alone. took: time and memory. resumed:
    units found finished.

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
    output: str | Path | None = None,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    rank: int | None = None,
    rank_ratio: float | None = None,
    sparsity: float | None = None,
    size: str | int | None = None,
    keep: float | None = None,
    keep_parameters: float | None = None,
    bits: float | None = None,
    value_bits: float | None = None,
    grid: str | None = None,
    values: str | None = None,
    embedding_bits: float | str | None = None,
    pattern: str | None = None,
    calibration: Calibration | Mapping[str, Any] | str | Path | None = None,
    refinement: Refinement | ModelRefinement | Mapping[str, Any] | str | None = None,
    device: str | None = None,
    memory_limit: str | None = None,
    max_shard_size: str | None = None,
    part: str | Part | None = None,
    resume: str = "auto",
    overwrite: bool = False,
    revision: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Compress a Hub id or folder into `output`, as `plan` says; `run` on its job does the same.

    The result appears at `output` whole or not at all. A killed run goes on where it was when called
    again; resume `required` insists on that, `never` discards what was done. Raises as `plan`, and
    OutputError or ResumeError if the result cannot be written.
    """
    job = plan(
        model,
        output,
        recipe,
        rank=rank,
        rank_ratio=rank_ratio,
        sparsity=sparsity,
        size=size,
        keep=keep,
        keep_parameters=keep_parameters,
        bits=bits,
        value_bits=value_bits,
        grid=grid,
        values=values,
        embedding_bits=embedding_bits,
        pattern=pattern,
        calibration=calibration,
        refinement=refinement,
        device=device,
        memory_limit=memory_limit,
        max_shard_size=max_shard_size,
        part=part,
        revision=revision,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
    )
    return run(job, resume=resume, overwrite=overwrite, progress=progress)


def plan(
    model: str | Path,
    output: str | Path | None = None,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    rank: int | None = None,
    rank_ratio: float | None = None,
    sparsity: float | None = None,
    size: str | int | None = None,
    keep: float | None = None,
    keep_parameters: float | None = None,
    bits: float | None = None,
    value_bits: float | None = None,
    grid: str | None = None,
    values: str | None = None,
    embedding_bits: float | str | None = None,
    pattern: str | None = None,
    calibration: Calibration | Mapping[str, Any] | str | Path | None = None,
    refinement: Refinement | ModelRefinement | Mapping[str, Any] | str | None = None,
    device: str | None = None,
    memory_limit: str | None = None,
    max_shard_size: str | None = None,
    part: str | Part | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    plan_only: bool = False,
) -> Job:
    """What compressing a Hub id or folder would do; `forecast` says what the job needs, `run` carries it out.

    recipe: a Recipe, a mapping such as {"bits": 3.25}, or the path of a YAML file, which may describe the whole run;
    what is given beside it wins. calibration: or its source alone: a file, a Hub dataset, or "self". refinement: or
    "blocks". part: such as "2/3", the second of three parts of a run without text, which `join` makes one. plan_only: a
    Hub model is not downloaded, and the job cannot be run. Raises as `compression.plan.prepare`,
    and RecipeError for a recipe that is wrong.
    """
    sizes = {
        "rank": rank,
        "rank_ratio": rank_ratio,
        "sparsity": sparsity,
        "size": size,
        "keep": keep,
        "keep_parameters": keep_parameters,
        "bits": bits,
        "value_bits": value_bits,
        "grid": grid,
        "values": values,
        "embedding_bits": embedding_bits,
        "pattern": pattern,
    }
    request = make_request(
        recipe,
        sizes,
        calibration=calibration,
        refinement=refinement,
        device=device,
        memory_limit=memory_limit,
        max_shard_size=max_shard_size,
        part=part,
    )
    return prepare(
        model,
        output,
        request,
        revision=revision,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
        plan_only=plan_only,
    )


def run(job: Job, *, resume: str = "auto", overwrite: bool = False, progress: Progress | None = None) -> Result:
    """Carry out a planned job; see `compress`."""
    if job.towards is not None:
        return _run_towards(job, resume, overwrite, progress)
    begun, told, mark = time.monotonic(), listener(progress), fingerprint(job)
    with WorkFolder(job.output, mark, resume=resume, overwrite=overwrite, reads=job.reads) as work:
        if work.finished:
            return _found_finished(job)
        windows = kept_text(job, work)
        # Before the model's own text is written, which may be what takes the most memory.
        need = estimate(job, windows) if job.calibration is not None else None
        if job.calibration is not None and windows is None:
            windows = own_text(job, work, told)
        for sentence in doubts(job.calibration, windows) if job.calibration is not None else ():
            told.warn(sentence)
        made = job.scheduled(allocated_plan(job, windows, work, told))
        for sentence in made.plan.notes:
            told.warn(sentence)
        steps = Steps((), {})
        if windows is not None and need is not None:
            steps = foreseen_steps(job, made.plan, windows, work, told, need.fixed_bytes)
        for sentence in strangeness(steps.nats):
            told.warn(sentence)
        writer = ShardWriter(work.path, made.shards, work.journal, job.blocks.values())
        resumed = writer.done
        check_space(work.path, made.plan.expected_bytes + made.copied_bytes - writer.nbytes)
        _start(job, made, resumed, told)
        stop = Event()
        with ThreadPoolExecutor(1, "hash") as hasher:
            try:
                hashes = hasher.submit(source_hashes, job.source, hashed_here(job), stop)
                if need is None or windows is None:
                    compress_stream(job, made, writer, told)
                else:
                    CalibratedRun(job, windows, made, writer, told, need.fixed_bytes, steps).run()
                writer.finish()
                if job.part is None:
                    report = finish_whole(job, made, windows, work, hashes.result(), digest(mark), steps.nats)
                else:
                    report = finish_part(job, writer, work, hashes.result(), digest(mark))
                took = Took(time.monotonic() - begun, peak_memory(), need)
                write_timing(work.path, work.journal.units, took)
            finally:
                stop.set()  # an error is told at once, not after the rest of the source has been read
        work.publish()
    return Result(job.output, report, took, resumed, _needs_package(job))


def _found_finished(job: Job) -> Result:
    if job.part is not None:
        part = read_part(job.output)
        assert part is not None, "a part that is whole says so"
        report, done = report_of_part(job, part.units), len(part.units)
    else:
        found = read_report(job.output)
        assert found is not None, "a result that is whole has one"
        report, done = found, len(job.entries)
    return Result(job.output, report, Took(0.0, 0, None), done, _needs_package(job))


def _needs_package(job: Job) -> bool:
    return "AutoConfig" in (job.source.config.get("auto_map") or {})


def _run_towards(job: Job, resume: str, overwrite: bool, progress: Progress | None) -> Result:
    """Compressed first, into the work folder of the whole run, and that trained towards the whole dense model."""
    begun, told, mark = time.monotonic(), listener(progress), fingerprint(job)
    with WorkFolder(job.output, mark, resume=resume, overwrite=overwrite, reads=job.reads) as work:
        if work.finished:
            return _found_finished(job)
        if not (work.path / TRAINING).is_dir():  # else a part of it is written
            check_space(work.path, space_needed(job))
        done = run(replace(job, towards=None, output=work.path / TRAINING / "compressed"), progress=told)
        start = open_checkpoint(done.output)
        plan = plan_as_stored([p.layer for p in job.plan.layers], job.plan.skipped, layer_specs(start))
        report = train_into(work, replace(job, start=start, plan=plan), digest(mark), told)
        work.publish()
    took = Took(time.monotonic() - begun, peak_memory(), None)
    return Result(job.output, report, took, done.resumed, done.needs_package)


def _start(job: Job, made: Schedule, resumed: int, told: Progress) -> None:
    for sentence in job.route.notes if not resumed else ():
        told.tell(sentence)
    finished = made.units[:resumed]
    layers = sum(plan is not None for _, plan in finished)
    if layers:
        told.tell(f"Going on after layer {layers} of {len(made.plan.layers)}.")
    told.start("layers", len(made.plan.layers), layers)
    total = sum(entry.nbytes for entry, _ in made.units)
    told.start("bytes", total, sum(entry.nbytes for entry, _ in finished))
