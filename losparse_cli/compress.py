"""Dense checkpoint -> U, V, S checkpoint, one layer or block in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from .budget.plan import plan_as_stored
from .budget.recipe import Recipe
from .checkpoint.config import layer_specs
from .checkpoint.fingerprint import digest
from .checkpoint.output import TRAINING, check_space, working_folder
from .checkpoint.source import open_checkpoint
from .compression.closing import Took
from .compression.estimate import space_needed
from .compression.fingerprint import fingerprint
from .compression.parts import Part
from .compression.plan import Job, prepare
from .compression.request import AnyRefinement, make_request
from .compression.run import Result, found_finished, run_in_parts, run_whole
from .compression.team import begin, require_alike, require_seen, require_shared
from .models.device import peak_memory
from .parallel.group import Ranks, ranks
from .progress import Progress, listener
from .refinement.run import train_into
from .text.request import Calibration

__all__ = ["Result", "compress", "plan", "run"]


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
    refinement: AnyRefinement | Mapping[str, Any] | str | None = None,
    device: str | None = None,
    memory_limit: str | None = None,
    max_shard_size: str | None = None,
    part: str | Part | None = None,
    sensitivity_file: str | Path | None = None,
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
        sensitivity_file=sensitivity_file,
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
    refinement: AnyRefinement | Mapping[str, Any] | str | None = None,
    device: str | None = None,
    memory_limit: str | None = None,
    max_shard_size: str | None = None,
    part: str | Part | None = None,
    sensitivity_file: str | Path | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    plan_only: bool = False,
) -> Job:
    """What compressing a Hub id or folder would do; `forecast` says what the job needs, `run` carries it out.

    recipe: a Recipe, a mapping such as {"bits": 3.25}, or the path of a YAML file, which may describe the whole run;
    what is given beside it wins. calibration: or its source alone: a file, a Hub dataset, or "self". refinement: or
    "blocks". part: such as "2/3", the second of three parts of a run without text, which `join` makes one.
    sensitivity_file: written with what the loss minds, and read by runs of other sizes, which need not measure it.
    plan_only: a Hub model is not downloaded, and the job cannot be run. Raises as `compression.plan.prepare`, and
    RecipeError for a recipe that is wrong.
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
        sensitivity_file=sensitivity_file,
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
    """Carry out a planned job; see `compress`. Of several processes the first writes, and hears progress."""
    group = ranks()
    told = listener(progress if group.rank == 0 else None)
    require_shared(group, job)
    with group.at_work():
        require_alike(group, fingerprint(job), told)
        if group.size > 1 and job.calibration is None:
            return run_in_parts(job, group, resume, overwrite, told)
        if job.towards is not None:
            return _run_towards(job, group, resume, overwrite, told)
        return run_whole(job, group, resume, overwrite, told)


def _run_towards(job: Job, group: Ranks, resume: str, overwrite: bool, told: Progress) -> Result:
    """Compressed first, into the work folder of the whole run, and that trained towards the whole dense model."""
    begun, mark = time.monotonic(), fingerprint(job)
    with ExitStack() as stack:
        team = begin(stack, job, group, mark, resume, overwrite)
        work, folder = team.work, working_folder(job.output)
        if team.said(work is not None and work.finished):
            return found_finished(job)
        remedy = "with --refine they share a folder. Leave it out, and copy the result to each for losparse refine."
        require_seen(group, folder, remedy)
        if work is not None and not (work.path / TRAINING).is_dir():  # else a part of it is written
            check_space(work.path, space_needed(job))
        small = replace(job, towards=None, output=folder / TRAINING / "compressed")
        done = run_whole(small, group, "auto", False, told)
        start = open_checkpoint(done.output)
        plan = plan_as_stored([p.layer for p in job.plan.layers], job.plan.skipped, layer_specs(start))
        report = train_into(team, replace(job, start=start, plan=plan), digest(mark), told)
    took = Took(time.monotonic() - begun, peak_memory(), None)
    return Result(job.output, report, took, done.resumed, done.needs_package)
