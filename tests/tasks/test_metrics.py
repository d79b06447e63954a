"""Scores against values worked out by hand, without a network and with packages missing."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from losparse_cli.errors import MissingExtraError
from losparse_cli.tasks import metrics

needs_torchmetrics = pytest.mark.skipif("not __import__('importlib').util.find_spec('torchmetrics')")


@needs_torchmetrics
def test_two_classes() -> None:
    predicted, labels = torch.tensor([1, 1, 1, 0, 0, 0]), torch.tensor([1, 1, 0, 1, 0, 0])
    # true positives 2, false positives 1, false negatives 1, true negatives 2
    found = metrics.classification(predicted, labels, 2)
    assert found == pytest.approx({"f1": 2 / 3, "matthews": (4 - 1) / 9})
    # The other class has F 0 where it is never said, and f1 is that of class 1.
    assert metrics.classification(torch.ones(4, dtype=torch.int64), torch.tensor([1, 1, 1, 0]), 2) == pytest.approx(
        {"f1": 6 / 7, "matthews": 0.0}
    )


@needs_torchmetrics
def test_more_classes_count_alike_if_they_occur() -> None:
    # Of class 0 F is 1, of class 1 2/3, of class 2 0; class 3 occurs nowhere.
    found = metrics.classification(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]), 4)
    assert found["f1"] == pytest.approx(5 / 9)
    # (c s - Σ p_k t_k) / sqrt((s² - Σ p_k²)(s² - Σ t_k²)) with c = 2, s = 3
    assert found["matthews"] == pytest.approx((6 - 3) / math.sqrt((9 - 5) * (9 - 3)))


@needs_torchmetrics
def test_numbers() -> None:
    found = metrics.regression(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 10.0]))
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(14 / math.sqrt(5 * 50))
    assert metrics.regression(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])) == {"pearson": 0.0, "spearman": 0.0}


@needs_torchmetrics
def test_answers() -> None:
    found = metrics.squad(
        ["The Red house!", "green", "", "blue"], [["a red house"], ["old green tree", "no"], [], []]
    )  # fmt: skip
    assert found["exact_match"].tolist() == [1, 0, 1, 0]
    assert found["f1"].tolist() == pytest.approx([1, 0.5, 1, 0])  # of green: precision 1, recall 1/3


def test_rouge() -> None:
    pytest.importorskip("rouge_score")
    found = metrics.rouge(["cats sat here\nthe dog", "nothing"], ["the dog\na cat sat", "else"])
    # cats -> cat by stemming. Shared words: cat, sat, the, dog of 5 and 5; shared pairs: cat sat, the dog of 4 and 4.
    # One line after another: the longest common subsequence is 2 words; line by line it is 4.
    first = {name: values[0].item() for name, values in found.items()}
    assert first == pytest.approx({"rougeL": 0.4, "rouge1": 0.8, "rouge2": 0.5, "rougeLsum": 0.8})
    assert all(values[1:].tolist() == [0] for values in found.values())


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.delitem(sys.modules, "rouge_score.rouge_scorer", raising=False)
    with pytest.raises(MissingExtraError) as raised:
        metrics.rouge(["a"], ["b"])
    assert str(raised.value) == (
        "Scoring a task needs the package 'rouge-score'. Install it with: pip install 'losparse[train]'"
    )
    for name in [name for name in sys.modules if name.startswith("torchmetrics.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(MissingExtraError, match="'torchmetrics'"):
        metrics.classification(torch.tensor([0]), torch.tensor([0]), 2)
