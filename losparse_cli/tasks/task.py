"""A task, its rows made into what a model reads, and the batches in which a model is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .metrics import check_installed
from .request import TaskRequest
from .rows import Rows

Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]
Progress = Callable[[int, int], None]
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


class Task(ABC):
    """How rows become features, and how a model is scored on them.

    main_score: the key of what `score` returns by which models are compared. larger_is_better: so it is with that one.
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
    def score(
        self, model: Any, tokenizer: Any, features: Features, *, batch_size: int, device: torch.device,
        on_batch: Progress | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Scores by name, shares and correlations as fractions of 1. The model is on `device`, and stays in its mode.

        `on_batch` is told (items done, items in all). MissingExtraError without the packages that compute them.
        """


def open_task(request: TaskRequest) -> Task:
    """The task that was asked for; MissingExtraError without the package that computes its scores."""
    from .causal_lm import CausalLM
    from .question_answering import QuestionAnswering
    from .seq2seq import Seq2Seq
    from .text_classification import TextClassification

    kinds: dict[str, type[Task]] = {
        "text-classification": TextClassification,
        "question-answering": QuestionAnswering,
        "summarization": Seq2Seq,
        "seq2seq": Seq2Seq,
        "causal-lm": CausalLM,
    }
    kind = kinds[request.task]
    if kind.scored_by is not None:
        check_installed(kind.scored_by)
    return kind(request)


def passes(
    task: Task, model: Any, tokenizer: Any, features: Features, *, batch_size: int, device: torch.device,
    on_batch: Progress | None, without: Sequence[str],
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:  # fmt: skip
    """(indices of items, their batch on `device`), items of like length together, the longest first.

    `without`: names that are left out. To be run within `scoring`.
    """
    collate = task.collator(tokenizer, model)
    # The longest first: if memory runs out it does so at once. It saves padding, too.
    order = sorted(range(len(features)), key=lambda k: -len(features[k]["input_ids"]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = collate([features[k] for k in indices])
        yield indices, {name: tensor.to(device) for name, tensor in batch.items() if name not in without}
        if on_batch is not None:
            on_batch(start + len(indices), len(order))


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
