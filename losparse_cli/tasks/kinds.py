"""The kinds of tasks by name."""

from __future__ import annotations

from .causal_lm import CausalLM
from .metrics import check_installed
from .question_answering import QuestionAnswering
from .request import TaskRequest
from .seq2seq import Seq2Seq
from .task import Task
from .text_classification import TextClassification

KINDS: dict[str, type[Task]] = {
    "text-classification": TextClassification,
    "question-answering": QuestionAnswering,
    "summarization": Seq2Seq,
    "seq2seq": Seq2Seq,
    "causal-lm": CausalLM,
}


def open_task(request: TaskRequest) -> Task:
    """The task that was asked for; MissingExtraError without the package that computes its scores."""
    kind = KINDS[request.task]
    if kind.scored_by is not None:
        check_installed(kind.scored_by)
    return kind(request)
