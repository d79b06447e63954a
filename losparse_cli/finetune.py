"""Dense or compressed checkpoint -> one whose U, V and S were trained, S pruned on the way, by a task or a teacher."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .checkpoint.companions import copy_companions
from .checkpoint.config import write_config
from .checkpoint.fingerprint import digest
from .checkpoint.finish import close, read_report, versions
from .checkpoint.journal import FILE as JOURNAL
from .checkpoint.layers import encode_layer
from .checkpoint.output import STATES
from .checkpoint.report import LayerReport, Report
from .checkpoint.source import read_json
from .checkpoint.workfolder import WorkFolder
from .errors import write_errors
from .finetuning.conversion import finish, trained_layers
from .finetuning.prepare import Progress, Silent, Training, prepare_finetuning
from .linalg.factors import LowRankSparse
from .linalg.precision import fast_float32
from .shim.layouts import LayerSpec
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
    task: TaskRequest,
    resume: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Finetuned:
    """Train the model `source` on `task` into the folder `output`; options as in `prepare_finetuning`.

    The result appears whole or not at all; a killed run goes on from the last state that it saved when called again,
    as in `compress`. Raises as `prepare_finetuning`; TrainingError where the loss stops being a number, OutputError
    and ResumeError if the result cannot be written.
    """
    training = prepare_finetuning(source, output, task=task, overwrite=overwrite, progress=progress, **options)
    return run(training, resume=resume, overwrite=overwrite, progress=progress)


def run(
    training: Training, *, resume: str = "auto", overwrite: bool = False, progress: Progress | None = None
) -> Finetuned:
    """Carry out a prepared fine-tuning; see `finetune`. Of several processes the first alone writes the result."""
    begun, told = time.monotonic(), progress or Silent()
    with WorkFolder(
        training.output, training.fingerprint, resume=resume, overwrite=overwrite, source=training.source.folder,
        owner=is_main_process(),
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
        if is_main_process():
            told.phase("Writing the result")
            with _disk_errors(work.path):
                report = _write(training, model, work.path, time.monotonic() - begun, told)
            work.publish()
    scores = report.training.get("scores", {})
    return Finetuned(training.output, report, scores, training.steps, time.monotonic() - begun)


def is_main_process() -> bool:
    """False in all but one of the processes that `torchrun` or `accelerate launch` starts."""
    return int(os.environ.get("RANK", "0")) == 0


# --- the work ---------------------------------------------------------------------------------------


_TORCH_WRITES = ("PytorchStreamWriter", "inline_container.cc", "iostream error")


@contextmanager
def _disk_errors(place: Path) -> Iterator[None]:
    """`write_errors` that also knows how safetensors and torch.save say that the system did not let them write.

    torch.save fails again where it closes its archive, and that is what it tells.
    """
    from safetensors import SafetensorError

    with write_errors(place):
        try:
            yield
        except (SafetensorError, RuntimeError) as error:
            found = re.search(r"\(os error (\d+)\)", str(error))
            if found is None and not any(word in str(error) for word in _TORCH_WRITES):
                raise
            number = errno.ENOSPC if found is None else int(found[1])
            raise OSError(number, os.strerror(number), str(place)) from error


def _train(training: Training, work: Path, told: Progress) -> Any:
    """The model after the training that was still to be done; in the first process it is whole."""
    from safetensors.torch import load_model

    from .finetuning.trainer import FinetuneTrainer, last_state

    exact = training.device.type == "cpu"
    trainer = FinetuneTrainer(
        training.model,
        training.how,
        training.pruner,
        folder=work / STATES,
        steps=training.steps,
        device=training.device,
        train=training.features,
        collate=training.task.collator(training.tokenizer, training.model),
        teacher=training.teacher,
        score=None if training.unseen is None else lambda model: _score(training, model, told),
        within=fast_float32 if exact else nullcontext,
        on_step=told.step,
    )
    last = last_state(work / STATES)
    trainer.accelerator.wait_for_everyone()  # before the first process goes on, and changes what is there
    if last is not None and last[0] >= training.steps:  # killed while the result was written
        load_model(training.model, last[1] / "model.safetensors")
        return training.model
    told.phase("Training" if last is None else f"Training, from step {last[0]} on")
    # FSDP takes the model apart, and the result is made by one process, from a whole one.
    whole = deepcopy(training.model) if trainer.is_fsdp_enabled and is_main_process() else None
    with _disk_errors(work / STATES):
        trainer.train(resume_from_checkpoint=None if last is None else str(last[1]))
    if whole is None:
        return training.model
    last = last_state(work / STATES)
    assert last is not None, "the last step is always saved"
    load_model(whole, last[1] / "model.safetensors")
    return whole


def _score(training: Training, model: nn.Module, told: Progress) -> dict[str, float]:
    assert training.unseen is not None, "scored on validation data"
    return training.task.score(
        model, training.tokenizer, training.unseen, batch_size=training.how.eval_batch_size, device=training.device,
        on_batch=told.batch,
    )  # fmt: skip


# --- after ------------------------------------------------------------------------------------------


def _write(training: Training, model: Any, work: Path, seconds: float, told: Progress) -> Report:
    """The trained model with its parts as they are stored, and all that stands beside the weights."""
    plans = {p.layer.name: p for p in training.plan.layers}
    reports: list[LayerReport] = []
    specs: dict[str, LayerSpec] = {}

    def encode(name: str, factors: LowRankSparse) -> tuple[LayerSpec, dict[str, Tensor]]:
        spec, tensors = encode_layer(plans[name], factors.U, factors.V, factors.values, factors.support)
        reports.append(LayerReport(name, spec, plans[name].layer.dense_bytes, spec.nbytes(training.dtype)))
        specs[name] = spec
        return spec, tensors

    for left in work.iterdir():  # by a run that was killed while it wrote
        if left.name not in (JOURNAL, STATES):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    before = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for layer in trained_layers(model).values() for p in (layer.U, layer.V, layer.S) if p is not None
    )
    finish(model, training.dtype, encode)
    model.to(training.device)  # where FSDP had it in parts, it is whole on the CPU, and may only fit now
    scores = {} if training.unseen is None else _score(training, model, told)
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    vars(model).pop("save_pretrained", None)  # of compressed models: it would write its own account of the layers
    copy_companions(training.source.folder, work)
    model.save_pretrained(work, max_shard_size=training.max_shard_size)
    _save_tokenizer(training.tokenizer, work)
    write_config(work, read_json(work / "config.json"), specs, training.plan.skipped)
    dense = sum(p.layer.shape[0] * p.layer.shape[1] for p in training.plan.layers)
    report = Report(
        layers=tuple(reports),
        skipped=training.plan.skipped,
        model_bytes_before=(before + dense) * training.dtype.itemsize,
        model_bytes_after=sum(t.numel() * t.element_size() for t in _unique(model.state_dict())),
        parameters=before + dense,
        source={
            "name": training.source.name,
            "commit": training.source.commit,
            "architecture": type(model).__name__,
            "files": {},
        },
        recipe={"pattern": training.plan.layers[0].pattern},
        versions=versions(),
        fingerprint=digest(training.fingerprint),
        training={
            "objective": training.how.objective,
            "task": training.task.name,
            "steps": training.steps,
            "seconds": round(seconds, 1),
            "settings": training.how.to_dict(),
            "scores": scores,
        },
    )
    return close(work, report, training.source.folder, training.output.name)


def _save_tokenizer(tokenizer: Any, work: Path) -> None:
    """Without the truncation and padding of its last call, which a fast one would write into tokenizer.json."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(work)


def _unique(state: dict[str, Tensor]) -> list[Tensor]:
    """Tied weights once."""
    return list({(t.data_ptr(), t.shape): t for t in state.values()}.values())
