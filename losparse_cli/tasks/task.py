"""A task, its rows made into what a model reads, and the batches in which a model is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..parallel.group import Alone, Ranks
from .heads import Head, refusals
from .paired import RESAMPLES, Sampled
from .request import TaskRequest
from .round import hand_round
from .rows import Rows
from .tokens import LABELS

Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]
OnBatch = Callable[[int, int], None]
"""(items done, items in all)"""


@dataclass(frozen=True)
class Features(Dataset[dict[str, Any]]):
    """What a model reads of some rows; a torch Dataset of `items`.

    items: name -> value, inputs and labels of the model and nothing else. where: the row of every item.
    offsets: of question answering when scoring, for every item the first and last character of each token in the
    context, (tokens, 2), int32, -1 for tokens that are not of the context.
    """

    items: list[dict[str, Any]]
    rows: Rows
    where: list[int]
    offsets: tuple[np.ndarray[Any, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


@dataclass(frozen=True)
class Judged:
    """scores: by name, the task's main one first. unit, units: what they are means over, and how many there are.

    truth: what the rows ask of the model, which another must be asked, too, to be compared; None if the rows alone
    decide on it.
    """

    scores: dict[str, Sampled]
    unit: str
    units: int
    truth: Tensor | None = None


class Task(ABC):
    """How rows become features, and how a model is scored on them.

    main_score: the key of its scores by which models are compared. larger_is_better: so it is with that one.
    Where the rows decide on them (text-classification), both hold once config_changes, check or prepare has seen some.
    """

    name: str
    main_score: str
    larger_is_better: bool = True
    scored_by: str | None = "torchmetrics"
    """The module, beside torch, that computes its scores."""

    def __init__(self, request: TaskRequest) -> None:
        self.request = request

    @property
    @abstractmethod
    def auto_class(self) -> Any:
        """The Auto class of transformers that has the head for it."""

    def head(self, address: str, *, trained: bool) -> Head:
        """The class of the model at `address`, for `load`; trained: its head must lie there."""
        return Head(self.auto_class, self.name, address, trained)

    def config_changes(self, train: Rows) -> dict[str, Any]:
        """What AutoConfig.from_pretrained is to be given, so that the head fits the rows."""
        return {}

    @abstractmethod
    def check(self, rows: Rows, config: Any) -> None:
        """UsageError, naming the row, if a model of this config cannot be trained or scored on the rows."""

    def check_model(self, model: Any) -> None:
        """UsageError if this model, loaded, cannot do the task for a reason that its config does not tell."""
        return  # most have none

    @abstractmethod
    def prepare(self, rows: Rows, tokenizer: Any, model: Any, *, training: bool) -> Features:
        """The rows as the model reads them, cut to what it takes.

        May give the tokenizer a padding token and the model's config its id. UsageError, naming the row, for a value of
        the wrong kind, and for a --max-length that the model does not take.
        """

    @abstractmethod
    def collator(self, tokenizer: Any, model: Any) -> Collate:
        """Items -> a batch, padded to its longest, on the CPU."""

    @abstractmethod
    def say(self, model: Any, tokenizer: Any, batch: dict[str, Tensor]) -> Iterable[Any]:
        """What the model says of each item of a batch without labels; it is within `scoring`."""

    def gather(self, said: list[Any], tokenizer: Any, features: Features) -> Any:
        """What the model says of the rows, from what it says of every item."""
        return said

    @abstractmethod
    def judge(self, predicted: Any, features: Features, *, resamples: int = RESAMPLES) -> Judged:
        """Scores of what `predict` returned; shares and correlations as fractions of 1.

        A score that belongs to no single row varies as on `resamples` of the rows, drawn by the request's seed; with 0
        of them it is its value alone. MissingExtraError without the packages that compute them.
        """

    def predict(
        self, model: Any, tokenizer: Any, features: Features, *, batch_size: int, device: torch.device,
        on_batch: OnBatch | None = None, group: Ranks | None = None,
    ) -> Any:  # fmt: skip
        """What the model, on `device`, says of the rows; it stays in its mode. `on_batch` is told how far it is.

        group: ranks that share the batches out, None for one process alone.
        """
        group = group or Alone()
        mine: dict[int, Any] = {}
        # The longest first: if memory runs out it does so at once. Items of like length together save padding, too.
        order = sorted(range(len(features)), key=lambda k: -len(features[k]["input_ids"]))
        with scoring(model), refusals(model):
            collate = self.collator(tokenizer, model)
            for start in range(group.rank * batch_size, len(order), group.size * batch_size):
                indices = order[start : start + batch_size]
                batch = _on(device, collate([features[k] for k in indices]))
                mine |= dict(zip(indices, self.say(model, tokenizer, _without_labels(batch)), strict=True))
                if on_batch is not None:
                    on_batch(start + len(indices), len(order))
        said = hand_round(group, mine)
        return self.gather([said[k] for k in range(len(features))], tokenizer, features)

    def try_out(self, model: Any, tokenizer: Any, features: Features) -> None:
        """UsageError, before hours are spent, if the model refuses the shortest item, with what is right or without."""
        shortest = min(features.items, key=lambda item: len(item["input_ids"]))
        with scoring(model), refusals(model):
            batch = _on(next(model.parameters()).device, self.collator(tokenizer, model)([shortest]))
            model(**batch)
            list(self.say(model, tokenizer, _without_labels(batch)))

    def score(self, model: Any, tokenizer: Any, features: Features, **how: Any) -> dict[str, float]:
        """Scores by name, as `judge` has them; `how` as in `predict`."""
        judged = self.judge(self.predict(model, tokenizer, features, **how), features, resamples=0)
        return {name: score.value for name, score in judged.scores.items()}


def _on(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name not in LABELS}


@contextmanager
def scoring(model: Any) -> Iterator[None]:
    """The model in evaluation mode, and nothing differentiated; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training
