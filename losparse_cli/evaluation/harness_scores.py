"""What the evaluation harness returns -> figures with standard errors, and their difference, document by document."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..tasks.paired import Estimate, Sampled, over_resamples, over_rows

RESAMPLES = 200  # of a score that is no mean over documents: the harness's own, of whole texts, may take long
SEED = 1234  # as the harness's own

Estimates = dict[str, dict[str, Estimate]]
"""Task -> score -> figure. A score's name is the harness's, with the filter where there is one: acc, or
exact_match,strict-match."""


def estimates(results: dict[str, Any]) -> Estimates:
    """Figures and standard errors of every task and group, as the harness has them."""
    found: Estimates = {}
    for task, row in results["results"].items():
        own = {_name(key): Estimate(float(value), _error(row, key)) for key, value in row.items() if _is_score(key)}
        if own:
            found[task] = own
    return found


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> Estimates:
    """Of the figures that both have; the standard error pairs documents, in groups those of all their tasks."""
    found: Estimates = {}
    for task, row in mine["results"].items():
        other = theirs["results"].get(task, {})
        own = {_name(key): _difference(mine, theirs, task, key) for key in row if _is_score(key) and key in other}
        if own:
            found[task] = own
    return found


def _difference(mine: dict[str, Any], theirs: dict[str, Any], task: str, key: str) -> Estimate:
    value = float(mine["results"][task][key]) - float(theirs["results"][task][key])
    a, b = (_sampled(results, task, key) for results in (mine, theirs))
    same = _documents(mine, task, key) == _documents(theirs, task, key)
    paired = a is not None and b is not None and same and a.by_row == b.by_row
    return Estimate(value, a.less(b).estimate().error if paired and a is not None and b is not None else None)


def _sampled(results: dict[str, Any], task: str, key: str) -> Sampled | None:
    """The score, and what it is of each document, or on resamples of them; None if that does not make the score."""
    value, metric = float(results["results"][task][key]), key.partition(",")[0]
    items = [sample[metric] for sample in _samples(results, task, key)]
    if not items:
        return None
    if all(isinstance(item, int | float) for item in items):
        mean = over_rows(torch.tensor(items, dtype=torch.float64))
        if math.isclose(mean.value, value, rel_tol=1e-6, abs_tol=1e-9):
            return mean
    aggregate = _aggregation(results, task, metric)
    if aggregate is None:
        return None

    def score(rows: Tensor) -> dict[str, float]:
        return {"": float(aggregate([items[k] for k in rows.tolist()]))}

    if not math.isclose(score(torch.arange(len(items)))[""], value, rel_tol=1e-6, abs_tol=1e-9):
        return None
    return over_resamples(score, len(items), seed=SEED, count=RESAMPLES)[""]


def _aggregation(results: dict[str, Any], task: str, metric: str) -> Callable[[list[Any]], float] | None:
    from lm_eval.api.registry import get_aggregation, get_metric_aggregation

    for entry in results.get("configs", {}).get(task, {}).get("metric_list") or ():
        if entry.get("metric") == metric and entry.get("aggregation"):
            named = entry["aggregation"]
            found: Callable[[list[Any]], float] | None = named if callable(named) else get_aggregation(named)
            return found
    default: Callable[[list[Any]], float] | None = get_metric_aggregation(metric)
    return default


def _samples(results: dict[str, Any], task: str, key: str) -> list[dict[str, Any]]:
    """What was logged of every document that has this score, of a group in the order of its tasks."""
    metric, _, filtered = key.partition(",")
    if task in results["samples"]:
        logged = results["samples"][task]
        return [sample for sample in logged if sample.get("filter", "none") == filtered and metric in sample]
    inner = results.get("group_subtasks", {}).get(task, ())
    return [sample for name in inner for sample in _samples(results, name, key)]


def _documents(results: dict[str, Any], task: str, key: str) -> list[tuple[Any, Any]]:
    return [(sample["doc_id"], sample.get("doc_hash")) for sample in _samples(results, task, key)]


def _is_score(key: str) -> bool:
    metric, comma, _ = key.partition(",")
    return bool(comma) and not metric.endswith("_stderr")


def _name(key: str) -> str:
    return key.removesuffix(",none")


def _error(row: dict[str, Any], key: str) -> float | None:
    metric, _, filtered = key.partition(",")
    error = row.get(f"{metric}_stderr,{filtered}")
    return float(error) if isinstance(error, int | float) and math.isfinite(error) else None
