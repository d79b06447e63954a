"""Dense or compressed checkpoint -> one whose U, V and S were trained, S pruned on the way, by a task or a teacher."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .budget.recipe import Recipe
from .checkpoint.finish import read_report
from .checkpoint.output import TRAINING
from .checkpoint.report import Report
from .checkpoint.workfolder import WorkFolder
from .finetuning.prepare import Training, prepare_finetuning
from .finetuning.request import Finetuning
from .finetuning.result import write_result
from .finetuning.states import disk_errors, last_state
from .linalg.precision import fast_float32
from .parallel.launch import is_first
from .progress import Progress, listener
from .tasks.request import TaskRequest


@dataclass(frozen=True)
class Finetuned:
    """output: the finished folder. scores: of the model as it is written, {} without validation data."""

    output: Path
    report: Report
    scores: dict[str, float]
    steps: int
    seconds: float


def finetune(
    source: str | Path,
    output: Path | None = None,
    *,
    task: TaskRequest | Mapping[str, Any] | str,
    how: Finetuning | Mapping[str, Any] | None = None,
    recipe: Recipe | Mapping[str, Any] | None = None,
    device: str = "auto",
    max_shard_size: str = "5GB",
    resume: str = "auto",
    overwrite: bool = False,
    revision: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Finetuned:
    """Train the model `source` on `task` into the folder `output`; what is fixed beforehand as in `prepare_finetuning`.

    The result appears whole or not at all; a killed run goes on from the last state that it saved when called again,
    as in `compress`. Raises as `prepare_finetuning`; TrainingError where the loss stops being a number, OutputError
    and ResumeError if the result cannot be written.
    """
    training = prepare_finetuning(
        source, output, task=task, how=how, recipe=recipe, device=device, max_shard_size=max_shard_size,
        overwrite=overwrite, revision=revision, cache_dir=cache_dir, trust_remote_code=trust_remote_code,
        progress=progress,
    )  # fmt: skip
    return run(training, resume=resume, overwrite=overwrite, progress=progress)


def run(
    training: Training, *, resume: str = "auto", overwrite: bool = False, progress: Progress | None = None
) -> Finetuned:
    """Carry out a prepared fine-tuning; see `finetune`. Of several processes the first alone writes the result."""
    begun, told = time.monotonic(), listener(progress)
    with WorkFolder(
        training.output, training.fingerprint, resume=resume, overwrite=overwrite, reads=[training.source.folder],
        owner=is_first(),
    ) as work:  # fmt: skip
        if work.finished:
            done = read_report(training.output)
            assert done is not None, "a result that is whole has one"
            return Finetuned(training.output, done, done.training.get("scores", {}), training.steps, 0.0)
        caching = getattr(training.model.config, "use_cache", None)
        model = _train(training, work.path, told)
        if caching is not None:
            model.config.use_cache = caching  # which Trainer turns off
        report = Report((), {}, 0, 0, 0)
        if is_first():
            told.phase("Writing the result")
            with disk_errors(work.path):
                report = write_result(training, model, work.path, time.monotonic() - begun, told)
            work.publish()
    scores = report.training.get("scores", {})
    return Finetuned(training.output, report, scores, training.steps, time.monotonic() - begun)


# --- the work ---------------------------------------------------------------------------------------


def _train(training: Training, work: Path, told: Progress) -> Any:
    """The model after the training that was still to be done; in the first process it is whole."""
    from safetensors.torch import load_model

    from .finetuning.trainer import FinetuneTrainer

    exact = training.device.type == "cpu"
    trainer = FinetuneTrainer(
        training.model,
        training.how,
        training.pruner,
        folder=work / TRAINING,
        steps=training.steps,
        device=training.device,
        train=training.features,
        collate=training.task.collator(training.tokenizer, training.model),
        teacher=training.teacher,
        score=None if training.unseen is None else lambda model: training.score(model, told),
        within=fast_float32 if exact else nullcontext,
        on_step=told.step,
    )
    last = last_state(work / TRAINING)
    trainer.accelerator.wait_for_everyone()  # before the first process goes on, and changes what is there
    if last is not None and last[0] >= training.steps:  # killed while the result was written
        load_model(training.model, last[1] / "model.safetensors")
        return training.model
    told.phase("Training" if last is None else f"Training, from step {last[0]} on")
    # FSDP takes the model apart, and the result is made by one process, from a whole one.
    whole = deepcopy(training.model) if trainer.is_fsdp_enabled and is_first() else None
    with disk_errors(work / TRAINING):
        trainer.train(resume_from_checkpoint=None if last is None else str(last[1]))
    if whole is None:
        return training.model
    last = last_state(work / TRAINING)
    assert last is not None, "the last step is always saved"
    load_model(whole, last[1] / "model.safetensors")
    return whole
