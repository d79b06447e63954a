"""Dense checkpoint -> U, V, S checkpoint, one layer or block in memory at a time."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch

from .budget.plan import plan_as_stored
from .budget.recipe import Recipe
from .checkpoint.companions import copy_companions
from .checkpoint.config import fused_of, layer_specs, write_config
from .checkpoint.fingerprint import digest
from .checkpoint.finish import close, read_report, versions
from .checkpoint.output import TRAINING, check_space
from .checkpoint.report import LayerReport, Report
from .checkpoint.source import TIMING, Checkpoint, open_checkpoint
from .checkpoint.workfolder import WorkFolder
from .checkpoint.writer import ShardWriter, sha256, write_json
from .compression.calibrated import CalibratedRun
from .compression.decisions import allocated_plan, kept_text, own_text
from .compression.estimate import Estimate, estimate, space_needed
from .compression.fingerprint import fingerprint
from .compression.plan import Job, prepare
from .compression.request import ModelRefinement, Refinement, make_request
from .compression.schedule import Schedule, schedule
from .compression.steps import Steps, foreseen_steps
from .compression.stream import compress_stream
from .errors import write_errors
from .models.device import peak_memory
from .progress import Progress, listener
from .refinement.run import train_into
from .shim.layouts import LayerSpec
from .text.request import Calibration
from .text.sample import account, doubts, strangeness
from .text.windows import Windows


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
    revision: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    plan_only: bool = False,
) -> Job:
    """What compressing a Hub id or folder would do; `forecast` says what the job needs, `run` carries it out.

    recipe: a Recipe, a mapping such as {"bits": 3.25}, or the path of a YAML file, which may describe the whole run;
    what is given beside it wins. calibration: or its source alone: a file, a Hub dataset, or "self". refinement: or
    "blocks". plan_only: a Hub model is not downloaded, and the job cannot be run. Raises as `compression.plan.prepare`,
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
        made = schedule(job.entries, allocated_plan(job, windows, work, told), job.max_shard_bytes)
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
                hashes = hasher.submit(_source_hashes, job.source, stop)
                if need is None or windows is None:
                    compress_stream(job, made, writer, told)
                else:
                    CalibratedRun(job, windows, made, writer, told, need.fixed_bytes, steps).run()
                writer.finish()
                report = _finish(job, made, windows, work, hashes.result(), digest(mark), steps.nats)
                took = Took(time.monotonic() - begun, peak_memory(), need)
                _write_timing(work, made, took)
            finally:
                stop.set()  # an error is told at once, not after the rest of the source has been read
        work.publish()
    return Result(job.output, report, took, resumed, _needs_package(job))


def _found_finished(job: Job) -> Result:
    report = read_report(job.output)
    assert report is not None, "a result that is whole has one"
    return Result(job.output, report, Took(0.0, 0, None), len(job.entries), _needs_package(job))


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
    told.start("bytes", job.source.nbytes, sum(entry.nbytes for entry, _ in finished))


# --- after ------------------------------------------------------------------------------------------


def _source_hashes(source: Checkpoint, stop: Event) -> dict[str, dict[str, Any]]:
    files = {}
    for file in source.files:
        if stop.is_set():
            break
        blob = file.path.resolve().name  # in the Hub's cache a file's target is named by its SHA-256
        known = blob if file.path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob) else sha256(file.path, stop)
        files[file.path.name] = {"size": file.path.stat().st_size, "sha256": known}
    return files


def _finish(
    job: Job,
    made: Schedule,
    windows: Windows | None,
    work: WorkFolder,
    hashes: dict[str, Any],
    mark: str,
    nats: float | None,
) -> Report:
    """Config, shim, companions, card, report: all that stands beside the weights. nats: the text's, a token."""
    order = {p.layer.name: k for k, p in enumerate(made.plan.layers)}  # the model's, not the files'
    stats = [unit.stats for unit in work.journal.units if unit.stats is not None]
    stats.sort(key=lambda line: order[line["name"]])
    specs = {line["name"]: LayerSpec.from_dict(line["spec"]) for line in stats}
    with write_errors(work.path):
        copy_companions(job.source.folder, work.path)
        fused = fused_of(job.source.entries.values())
        write_config(work.path, job.source.config, specs, made.plan.skipped, fused)
        report = Report(
            layers=tuple(LayerReport.from_dict(line, specs[line["name"]]) for line in stats),
            skipped=made.plan.skipped,
            model_bytes_before=job.source.nbytes,
            model_bytes_after=sum(unit.end - unit.begin for unit in work.journal.units),
            parameters=job.parameters,
            source={
                "name": job.source.name,
                "commit": job.source.commit,
                "architecture": (job.source.config.get("architectures") or [None])[0],
                "files": hashes,
            },
            recipe=job.recipe.to_dict() if job.start is None else job.start.report().get("recipe", {}),
            versions=versions(),
            fingerprint=mark,
            calibration=account(job.calibration, windows, nats) if job.calibration is not None else {},
            blocks=tuple(line["block"] for line in stats if "block" in line),
        )
        return close(work.path, report, job.source.folder, job.output.name)


def _write_timing(work: WorkFolder, made: Schedule, took: Took) -> None:
    """losparse_timing.json, which alone differs between two equal runs."""
    content: dict[str, Any] = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "threads": torch.get_num_threads(),
        "run": {"seconds": took.seconds, "peak_memory_bytes": took.peak_bytes},
    }
    if took.predicted is not None:
        content["predicted"] = {"seconds": took.predicted.seconds, "peak_memory_bytes": took.predicted.peak_bytes}
    content["seconds"] = {
        made.units[unit.number][0].name: unit.seconds for unit in work.journal.units if unit.stats is not None
    }
    with write_errors(work.path):
        write_json(work.path / TIMING, content)
