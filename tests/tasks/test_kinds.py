"""Tasks by name."""

from __future__ import annotations

import sys

import pytest
import transformers

from losparse_cli.errors import MissingExtraError
from losparse_cli.tasks.kinds import KINDS, open_task
from losparse_cli.tasks.request import TASKS
from tests.tasks.made import request_of


def test_there_is_a_kind_for_every_task() -> None:
    assert tuple(KINDS) == TASKS


@pytest.mark.parametrize(
    ("task", "auto", "main", "larger"),
    [
        ("text-classification", "AutoModelForSequenceClassification", "accuracy", True),
        ("question-answering", "AutoModelForQuestionAnswering", "f1", True),
        ("summarization", "AutoModelForSeq2SeqLM", "rougeL", True),
        ("seq2seq", "AutoModelForSeq2SeqLM", "rougeL", True),
        ("causal-lm", "AutoModelForCausalLM", "perplexity", False),
    ],
)
def test_a_task_names_its_class_and_its_score(task: str, auto: str, main: str, larger: bool) -> None:
    opened = open_task(request_of(task))
    assert opened.auto_class is getattr(transformers, auto)
    assert (opened.name, opened.main_score, opened.larger_is_better) == (task, main, larger)


@pytest.mark.parametrize("task", TASKS)
def test_a_missing_package_is_said_at_once(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    if task == "causal-lm":
        assert open_task(request_of(task)).name == task
        return
    with pytest.raises(MissingExtraError, match=r"needs the package '\S+'\. Install it with: pip install 'losparse\["):
        open_task(request_of(task))
