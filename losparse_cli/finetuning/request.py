"""Finetuning: how a model is trained, as asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import UsageError, flag, from_fields, paths_as_text
from .pruner import Pruning

OBJECTIVES = ("task", "distill")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
LOW_RANK_INITS = ("outputs", "weights")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class Finetuning:
    """What to train towards and how; UsageError for a value that is none.

    objective: task is the loss of the task, with labels; distill is the distance from a teacher alone. teacher: folder
    or Hub id of the dense model, None without one, or for that which the report of a compressed checkpoint names.
    low_rank_init: how U and V of a dense model begin: nearest to it in the outputs of its layers on training data, or
    in their weights, as in the paper. temperature: T of the softened logits. distill_weight: α of α T² KL(teacher ‖
    model). hidden_weight: of the mean squared distance of hidden states. max_steps: optimizer steps, in place of
    epochs. batch_size: examples of one forward pass on one device; times gradient_accumulation_steps and devices, those
    of a step. group_by_length: batches of like length, which saves padding. warmup_steps: in which the learning rate
    rises, a share of all steps below 1. save_steps: None for once an epoch.
    """

    objective: str = "task"
    low_rank_init: str = "outputs"
    teacher: str | None = None
    temperature: float = 2.0
    distill_weight: float = 1.0
    hidden_weight: float = 0.0
    epochs: float = 3.0
    max_steps: int | None = None
    learning_rate: float = 5e-5
    batch_size: int = 32
    eval_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    group_by_length: bool = False
    warmup_steps: float = 0.1
    lr_scheduler: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "auto"
    save_steps: int | None = None
    seed: int = 42
    pruning: Pruning = field(default_factory=Pruning)

    def __post_init__(self) -> None:
        paths_as_text(self, "teacher")
        _one_of("--objective", self.objective, OBJECTIVES)
        _one_of("--low-rank-init", self.low_rank_init, LOW_RANK_INITS)
        _one_of("--precision", self.precision, PRECISIONS)
        _one_of("--lr-scheduler", self.lr_scheduler, SCHEDULERS)
        for name in ("batch_size", "eval_batch_size", "gradient_accumulation_steps", "max_steps", "save_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{flag(name)} is a whole number >= 1, not {value}.")
        for name in ("epochs", "learning_rate", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{flag(name)} is a number above 0, not {getattr(self, name)}.")
        for name in ("distill_weight", "hidden_weight", "warmup_steps", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{flag(name)} is a number >= 0, not {getattr(self, name)}.")
        if self.objective == "distill" and not self.distill_weight and not self.hidden_weight:
            raise UsageError("--objective distill has nothing to learn from: give a --distill-weight above 0.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_finetuning(given: Finetuning | Mapping[str, Any] | None) -> Finetuning:
    """The settings that a mapping of fields means, of which `pruning` may be one; UsageError for what is none."""
    if isinstance(given, Mapping) and "pruning" in given:
        given = {**given, "pruning": from_fields(Pruning, given["pruning"], "pruning")}
    return from_fields(Finetuning, {} if given is None else given, "how")


def _one_of(option: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise UsageError(f"{option} is one of {', '.join(known)}, not {given!r}.")
