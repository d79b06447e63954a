"""Which column is what: as asked for, or by the names that transformers' example scripts know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import UsageError, flag
from ..text.rows import text_of
from .request import TaskRequest

_PAIRS = (("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("question", "sentence"))
_TEXTS = ("sentence", "text")
_LABELS = ("label", "labels")
_SUMMARIES = (
    ("document", "summary"), ("article", "highlights"), ("dialogue", "summary"), ("article", "summary"),
    ("text", "summary"), ("text", "target"), ("source", "target"), ("input", "output"),
)  # fmt: skip


def columns_of(request: TaskRequest, there: Sequence[str], name: str) -> dict[str, str]:
    """Field of the request -> column, for every column that the task reads.

    A text without its pair, or a classification of single texts, has no `text_pair_column`. UsageError naming the
    option if a column is not `there`, or if none has a usual name; `name` is of the rows, for the message.
    """

    def one(field: str, usual: Sequence[str]) -> str:
        asked = getattr(request, field)
        found = [column for column in ([asked] if asked else usual) if column in there]
        if not found:
            wanted = f"no column {asked!r}" if asked else f"no column {' or '.join(usual)}"
            raise UsageError(f"{name} has {wanted}, but {', '.join(there)}. Name one with {flag(field)}.")
        return found[0]

    if request.task == "question-answering":
        usual = {"question_column": "question", "context_column": "context", "answers_column": "answers"}
        return {field: one(field, [column]) for field, column in usual.items()}
    if request.task == "causal-lm":
        return {"text_column": one("text_column", ["text"])}
    if request.task == "text-classification":
        pair = next((pair for pair in _PAIRS if set(pair) <= set(there)), None)
        if request.text_column or pair is None:
            texts = {"text_column": one("text_column", _TEXTS)}
            if request.text_pair_column:
                texts["text_pair_column"] = one("text_pair_column", ())
        else:
            texts = dict(zip(("text_column", "text_pair_column"), pair, strict=True))
        return {**texts, "label_column": one("label_column", _LABELS)}
    asked = (request.text_column, request.summary_column)
    fits = [
        pair for pair in _SUMMARIES
        if set(pair) <= set(there) and all(a is None or a == b for a, b in zip(asked, pair, strict=True))
    ]  # fmt: skip
    if fits and None in asked:
        return dict(zip(("text_column", "summary_column"), fits[0], strict=True))
    return {
        "text_column": one("text_column", list(dict.fromkeys(text for text, _ in _SUMMARIES))),
        "summary_column": one("summary_column", list(dict.fromkeys(summary for _, summary in _SUMMARIES))),
    }


def texts(rows: Sequence[dict[str, Any]], column: str, field: str, place: Callable[[int], str]) -> Iterator[str]:
    """The texts of a column, one a row; no text (null) is an empty one. UsageError for any other value."""
    for k, row in enumerate(rows):
        yield text_of(row, column, flag(field), place(k))
