"""What task was asked for, on which rows; nothing is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError, flag, from_fields, paths_as_text
from ..text.rows import ROW_SUFFIXES
from ..text.tokenizer import SHORTEST

TASKS = ("text-classification", "question-answering", "summarization", "seq2seq", "causal-lm")

_SEQ2SEQ = ("summarization", "seq2seq")
_USED_BY: dict[str, tuple[str, ...]] = {
    "text_column": ("text-classification", *_SEQ2SEQ, "causal-lm"),
    "text_pair_column": ("text-classification",),
    "label_column": ("text-classification",),
    "question_column": ("question-answering",),
    "context_column": ("question-answering",),
    "answers_column": ("question-answering",),
    "summary_column": _SEQ2SEQ,
    "source_prefix": _SEQ2SEQ,
}
_LEAST = {
    "max_length": SHORTEST,
    "max_target_length": 1,
    "doc_stride": 0,
    "n_best": 1,
    "max_answer_length": 1,
    "num_beams": 1,
    "max_train_samples": 1,
    "max_validation_samples": 1,
}


@dataclass(frozen=True)
class TaskRequest:
    """A task and its rows; UsageError for what contradicts itself, naming the option.

    task: one of TASKS. train_file, validation_file: rows, one of ROW_SUFFIXES, for causal-lm .txt too; or else
    dataset_name with dataset_config_name, of the Hub, and its splits. Columns: None for the usual names (see
    columns.py); summary_column holds what summarization and seq2seq are to write.

    max_length: tokens of an input, None for the task's default. max_target_length: tokens of what is written.
    doc_stride: tokens that two windows of a context share. n_best: starts and ends of answers that are combined.
    max_answer_length: tokens of an answer. num_beams: of the search by which text is written. source_prefix: put before
    every text of summarization and seq2seq. max_train_samples, max_validation_samples: rows drawn by `seed`, None for
    all.
    """

    task: str
    train_file: str | None = None
    validation_file: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    question_column: str | None = None
    context_column: str | None = None
    answers_column: str | None = None
    summary_column: str | None = None
    max_length: int | None = None
    max_target_length: int = 128
    doc_stride: int = 128
    n_best: int = 20
    max_answer_length: int = 30
    num_beams: int = 4
    source_prefix: str = ""
    max_train_samples: int | None = None
    max_validation_samples: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        paths_as_text(self, "train_file", "validation_file")
        if self.task not in TASKS:
            raise UsageError(f"--task is one of {', '.join(TASKS)}, not {self.task!r}.")
        self._check_source()
        for name, users in _USED_BY.items():
            if getattr(self, name) and self.task not in users:
                raise UsageError(f"{flag(name)} is of {' and '.join(users)}, not of {self.task}. Leave it out.")
        if self.text_pair_column and not self.text_column:
            raise UsageError("--text-pair-column names a second text without a first. Name that with --text-column.")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{flag(name)} is a whole number >= {least}, not {value}.")

    def _check_source(self) -> None:
        files = {"--train-file": self.train_file, "--validation-file": self.validation_file}
        given = [option for option, file in files.items() if file]
        if self.dataset_name and given:
            raise UsageError(f"{given[0]} and --dataset-name both say where the rows come from. Give one of them.")
        if not self.dataset_name and not given:
            raise UsageError(
                "There are no rows to read. Give --train-file or --validation-file, or --dataset-name for a dataset of "
                "the Hub."
            )
        if self.dataset_config_name and not self.dataset_name:
            raise UsageError("--dataset-config-name is of a dataset of the Hub. Add --dataset-name, or leave it out.")
        known = (*ROW_SUFFIXES, ".txt") if self.task == "causal-lm" else ROW_SUFFIXES
        for option, file in files.items():
            if file and Path(file).suffix.lower() not in known:
                raise UsageError(
                    f"{option} {file} is of no kind that {self.task} reads. Give one of {', '.join(known)}."
                )


def make_task(given: TaskRequest | Mapping[str, Any] | str) -> TaskRequest:
    """The request that a mapping of its fields means, or a task's name; UsageError for what is none of these."""
    return from_fields(TaskRequest, {"task": given} if isinstance(given, str) else given, "task")
