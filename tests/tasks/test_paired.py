"""How sure a score is, and a difference of two on the same rows: against values worked by hand, and repeated draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from losparse_cli.tasks.paired import RESAMPLES, Estimate, exponential_of_mean, over_resamples, over_rows


def mean_of(values: Tensor) -> object:
    return lambda rows: {"mean": float(values[rows].double().mean())}


def test_a_mean_over_rows_worked_by_hand() -> None:
    # 3 of 4: the deviations are 1/4, 1/4, 1/4, -3/4, their squares sum to 3/4, sqrt(3/4 / 3 / 4) = 1/4
    assert over_rows(torch.tensor([True, True, True, False])).estimate() == Estimate(0.75, 0.25)
    assert over_rows(torch.tensor([0.5])).estimate() == Estimate(0.5, None)


def test_a_difference_pairs_the_rows() -> None:
    ours, dense = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    found = over_rows(ours).less(over_rows(dense)).estimate()
    assert found == Estimate(-0.25, 0.25)  # differences 0, 0, -1, 0; as if independent it would be 0.382
    same = over_rows(ours).less(over_rows(ours)).estimate()
    assert same == Estimate(0.0, 0.0)


def test_the_exponential_has_the_error_of_the_delta_method() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0])
    found = exponential_of_mean(losses).estimate()
    assert found.value == pytest.approx(math.exp(2))
    assert found.error == pytest.approx(math.exp(2) / math.sqrt(3))
    assert exponential_of_mean(torch.tensor([800.0, 900.0])).estimate() == Estimate(math.inf, None)


def test_a_bootstrap_of_a_mean_has_the_error_of_a_mean() -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(0))
    found = over_resamples(mean_of(values), 200, seed=1)["mean"]
    exact = over_rows(values).estimate()
    assert found.draws.shape == (RESAMPLES,)
    assert found.value == pytest.approx(exact.value)
    assert found.estimate().error == pytest.approx(exact.error, rel=0.08)
    assert found.estimate() == over_resamples(mean_of(values), 200, seed=1)["mean"].estimate()
    assert found.estimate() != over_resamples(mean_of(values), 200, seed=2)["mean"].estimate()


def test_a_bootstrap_pairs_the_resamples_of_two_models() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(200, generator=generator)
    dense = ours + 0.1 * torch.randn(200, generator=generator)
    a, b = (over_resamples(mean_of(values), 200, seed=1)["mean"] for values in (ours, dense))
    error = a.less(b).estimate().error
    assert error == pytest.approx(over_rows(ours - dense).estimate().error, rel=0.08)
    assert a.estimate().error is not None
    assert error is not None
    assert error < a.estimate().error / 5


def test_a_single_row_has_no_error() -> None:
    assert over_resamples(mean_of(torch.tensor([3.0])), 1, seed=0)["mean"].estimate() == Estimate(3.0, None)
