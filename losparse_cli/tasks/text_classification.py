"""Texts, or pairs of them, -> a class each, or a number each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from . import metrics
from .columns import columns_of, texts
from .heads import refusals
from .paired import RESAMPLES, over_resamples, over_rows
from .request import TaskRequest
from .rows import Rows
from .task import Collate, Features, Judged, Task, scoring
from .tokens import check_items, chunks, length_of, pad, settle_padding

LENGTH = 512  # tokens of an input, if nothing else is asked for and the model takes as many


class TextClassification(Task):
    """Classes are what the label column holds, names or whole numbers; labels with a fraction make it a regression.

    In a file without types (CSV) labels that read as numbers are numbers; 1.0 is whole. Scores: accuracy (the main
    one), f1, matthews; of a regression pearson (the main one), spearman.
    """

    name = "text-classification"

    def __init__(self, request: TaskRequest) -> None:
        super().__init__(request)
        self.main_score = "accuracy"

    @property
    def auto_class(self) -> Any:
        import transformers

        return transformers.AutoModelForSequenceClassification

    def config_changes(self, train: Rows) -> dict[str, Any]:
        """The classes in the order of their numbers, or of the alphabet; UsageError if there is only one."""
        column = self._label_column(train)
        values = _values(train, column)
        if any(isinstance(value, float) for value in values):
            self.main_score = "pearson"
            return {
                "num_labels": 1,
                "id2label": {0: "LABEL_0"},
                "label2id": {"LABEL_0": 0},
                "problem_type": "regression",
            }
        self.main_score = "accuracy"
        names = list(train.class_names.get(column, ())) or [str(v) for v in sorted(set(values), key=_by_kind)]
        if len(names) < 2:
            raise UsageError(
                f"All {len(values)} rows of {train.name} have the label {values[0]!r}. Give rows of two classes or "
                "more, or name another column with --label-column."
            )
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: k for k, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }

    def check(self, rows: Rows, config: Any) -> None:
        self._labels(rows, config)

    def prepare(self, rows: Rows, tokenizer: Any, model: Any, *, training: bool) -> Features:
        labels = self._labels(rows, model.config)
        columns = columns_of(self.request, rows.columns, rows.name)
        given = [
            list(texts(rows.rows, columns[field], field, rows.place))
            for field in ("text_column", "text_pair_column")
            if field in columns
        ]
        settle_padding(tokenizer, model.config)
        length = length_of(self.request.max_length, tokenizer, model, LENGTH)
        items: list[dict[str, Any]] = []
        for part in chunks(range(len(rows))):
            made = tokenizer(
                *(column[part[0] : part[-1] + 1] for column in given),
                truncation=True,
                max_length=length,
                return_attention_mask=True,
                verbose=False,
            )
            items += ({name: made[name][k] for name in made} for k in range(len(part)))
        for k, (item, label) in enumerate(zip(items, labels, strict=True)):
            if not item["input_ids"]:
                raise UsageError(f"{rows.place(k)} has no text. Leave the row out.")
            item["labels"] = label
        if model.config.is_encoder_decoder and _reads_the_end(model):
            _check_ends(items, rows, tokenizer, model.config)
        check_items(items, model)
        return Features(items, rows, list(range(len(items))))

    def collator(self, tokenizer: Any, model: Any) -> Collate:
        settle_padding(tokenizer, model.config)

        def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
            labels = torch.tensor([item["labels"] for item in items])
            return {**pad(tokenizer, model, items), "labels": labels}

        return collate

    def say(self, model: Any, tokenizer: Any, batch: dict[str, Tensor]) -> Iterable[Any]:
        """The logits of each row, (labels,), float32, on the CPU."""
        logits: Tensor = model(**batch).logits.float().cpu()
        return logits

    def gather(self, said: list[Any], tokenizer: Any, features: Features) -> Tensor:
        """(rows, labels)"""
        return torch.stack(said)

    def judge(self, predicted: Tensor, features: Features, *, resamples: int = RESAMPLES) -> Judged:
        labels = torch.tensor([item["labels"] for item in features.items])
        classes = predicted.argmax(-1)

        def of(rows: Tensor) -> dict[str, float]:
            if labels.is_floating_point():
                return metrics.regression(predicted[rows, 0], labels[rows])
            return metrics.classification(classes[rows], labels[rows], predicted.shape[-1])

        scores = {} if labels.is_floating_point() else {"accuracy": over_rows(classes == labels)}
        scores |= over_resamples(of, len(labels), seed=self.request.seed, count=resamples)
        return Judged(scores, "rows", len(labels), labels)

    def _label_column(self, rows: Rows) -> str:
        return columns_of(self.request, rows.columns, rows.name)["label_column"]

    def _labels(self, rows: Rows, config: Any) -> list[int] | list[float]:
        """Of every row the model's number of its class, or the number itself for a regression."""
        if config.problem_type == "multi_label_classification":
            raise UsageError("The model gives a text several classes at once, and the task gives it one. Give another.")
        column = self._label_column(rows)
        values = _values(rows, column)
        regression = config.num_labels == 1 or config.problem_type == "regression"
        self.main_score = "pearson" if regression else "accuracy"
        if not regression:
            names = rows.class_names.get(column)
            return [_class(value, config, names, rows, k) for k, value in enumerate(values)]
        for k, value in enumerate(values):
            if isinstance(value, str):
                raise UsageError(
                    f"{rows.place(k)} has the label {value!r}, and the model's only output is a number. Give labels "
                    "that are numbers, or another model."
                )
        return [float(value) for value in values]


def _reads_the_end(model: Any) -> bool:
    """Whether it classifies a text by its end token, as most encoder-decoders do, and refuses one without."""
    other = next(k for k in range(1, 4) if k not in (model.config.eos_token_id, model.config.pad_token_id))
    ids = torch.full((1, 2), other, device=model.device)
    try:
        with scoring(model), refusals(model):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except UsageError:
        return True
    return False


def _check_ends(items: list[dict[str, Any]], rows: Rows, tokenizer: Any, config: Any) -> None:
    """UsageError, naming the row, unless every text has an end token, and all have as many."""
    end = config.eos_token_id
    name = "which its config.json does not name" if end is None else tokenizer.convert_ids_to_tokens(end)
    usual = max(1, items[0]["input_ids"].count(end))  # of a pair there may be three
    for k, item in enumerate(items):
        count = item["input_ids"].count(end)
        if count != usual:
            raise UsageError(
                f"A {config.model_type} model classifies by the end token of a text ({name}), and {rows.place(k)} has "
                f"{count} of it, not {usual}. Give a tokenizer that closes every text with it, and texts without it."
            )


def _by_kind(value: int | float | str) -> tuple[bool, int | float | str]:
    return isinstance(value, str), value


def _values(rows: Rows, column: str) -> list[int | float | str]:
    """The labels as numbers if all of them are; UsageError, naming the row, for one that is neither that nor text."""
    found: list[int | float | str] = []
    for k, row in enumerate(rows.rows):
        value = row[column]
        if isinstance(value, bool):
            value = int(value)
        number = isinstance(value, int | float) and math.isfinite(value)
        if not number and not (isinstance(value, str) and value.strip()):
            raise UsageError(
                f"{rows.place(k)} has no label in {column!r}, but {value!r}. Leave the row out, or name another "
                "column with --label-column."
            )
        found.append(value)
    if all(isinstance(value, str) for value in found):
        try:
            return [int(value) for value in found]
        except ValueError:
            pass
        try:
            numbers = [float(value) for value in found]
        except ValueError:
            return found
        for k, known in enumerate(numbers):
            if not math.isfinite(known):
                raise UsageError(
                    f"{rows.place(k)} has the label {found[k]!r} among numbers in {column!r}. Leave the row out, or "
                    "give its number."
                )
        found = [*numbers]
    if all(isinstance(value, float) and value.is_integer() for value in found):
        return [int(value) for value in found]  # as what was read with gaps is often written
    return found


def _class(value: int | float | str, config: Any, names: tuple[str, ...] | None, rows: Rows, k: int) -> int:
    """By its name, where model and rows have names in common (in whatever order), else by its number."""
    known = {str(name): int(number) for number, name in config.id2label.items()}
    folded = {name.lower(): number for name, number in known.items()}
    number = value if isinstance(value, int) else None
    if number is not None and names is not None and 0 <= number < len(names):
        if all(name.lower() in folded for name in names):
            return folded[names[number].lower()]
    elif str(value) in known or str(value).lower() in folded:
        return known.get(str(value), folded.get(str(value).lower(), 0))
    numbered = not any(name.lstrip("-").isdigit() for name in known)  # else numbers are names, and this is none
    if number is not None and numbered and 0 <= number < config.num_labels:
        return number
    shown = ", ".join([*known][:10]) + (", ..." if len(known) > 10 else "")
    raise UsageError(
        f"{rows.place(k)} has the label {value!r}, and the model knows {config.num_labels} classes: {shown}. Correct "
        "the row, or give a model for these labels."
    )
