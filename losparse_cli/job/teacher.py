"""The model that a fine-tuning learns from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoint.source import Checkpoint, open_checkpoint
from ..errors import UsageError
from ..load import load
from ..training.request import Finetuning

if TYPE_CHECKING:
    from ..tasks.task import Task


def find_teacher(
    checkpoint: Checkpoint, config: Any, how: Finetuning, task: Task, cache_dir: Path | None, device: torch.device,
    options: dict[str, Any],
) -> tuple[nn.Module | None, Checkpoint | None]:  # fmt: skip
    """The model to learn from, and its checkpoint: the one named, or with --objective distill our own, dense.

    config: of the model that is to learn. UsageError if there is no such model, or if its predictions are of another
    kind.
    """
    from ..training.trainer import chosen_precision

    name, commit = how.teacher, None
    if name is None and how.objective == "task":
        return None, None
    if name is None and not checkpoint.is_compressed:
        name = str(checkpoint.folder)
    if name is None:
        origin = checkpoint.report().get("source", {})
        name, commit = origin.get("name"), origin.get("commit")
        if commit is None:
            raise UsageError(f"{checkpoint.address} does not say where its dense model is. Give it with --teacher.")
    found = open_checkpoint(name, revision=commit, cache_dir=cache_dir)
    checkpoint.check_vocabulary(found)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(chosen_precision(how.precision, device))
    model, _ = load(found.folder, model_class=task.auto_class, dtype=dtype or torch.float32, **options)
    _check(found, model, config, how, task)
    return model, found


def _check(found: Checkpoint, model: Any, config: Any, how: Finetuning, task: Task) -> None:
    stored = str((found.config.get("architectures") or [type(model).__name__])[0])
    # transformers draws at random what a checkpoint lacks; of these heads none is part of a pretrained model.
    if task.name in ("text-classification", "question-answering") and stored != type(model).__name__:
        raise UsageError(
            f"The teacher {found.address} is a {stored} and has no head for {task.name}. Fine-tune it for the task "
            "first, and give the result with --teacher."
        )
    if task.name == "text-classification" and model.config.num_labels != config.num_labels:
        raise UsageError(
            f"The teacher {found.address} knows {model.config.num_labels} labels, and the model that is to learn "
            f"{config.num_labels}. Give a teacher of the same labels."
        )
    sizes = [(c.num_hidden_layers, c.hidden_size) for c in (model.config.get_text_config(), config.get_text_config())]
    if how.hidden_weight and sizes[0] != sizes[1]:
        raise UsageError(
            f"The teacher {found.address} has {sizes[0][0]} layers of width {sizes[0][1]}, and the model that is to "
            f"learn {sizes[1][0]} of {sizes[1][1]}: hidden states cannot be compared. Leave out --hidden-weight."
        )
