"""Source, task and recipe -> Training: data read, model taken apart, sizes chosen; nothing is trained yet."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..budget.plan import Plan
from ..budget.recipe import Recipe, recipe_of
from ..budget.recipe_file import read_recipe
from ..budget.units import parse_size
from ..checkpoint.fingerprint import companion_states, digest, file_states
from ..checkpoint.finish import versions
from ..checkpoint.output import check_output, output_path
from ..checkpoint.reader import FLOATING, TORCH_DTYPES
from ..checkpoint.source import REPORT, Checkpoint, open_checkpoint
from ..checkpoint.writer import sha256
from ..errors import MissingExtraError, UsageError
from ..load import load
from ..models.device import chosen_precision, find_device
from ..progress import Progress, listener
from ..tasks.kinds import open_task
from ..tasks.request import TaskRequest, make_task
from ..tasks.rows import read_rows
from ..text.tokenizer import check_tokenizer
from .conversion import start_compressed, start_dense, trained_layers
from .experts import keep_apart, take_apart
from .inputs import input_moments
from .plan import plan_compressed, plan_dense, settle
from .pruner import Pruner
from .request import Finetuning, make_finetuning
from .teacher import find_teacher

if TYPE_CHECKING:
    from ..tasks.task import Features, Task


@dataclass(frozen=True)
class Training:
    """A run that is ready to begin: everything is checked, and the model is in the form in which it is trained.

    unseen: features of the validation data, None without any. steps: of the optimizer. dtype: in which the result is
    stored. fingerprint: what must be equal for a run to go on.
    """

    source: Checkpoint
    output: Path
    how: Finetuning
    task: Task
    model: Any
    tokenizer: Any
    teacher: nn.Module | None
    features: Features
    unseen: Features | None
    plan: Plan
    pruner: Pruner
    steps: int
    device: torch.device
    dtype: torch.dtype
    max_shard_size: str
    fingerprint: dict[str, Any]

    def score(self, model: Any, told: Progress) -> dict[str, float]:
        """Of the model on the validation data; {} without any."""
        if self.unseen is None:
            return {}
        heard = 0

        def hear(done: int, total: int) -> None:
            nonlocal heard
            told.advance("rows", done - heard)
            heard = done

        told.start("rows", len(self.unseen))
        return self.task.score(
            model, self.tokenizer, self.unseen, batch_size=self.how.eval_batch_size, device=self.device, on_batch=hear
        )


def prepare_finetuning(
    source: str | Path,
    output: Path | None = None,
    *,
    task: TaskRequest | Mapping[str, Any] | str,
    how: Finetuning | Mapping[str, Any] | None = None,
    recipe: Recipe | Mapping[str, Any] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    revision: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    max_shard_size: str = "5GB",
    progress: Progress | None = None,
) -> Training:
    """Data, model and plan of a fine-tuning of `source`, a folder or Hub id, dense or compressed.

    task, how, recipe: or mappings of their fields. recipe: what is left at last; sizes that it leaves open are taken
    from DEFAULTS for a dense model, and from what there is for a compressed one, whose pattern stays, too. UsageError
    on a request that cannot be met, SourceError and CheckpointError on what cannot be read, MissingExtraError without
    the packages that training needs.
    """
    import transformers

    _require_packages()
    told, task, how = listener(progress), make_task(task), make_finetuning(how)
    place = find_device(device)
    parse_size(max_shard_size)  # an error now, not after hours; transformers reads the text itself
    checkpoint = open_checkpoint(source, revision=revision, cache_dir=cache_dir)
    check_tokenizer(checkpoint.folder, checkpoint.address)
    output = output_path(output or f"{checkpoint.name.rpartition('/')[2]}-finetuned")
    # A result with a report may be that of this very run, which `run` finds out.
    check_output(output, overwrite=overwrite or (output / REPORT).is_file(), reads=[checkpoint.folder])
    checkpoint.require_floats()
    wanted = settle(recipe_of(read_recipe(recipe), {}) if isinstance(recipe, Mapping) else recipe, checkpoint)
    opened = open_task(task)
    told.phase("Reading the data")
    rows = read_rows(task, "train")
    validation = read_rows(task, "validation") if task.validation_file or task.dataset_name else None
    told.phase("Loading the model")
    transformers.set_seed(how.seed)  # a head that the checkpoint lacks is drawn at random
    options = {"trust_remote_code": True} if trust_remote_code else {}
    model, tokenizer = load(
        checkpoint.folder,
        model_class=opened.head(checkpoint.address, trained=False),
        dtype=torch.float32,
        need_tokenizer=True,
        **options,
        **_head(checkpoint, opened.config_changes(rows)),
    )
    opened.check_model(model)
    if how.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UsageError(f"{type(model).__name__} has no gradient checkpointing. Leave out --gradient-checkpointing.")
    for part in (rows, validation):
        if part is not None:
            opened.check(part, model.config)
    features = opened.prepare(rows, tokenizer, model, training=True)
    unseen = None if validation is None else opened.prepare(validation, tokenizer, model, training=False)
    opened.try_out(model, tokenizer, features if unseen is None else unseen)
    dtype = _stored_dtype(checkpoint)
    if checkpoint.is_compressed:
        plan = plan_compressed(model, wanted, dtype, how.pruning.threshold)
    else:
        apart = take_apart(model, checkpoint)
        plan = plan_dense(model, wanted, dtype)
        keep_apart(model, apart, [p.layer.name for p in plan.layers])
        del apart
    for sentence in plan.notes:
        told.warn(sentence)
    longest = max(len(item["input_ids"]) for part in (features, unseen) if part is not None for item in part.items)
    teacher, learned_from = find_teacher(checkpoint, model.config, how, opened, cache_dir, place, options, longest)
    told.phase("Taking the weights apart")
    if checkpoint.is_compressed:
        start_compressed(model, plan.layers, seed=how.seed)
    else:
        model.to(place)
        moments = None
        if how.low_rank_init == "outputs" and any(p.rank for p in plan.layers):
            names, collate = [p.layer.name for p in plan.layers], opened.collator(tokenizer, model)
            moments = input_moments(model, names, features.items, collate, seed=how.seed)
        start_dense(model, plan.layers, moments=moments, seed=how.seed, device=place)
    layers = trained_layers(model)
    steps = how.max_steps or _steps(how, len(features))
    pruned = [p for p in plan.layers if p.layer.name in layers]  # codes are not
    pruner = Pruner([layers[p.layer.name] for p in pruned], [p.nnz for p in pruned], how.pruning, steps)
    read = [len(part) for part in (features, unseen) if part is not None]
    fingerprint = _fingerprint(checkpoint, learned_from, task, read, how, plan, place)
    return Training(
        checkpoint, output, how, opened, model.to(place), tokenizer, teacher, features, unseen, plan, pruner, steps,
        place, dtype, max_shard_size, fingerprint,
    )  # fmt: skip


def _require_packages() -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise MissingExtraError("accelerate", "train", "Training")


def _head(checkpoint: Checkpoint, changes: dict[str, Any]) -> dict[str, Any]:
    """Of the changes to the config, those that the checkpoint does not settle itself, having a head already."""
    architecture = str((checkpoint.config.get("architectures") or [""])[0])
    if "num_labels" in changes and architecture.endswith("ForSequenceClassification"):
        labels = checkpoint.config.get("id2label") or {0: "", 1: ""}
        if len(labels) != changes["num_labels"]:
            raise UsageError(
                f"{checkpoint.address} classifies into {len(labels)} labels, and the training data has "
                f"{changes['num_labels']}. Give a model without a head, or data with the same labels."
            )
        # Else the model writes it into its config when it first sees labels: another one where a run goes on.
        return {} if checkpoint.config.get("problem_type") else {"problem_type": changes["problem_type"]}
    return changes


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """That of most of the checkpoint's floating-point elements."""
    counts: dict[str, int] = {}
    for entry in checkpoint.entries.values():
        if entry.dtype in FLOATING:
            counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.elements
    found = TORCH_DTYPES[max(counts, key=lambda dtype: counts[dtype])]
    return found if found.itemsize <= 4 else torch.float32


def _state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of a folder, all that decides what its model does."""
    beside = {"config": digest(checkpoint.config), "companions": companion_states(checkpoint)}
    return beside | {"weights": file_states(checkpoint)}


def _steps(how: Finetuning, examples: int) -> int:
    each = how.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    # Each epoch ends with a step, if need be of fewer passes.
    of_epoch = math.ceil(math.ceil(examples / each) / how.gradient_accumulation_steps)
    return max(1, math.ceil(of_epoch * how.epochs))


def _fingerprint(
    checkpoint: Checkpoint,
    teacher: Checkpoint | None,
    task: TaskRequest,
    rows: list[int],
    how: Finetuning,
    plan: Plan,
    device: torch.device,
) -> dict[str, Any]:
    """What must be equal for a run to go on; rows: how many there are of a dataset that may have changed."""
    files = {
        name: sha256(Path(file).expanduser())
        for name, file in (("train", task.train_file), ("validation", task.validation_file))
        if file is not None
    }
    return versions() | {
        "source": checkpoint.commit or _state(checkpoint),
        "teacher": teacher and (teacher.commit or _state(teacher)),
        "rows": rows,
        "task": asdict(task),
        "data": files,
        "training": how.to_dict(),
        "plan": [[p.layer.name, p.rank, p.nnz, p.pattern] for p in plan.layers],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "precision": chosen_precision(how.precision, device),
        "processes": os.environ.get("WORLD_SIZE", "1"),
        "threads": torch.get_num_threads(),
    }
