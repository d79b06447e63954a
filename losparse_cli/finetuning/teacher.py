"""The model that a fine-tuning learns from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoint.finish import read_report
from ..checkpoint.source import Checkpoint, open_checkpoint
from ..errors import UsageError
from ..load import load
from ..models.device import chosen_precision
from ..text.tokenizer import positions
from .request import Finetuning

if TYPE_CHECKING:
    from ..tasks.task import Task


def find_teacher(
    checkpoint: Checkpoint, config: Any, how: Finetuning, task: Task, cache_dir: Path | None, device: torch.device,
    options: dict[str, Any], longest: int,
) -> tuple[nn.Module | None, Checkpoint | None]:  # fmt: skip
    """The model to learn from, and its checkpoint: the one named, or with --objective distill our own, dense.

    Where it has the same classes in another order, its predictions are put in ours. config: of the model that is to
    learn; longest: tokens of its longest input. UsageError if there is no such model, or if its predictions are of
    another kind.
    """
    name, commit = how.teacher, None
    if name is None and how.objective == "task":
        return None, None
    if name is None and not checkpoint.is_compressed:
        name = str(checkpoint.folder)
    if name is None:
        report = read_report(checkpoint.folder)
        origin = report.source if report is not None else {}
        name, commit = origin.get("name"), origin.get("commit")
        if commit is None:
            raise UsageError(f"{checkpoint.address} does not say where its dense model is. Give it with --teacher.")
    found = open_checkpoint(str(name), revision=commit, cache_dir=cache_dir)
    checkpoint.check_vocabulary(found)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(chosen_precision(how.precision, device))
    head = task.head(found.address, trained=True)
    model, _ = load(found.folder, model_class=head, dtype=dtype or torch.float32, **options)
    _check(found, model, config, how, task, longest)
    if task.name == "text-classification":
        _same_order(found, model, config)
    return model, found


def _check(found: Checkpoint, model: Any, config: Any, how: Finetuning, task: Task, longest: int) -> None:
    if task.name == "text-classification" and model.config.num_labels != config.num_labels:
        raise UsageError(
            f"The teacher {found.address} knows {model.config.num_labels} labels, and the model that is to learn "
            f"{config.num_labels}. Give a teacher of the same labels."
        )
    known = positions(model)
    if known is not None and longest > known:
        raise UsageError(
            f"The teacher {found.address} reads {known} tokens at most, and the longest input has {longest}. Lower "
            "--max-length, or give another teacher."
        )
    sizes = [(c.num_hidden_layers, c.hidden_size) for c in (model.config.get_text_config(), config.get_text_config())]
    if how.hidden_weight and sizes[0] != sizes[1]:
        raise UsageError(
            f"The teacher {found.address} has {sizes[0][0]} layers of width {sizes[0][1]}, and the model that is to "
            f"learn {sizes[1][0]} of {sizes[1][1]}: hidden states cannot be compared. Leave out --hidden-weight."
        )


def _same_order(found: Checkpoint, model: Any, config: Any) -> None:
    """Have the teacher's logits in the order of our classes, where both say what theirs are called."""
    names = [[str(c.id2label[k]).casefold() for k in range(c.num_labels)] for c in (config, model.config)]
    if names[0] == names[1] or not all(map(_telling, names)):
        return
    ours, theirs = names
    if sorted(ours) != sorted(theirs):
        raise UsageError(
            f"The teacher {found.address} knows the classes {', '.join(theirs[:10])}, and the model that is to learn "
            f"{', '.join(ours[:10])}. Give a teacher of the same classes, or name them alike in its config.json."
        )
    order = torch.tensor([theirs.index(name) for name in ours])

    def sort(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        outputs["logits"] = outputs["logits"][..., order.to(outputs["logits"].device)]
        return outputs

    model.register_forward_hook(sort)


def _telling(names: list[str]) -> bool:
    """Whether they say more than a number does, as LABEL_0 and 0 do not."""
    return len(set(names)) == len(names) and not any(name.removeprefix("label_").isdigit() for name in names)
