"""Scores of a task with their errors: by hand where a row can be judged alone, else on resamples."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import character_tokenizer, toy_model

from losparse_cli.tasks import metrics
from losparse_cli.tasks.kinds import open_task
from losparse_cli.tasks.paired import RESAMPLES
from losparse_cli.tasks.task import Judged
from tests.tasks.made import CPU, Says, encoder_tokenizer, request_of, rows_of


def judged(task: Any, model: Any, tokenizer: Any, rows: Any) -> tuple[Judged, dict[str, float]]:
    """The scores with how they vary, and without."""
    features = task.prepare(rows, tokenizer, model, training=False)
    how = {"batch_size": 2, "device": CPU}
    return task.judge(task.predict(model, tokenizer, features, **how), features), task.score(
        model, tokenizer, features, **how
    )


def agree(found: Judged, scores: dict[str, float]) -> None:
    assert found.scores.keys() == scores.keys()
    for name, score in found.scores.items():
        assert score.value == scores[name], name


def by_length(classes: int) -> Says:
    """The class is the number of characters, less one."""

    def say(ids: Any, mask: Any) -> Any:
        logits = torch.nn.functional.one_hot(mask.sum(1) - 3, classes).float()
        return SimpleNamespace(logits=logits)

    return Says(say, num_labels=classes)


def test_accuracy_by_row_and_f1_by_resamples() -> None:
    rows = rows_of(*({"text": "ab"[: 1 + k % 2], "label": int(k % 2 if k < 6 else 0)} for k in range(8)))
    task = open_task(request_of("text-classification", seed=0))
    found, scores = judged(task, by_length(2), encoder_tokenizer(), rows)
    agree(found, scores)
    assert next(iter(found.scores)) == "accuracy"
    assert {name for name, score in found.scores.items() if score.by_row} == {"accuracy"}
    right = torch.tensor([1.0] * 7 + [0.0])
    assert found.scores["accuracy"].draws.tolist() == right.tolist()
    assert found.scores["accuracy"].estimate().error == pytest.approx(float(right.std()) / math.sqrt(8))
    # The resamples, drawn again here: F1 of each by its definition, 2 TP / (2 TP + FP + FN).
    predicted, labels = torch.tensor([0, 1] * 4), torch.tensor([0, 1] * 3 + [0, 0])
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(RESAMPLES):
        drawn = torch.randint(8, (8,), generator=generator)
        p, y = predicted[drawn], labels[drawn]
        hits, misses = int((p & y).sum()), int((p ^ y).sum())
        values.append(2 * hits / (2 * hits + misses) if hits + misses else 0.0)
    assert found.scores["f1"].estimate().error == pytest.approx(float(torch.tensor(values).std()), abs=1e-6)
    assert found.truth is not None
    assert (found.unit, found.units, found.truth.tolist()) == ("rows", 8, labels.tolist())


def test_a_regression_has_correlations_by_resamples() -> None:
    model = Says(lambda ids, mask: SimpleNamespace(logits=mask.sum(1, keepdim=True) ** 2.0), num_labels=1)
    rows = rows_of(*({"text": "a" * k, "label": float((7 * k) % 5)} for k in range(1, 12)))
    found, scores = judged(open_task(request_of("text-classification")), model, encoder_tokenizer(), rows)
    agree(found, scores)
    assert list(found.scores) == ["pearson", "spearman"]
    assert all(not score.by_row and score.draws.numel() == RESAMPLES for score in found.scores.values())
    assert found.truth is not None
    assert found.truth.dtype == torch.float32


def test_answers_are_judged_by_row() -> None:
    def say(ids: Any, mask: Any) -> Any:
        """The first three characters of the context, which begins after the first separator."""
        first = (ids == 2).int().argmax(1) + 1
        start = torch.nn.functional.one_hot(first, ids.shape[1]).float()
        return SimpleNamespace(start_logits=10 * start, end_logits=10 * start.roll(2, 1))

    rows = rows_of(
        {"question": "q", "context": "abc def", "answers": {"text": ["abc"], "answer_start": [0]}},
        {"question": "q", "context": "abc def", "answers": {"text": ["abc def"], "answer_start": [0]}},
        {"question": "q", "context": "abc def", "answers": {"text": ["def"], "answer_start": [4]}},
    )
    found, scores = judged(open_task(request_of("question-answering")), Says(say), encoder_tokenizer(), rows)
    agree(found, scores)
    assert list(found.scores) == ["f1", "exact_match"]
    assert found.scores["exact_match"].draws.tolist() == [1, 0, 0]
    assert found.scores["f1"].draws.tolist() == pytest.approx([1, 2 / 3, 0])
    assert found.scores["exact_match"].estimate().error == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["summarization", "seq2seq"])
def test_texts_are_judged_by_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = open_task(request_of(name))
    written = ["the cat", "a dog ran", " home "]
    monkeypatch.setattr(type(task), "predict", lambda *arguments, **options: written)
    rows = rows_of(*({"text": "t", "summary": text} for text in ("the cat sat", "a dog", "home")))
    found, scores = judged(task, toy_model("t5"), character_tokenizer(), rows)
    agree(found, scores)
    assert next(iter(found.scores)) == "rougeL"
    assert found.scores["rouge1"].draws.tolist() == pytest.approx([0.8, 0.8, 1])
    assert found.scores["rouge2"].draws.tolist() == pytest.approx([2 / 3, 2 / 3, 0])
    if name == "seq2seq":
        assert found.scores["exact_match"].draws.tolist() == [0, 0, 1]


def test_documents_are_judged_by_window() -> None:
    rows = rows_of({"text": "It was a bright cold day in April" * 3}, {"text": "and the clocks were striking"})
    found, scores = judged(
        open_task(request_of("causal-lm", max_length=16)), toy_model("llama"), character_tokenizer(), rows
    )
    agree(found, scores)
    loss, perplexity = found.scores["loss"].estimate(), found.scores["perplexity"].estimate()
    assert loss.error is not None
    assert perplexity.error == pytest.approx(perplexity.value * loss.error)
    assert (found.unit, found.units) == ("windows", found.scores["loss"].draws.numel())
    assert found.units == (1 + 99 + 1 + 28) // 16


def test_where_only_values_are_asked_for_nothing_is_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    classification = metrics.classification
    monkeypatch.setattr(metrics, "classification", lambda *given: asked.append(given) or classification(*given))
    rows = rows_of(*({"text": "ab"[: 1 + k % 2], "label": k % 2} for k in range(4)))
    task, model, tokenizer = open_task(request_of("text-classification")), by_length(2), encoder_tokenizer()
    features = task.prepare(rows, tokenizer, model, training=False)
    assert task.score(model, tokenizer, features, batch_size=2, device=CPU)["f1"] == 1
    assert len(asked) == 1
