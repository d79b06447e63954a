"""Predictions and what was right -> scores, each by a library that others use too."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..errors import MissingExtraError

ROUGE = ("rougeL", "rouge1", "rouge2", "rougeLsum")
_PACKAGES = {"torchmetrics": "torchmetrics", "rouge_score": "rouge-score"}
"""Module -> package."""


def check_installed(module: str) -> None:
    """MissingExtraError if `module` cannot be imported; it is not. So that it is said before hours of training."""
    if find_spec(module) is None:
        raise _missing(module)


def classification(predicted: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """f1 and matthews of class numbers, (rows,) each, by torchmetrics.

    f1 is that of class 1 where there are two, as in GLUE, else the mean over the classes that occur.
    """
    metrics = _load("torchmetrics.functional.classification")
    f1 = (
        metrics.binary_f1_score(predicted, labels)
        if classes == 2
        else metrics.multiclass_f1_score(predicted, labels, classes, average="macro")
    )
    # Of two classes torchmetrics gives a model that always says the same one 0.58 at times, where the coefficient is
    # undefined and by convention 0; a third class that never occurs changes nothing else.
    matthews = metrics.multiclass_matthews_corrcoef(predicted, labels, max(classes, 3))
    return {"f1": float(f1), "matthews": float(matthews)}


def regression(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """pearson and spearman of two vectors, by torchmetrics; 0 if one of them is constant."""
    metrics = _load("torchmetrics.functional.regression")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a constant vector
        found = {
            "pearson": float(metrics.pearson_corrcoef(predicted.double(), labels.double())),
            "spearman": float(metrics.spearman_corrcoef(predicted.double(), labels.double())),
        }
    return {name: value if math.isfinite(value) else 0.0 for name, value in found.items()}


def squad(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """f1 and exact_match of every row, (rows,), float64, by torchmetrics.

    Of several answers the best one counts, of none the empty text.
    """
    metrics = _load("torchmetrics.functional.text.squad")
    found = [
        metrics.squad(
            {"id": "", "prediction_text": text},
            {"id": "", "answers": {"text": list(right) or [""], "answer_start": [0] * max(1, len(right))}},
        )
        for text, right in zip(predicted, answers, strict=True)
    ]
    return {name: torch.tensor([float(one[name]) / 100 for one in found]).double() for name in ("f1", "exact_match")}


def rouge(predicted: Sequence[str], targets: Sequence[str]) -> dict[str, Tensor]:
    """F of ROUGE-L, -1, -2 and -Lsum of every row with stemming, (rows,), float64, by rouge_score.

    For rougeLsum a sentence is a line, as rouge_score has it. It reads Latin letters and digits alone.
    """
    scorer = _load("rouge_score.rouge_scorer").RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [scorer.score(right, text) for text, right in zip(predicted, targets, strict=True)]
    return {name: torch.tensor([score[name].fmeasure for score in scores], dtype=torch.float64) for name in ROUGE}


def _load(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise _missing(module.partition(".")[0]) from error


def _missing(module: str) -> MissingExtraError:
    return MissingExtraError(_PACKAGES[module], "train", "Scoring a task")
