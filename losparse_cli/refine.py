"""Compressed checkpoint -> the same one, trained to match the dense model: block by block, or as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .budget.recipe import Recipe
from .checkpoint.config import layer_specs
from .checkpoint.finish import read_report
from .checkpoint.output import output_path
from .checkpoint.source import open_checkpoint
from .compress import Result, run
from .compression.plan import Job, prepare
from .compression.request import BothRefinements, ModelRefinement, Refinement, make_request
from .errors import UsageError
from .progress import Progress
from .refinement.run import RefinedModel, run_model
from .text.request import Calibration


def refine(
    source: str | Path,
    output: str | Path | None = None,
    *,
    calibration: Calibration | Mapping[str, Any] | str | Path,
    refinement: Refinement | ModelRefinement | Mapping[str, Any] | str | None = None,
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
) -> Result | RefinedModel:
    """Refine a compressed checkpoint into `output`; options as in `prepare_refinement`, errors as in `compress`.

    Ranks, supports, codes and sizes stay; a layer, a block or a model is left as it is where training does not bring it
    closer.
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
    if job.towards is None:
        return run(job, resume=resume, overwrite=overwrite, progress=progress)
    return run_model(job, resume=resume, overwrite=overwrite, progress=progress)


OBJECTIVES = ("blocks", "model")
OPTIONS = {"train": "--train", "gradient_checkpointing": "--gradient-checkpointing", "precision": "--precision"}
"""Settings of a whole model whose options have no --refine- before their name."""


def make_refinement(
    objective: str | None = None,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    lr: float | None = None,
    tokens: int | None = None,
    train: str | None = None,
    gradient_checkpointing: bool | None = None,
    precision: str | None = None,
) -> Refinement | ModelRefinement | dict[str, Any]:
    """What --objective and the options beside it ask for; settings alone for the objective that suits the checkpoint.

    UsageError for an objective that is none, and for an option that it does not take.
    """
    if objective not in (None, *OBJECTIVES):
        raise UsageError(f"--objective is one of {', '.join(OBJECTIVES)}, not {objective!r}.")
    whole: dict[str, Any] = {
        "minutes": minutes, "tokens": tokens, "train": train, "gradient_checkpointing": gradient_checkpointing,
        "precision": precision,
    }  # fmt: skip
    parts = {name: value for name, value in whole.items() if value is not None}
    if parts and objective == "blocks":
        option = OPTIONS.get(next(iter(parts)), f"--refine-{next(iter(parts))}")
        raise UsageError(f"{option} is of --objective model. Leave it out, or train the whole model.")
    given: dict[str, Any] = {name: value for name, value in (("steps", steps), ("lr", lr)) if value is not None}
    if objective == "blocks":
        return Refinement(**given)
    if parts or objective == "model":
        return ModelRefinement(**given, **parts)
    return given


def prepare_refinement(
    source: str | Path,
    output: str | Path | None = None,
    *,
    calibration: Calibration | Mapping[str, Any] | str | Path,
    refinement: Refinement | ModelRefinement | Mapping[str, Any] | str | None = None,
    against: str | Path | None = None,
    device: str | None = None,
    memory_limit: str | None = None,
    max_shard_size: str | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    plan_only: bool = False,
) -> Job:
    """The job that refines the compressed checkpoint `source` (folder or Hub id): for `run_model` where it is to train
    `towards` the whole dense model, else for `run`.

    calibration: or its source alone, or its fields. refinement: None, or settings alone, for what suits the checkpoint:
    the whole model where S is whole numbers, blocks where it is floats; or `blocks` or `model`. against: the dense
    model, None for the Hub model and commit that the report names. `revision` is of `source`; the other options are as
    in `compress`. plan_only: nothing but headers is downloaded, and the job cannot be run.
    UsageError if `source` is not compressed, names no dense model, or is asked for what it cannot be trained to.
    """
    start = open_checkpoint(source, revision=revision, cache_dir=cache_dir, headers_only=plan_only)
    if not start.is_compressed:
        raise UsageError(
            f"{start.address} is not compressed, so there is nothing to refine. Compress it first, with: losparse "
            f"compress {start.address} --calibration FILE"
        )
    layers = [spec for spec in layer_specs(start).values() if spec.kind != "embedding"]
    if not layers:
        raise UsageError(f"{start.address} has no compressed layers but embeddings, and those are not refined.")
    coded = any(spec.layout == "codes" for spec in layers)
    if not isinstance(refinement, Refinement | ModelRefinement):
        if refinement is None or isinstance(refinement, Mapping):
            refinement = {"mode": "model" if coded else "blocks", **(refinement or {})}
        found = make_request(refinement=refinement, calibration=calibration).refinement
        if found is None:
            raise UsageError("losparse refine trains something: refinement is blocks or model, not off.")
        if isinstance(found, BothRefinements):
            raise UsageError("losparse refine does one thing at a time: blocks, and then model of what that wrote.")
        refinement = found
    report = read_report(start.folder)  # CheckpointError now if it is damaged, not halfway
    made_from = report.source if report is not None else {}
    commit = made_from.get("commit")
    if against is None and commit is None:
        raise UsageError(f"{start.address} does not say where its dense model is. Give it with --against.")
    return prepare(
        against or made_from["name"],
        output_path(output or f"{start.name.rpartition('/')[2]}-refined"),
        make_request(
            # Nothing is solved anew, so that nothing is asked of the loss.
            Recipe(values="codes", sensitivity="off") if coded else Recipe(values="float"),
            calibration=calibration,
            refinement=refinement,
            device=device,
            memory_limit=memory_limit,
            max_shard_size=max_shard_size,
        ),
        start=start,
        revision=None if against is not None else commit,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
        plan_only=plan_only,
    )
