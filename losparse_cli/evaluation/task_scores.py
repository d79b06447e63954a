"""What a model predicts for the rows of a task -> its scores, each with how it varies with the rows.

A score that is a mean over rows varies as they do. F1 of classes and correlations belong to no single row: how they
vary is seen on resamples of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tasks import metrics
from ..tasks.causal_lm import CausalLM
from ..tasks.question_answering import QuestionAnswering
from ..tasks.seq2seq import Seq2Seq
from ..tasks.task import Features, Progress, Task
from ..tasks.text_classification import TextClassification
from .paired import Sampled, exponential_of_mean, over_resamples, over_rows


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


def judge(
    task: Task, model: Any, tokenizer: Any, features: Features, *, batch_size: int, device: torch.device, seed: int,
    on_batch: Progress | None = None,
) -> Judged:  # fmt: skip
    """The scores that `task.score` has, of a model on `device`; `seed` is that of resamples."""
    how: dict[str, Any] = {"batch_size": batch_size, "device": device, "on_batch": on_batch}
    rows = len(features.rows)
    if isinstance(task, TextClassification):
        logits, truth = task.predict(model, tokenizer, features, **how), task.labels(features)
        found = _numbers(logits[:, 0], truth, seed) if truth.is_floating_point() else _classes(logits, truth, seed)
        return Judged(_first(found, task.main_score), "rows", rows, truth)
    if isinstance(task, QuestionAnswering):
        answers = [[text for text, _ in pairs] for pairs in task.answers(features.rows)]
        found = _each(metrics.squad, task.predict(model, tokenizer, features, **how), answers)
        return Judged(_first(found, task.main_score), "rows", rows)
    if isinstance(task, Seq2Seq):
        written, targets = task.predict(model, tokenizer, features, **how), task.targets(features.rows)
        found = _each(metrics.rouge, written, targets)
        if task.name == "seq2seq":
            same = [text.strip() == target.strip() for text, target in zip(written, targets, strict=True)]
            found["exact_match"] = over_rows(torch.tensor(same))
        return Judged(_first(found, task.main_score), "rows", rows)
    assert isinstance(task, CausalLM), task
    losses = task.predict(model, tokenizer, features, **how)
    found = {"loss": over_rows(losses), "perplexity": exponential_of_mean(losses)}
    read = torch.stack([item["input_ids"] for item in features.items])
    return Judged(_first(found, task.main_score), "windows", len(features), read)


def _classes(logits: Tensor, labels: Tensor, seed: int) -> dict[str, Sampled]:
    predicted, classes = logits.argmax(-1), logits.shape[-1]
    found = over_resamples(
        lambda rows: metrics.classification(predicted[rows], labels[rows], classes), len(labels), seed=seed
    )
    return found | {"accuracy": over_rows(predicted == labels)}


def _numbers(predicted: Tensor, labels: Tensor, seed: int) -> dict[str, Sampled]:
    return over_resamples(lambda rows: metrics.regression(predicted[rows], labels[rows]), len(labels), seed=seed)


def _each(
    score: Callable[[Sequence[Any], Sequence[Any]], dict[str, float]], predicted: Sequence[Any], right: Sequence[Any]
) -> dict[str, Sampled]:
    """A score that is a mean over rows, of one row at a time."""
    found = [score([text], [answer]) for text, answer in zip(predicted, right, strict=True)]
    return {name: over_rows(torch.tensor([one[name] for one in found], dtype=torch.float64)) for name in found[0]}


def _first(scores: dict[str, Sampled], main: str) -> dict[str, Sampled]:
    return {main: scores[main]} | scores
