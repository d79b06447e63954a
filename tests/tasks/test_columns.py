"""Which column is what, by name or by guess, and what is said of one that is not there."""

from __future__ import annotations

from typing import Any

import pytest

from losparse_cli.errors import UsageError
from losparse_cli.tasks.columns import columns_of, texts
from tests.tasks.made import request_of, rows_of

CLASSES = "text-classification"


@pytest.mark.parametrize(
    ("task", "there", "found"),
    [
        (CLASSES, "idx sentence1 sentence2 label", "sentence1 sentence2 label"),
        (CLASSES, "hypothesis label premise", "premise hypothesis label"),
        (CLASSES, "question sentence label", "question sentence label"),
        (CLASSES, "question1 question2 label", "question1 question2 label"),
        (CLASSES, "sentence label", "sentence label"),
        (CLASSES, "label text", "text label"),
        ("question-answering", "id title context question answers", "question context answers"),
        ("summarization", "id summary document", "document summary"),
        ("summarization", "article highlights", "article highlights"),
        ("summarization", "dialogue summary", "dialogue summary"),
        ("seq2seq", "source target", "source target"),
        ("causal-lm", "text meta", "text"),
    ],
)
def test_usual_names_are_guessed(task: str, there: str, found: str) -> None:
    assert " ".join(columns_of(request_of(task), there.split(), "a").values()) == found


@pytest.mark.parametrize(
    ("task", "options", "there", "found"),
    [
        (
            CLASSES,
            {"text_column": "sentence2"},
            "sentence1 sentence2 label",
            {"text_column": "sentence2", "label_column": "label"},
        ),
        (
            CLASSES,
            {"text_column": "a", "text_pair_column": "b", "label_column": "c"},
            "c b a text label",
            {"text_column": "a", "text_pair_column": "b", "label_column": "c"},
        ),
        (
            "summarization",
            {"text_column": "article"},
            "document article summary",
            {"text_column": "article", "summary_column": "summary"},
        ),
        (
            "seq2seq",
            {"text_column": "en", "summary_column": "de"},
            "en de text",
            {"text_column": "en", "summary_column": "de"},
        ),
    ],
)
def test_names_that_were_given_come_first(task: str, options: Any, there: str, found: Any) -> None:
    assert columns_of(request_of(task, **options), there.split(), "a") == found


@pytest.mark.parametrize(
    ("task", "options", "sentence"),
    [
        (CLASSES, {}, "a.csv has no column sentence or text, but u, v. Name one with --text-column."),
        (CLASSES, {"text_column": "u"}, "a.csv has no column label or labels, but u, v. Name one with --label-column."),
        (CLASSES, {"text_column": "w"}, "a.csv has no column 'w', but u, v. Name one with --text-column."),
        (
            CLASSES,
            {"text_column": "u", "text_pair_column": "w"},
            "a.csv has no column 'w', but u, v. Name one with --text-pair-column.",
        ),
        (
            "question-answering",
            {"question_column": "u"},
            "a.csv has no column context, but u, v. Name one with --context-column.",
        ),
        (
            "summarization",
            {"text_column": "u", "summary_column": "w"},
            "a.csv has no column 'w', but u, v. Name one with --summary-column.",
        ),
        ("causal-lm", {}, "a.csv has no column text, but u, v. Name one with --text-column."),
    ],
)
def test_a_missing_column_is_named_with_those_there_are(task: str, options: Any, sentence: str) -> None:
    with pytest.raises(UsageError) as raised:
        columns_of(request_of(task, **options), ["u", "v"], "a.csv")
    assert str(raised.value) == sentence


def test_a_text_is_text_or_nothing() -> None:
    rows = rows_of({"text": "a"}, {"text": None}, {"text": 3})
    found = texts(rows.rows, "text", "text_column", rows.place)
    assert [next(found), next(found)] == ["a", ""]
    with pytest.raises(UsageError) as raised:
        next(found)
    assert str(raised.value) == (
        "The column 'text' of rows.jsonl, row 3 holds a number, not text. Name a column of text with --text-column."
    )
