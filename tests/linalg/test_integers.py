"""Error feedback onto whole numbers: what it makes of a matrix, and that it is nearer than rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losparse_cli.linalg.error import output_squared
from losparse_cli.linalg.integers import Metric, code, column_metric, fit_rows, nearest, rounded, row_steps

GRID = 2.0 ** (torch.arange(-64, 64) / 8)


def inputs(n: int, seed: int = 0, rank: int = 6) -> Tensor:
    """The second moment of inputs that lie near a few directions."""
    chance = torch.Generator().manual_seed(seed)
    X = torch.randn(400, rank, generator=chance) @ torch.randn(rank, n, generator=chance)
    X += 0.1 * torch.randn(400, n, generator=chance) * torch.logspace(-1, 1, n)
    return X.T @ X / 400


def weight(m: int, n: int, seed: int = 1) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def plain_feedback(W: Tensor, metric: Metric, a: Tensor) -> Tensor:
    """The same pass, entry by entry and in float64, without a weight on the length of codes."""
    order, R, c = metric.order.tolist(), metric.R.double(), metric.columns.double()
    left, q = W.double().clone(), torch.zeros(W.shape, dtype=torch.int32)
    for k, j in enumerate(order):
        step = a.double() * c[j]
        q[:, j] = (left[:, j] / step).round().int()
        error = (left[:, j] - step * q[:, j]) / R[k, k]
        for later, other in enumerate(order[k + 1 :], k + 1):
            left[:, other] -= error * R[k, later]
    return q


def test_the_factor_is_of_the_damped_inverse() -> None:
    H = inputs(20)
    metric = column_metric(H, GRID, damping=0.02)
    damped = (H + 0.02 * H.diagonal().mean() * torch.eye(20))[metric.order][:, metric.order]
    assert torch.equal(metric.R, metric.R.triu())
    torch.testing.assert_close(metric.R.T @ metric.R @ damped, torch.eye(20), atol=2e-3, rtol=1e-3)
    assert bool((H.diagonal()[metric.order].diff() <= 0).all())
    ratio = metric.R.diagonal() / (metric.scale * metric.columns[metric.order])
    assert bool((ratio.log2().abs() <= 1 / 16 + 1e-4).all())  # the grid has eight factors an octave


@pytest.mark.parametrize(("m", "n"), [(5, 7), (9, 130), (3, 257), (1, 1)])
def test_the_pass_by_blocks_is_the_plain_one(m: int, n: int) -> None:
    W, metric = weight(m, n), column_metric(inputs(n), GRID)
    a = 0.3 * torch.rand(m, generator=torch.Generator().manual_seed(2)) + 0.1
    same = code(W, metric, a, weight=0.0) == plain_feedback(W, metric, a)
    assert float(same.float().mean()) > 0.99  # a value half-way between two numbers may go either way


def test_feedback_is_nearer_to_the_outputs_than_rounding_at_the_same_steps() -> None:
    W, H = weight(40, 64), inputs(64)
    metric, a = column_metric(H, GRID), torch.full((40,), 0.2)
    q = code(W, metric, a, weight=0.0)
    alone = (W / (a[:, None] * metric.columns)).round()
    errors = [output_squared(W - a[:, None] * metric.columns * codes, H) for codes in (q, alone)]
    assert errors[0] < 0.5 * errors[1]


def test_shorter_codes_for_little_error() -> None:
    W, H = weight(40, 64), inputs(64)
    metric, a = column_metric(H, GRID), torch.full((40,), 0.8)
    plain, short = (code(W, metric, a, weight=share) for share in (0.0, 0.05))
    assert int((short == 0).sum()) > int((plain == 0).sum())
    assert int(short.abs().sum()) < int(plain.abs().sum())


def test_nothing_outside_the_support() -> None:
    W, metric = weight(12, 30), column_metric(inputs(30), GRID)
    support = torch.rand(12, 30, generator=torch.Generator().manual_seed(3)) < 0.4
    q = code(W, metric, torch.full((12,), 0.1), support)
    assert not bool(q[~support].any())
    assert bool(q[support].any())


def test_row_factors_are_those_of_least_squares() -> None:
    W, H = weight(6, 24), inputs(24)
    metric, a = column_metric(H, GRID), torch.full((6,), 0.7)
    q = code(W, metric, a)
    best = fit_rows(W, q, metric.columns, H, a, torch.float64)
    S = q.double() * metric.columns.double()
    for change in (0.99, 1.01):
        for i in range(6):
            moved = best.clone()
            moved[i] *= change
            assert output_squared(W - moved[:, None] * S, H.double()) >= output_squared(
                W - best[:, None] * S, H.double()
            )
    assert torch.equal(fit_rows(W, torch.zeros_like(q), metric.columns, H, a, torch.float32), a)


def test_rounding_without_data() -> None:
    W = torch.tensor([[0.1, -0.4, 1.6], [10.0, 4.9, -5.1]])
    assert rounded(W, torch.tensor([1.0, 10.0]), 0.0).tolist() == [[0, 0, 2], [1, 0, -1]]


def test_inputs_that_say_little() -> None:
    """Dead inputs, one direction alone, and none at all: there is a metric still, because H is damped."""
    for H in (torch.zeros(4, 4), torch.ones(4, 4), torch.diag(torch.tensor([1.0, 0.0, 0.0, 1e-30]))):
        metric = column_metric(H, GRID)
        assert bool(torch.isfinite(metric.R).all())
        assert bool((metric.columns > 0).all())
        q = code(weight(3, 4), metric, torch.full((3,), 0.05))
        assert bool(q.any())
    with pytest.raises(ValueError, match="singular"):
        column_metric(torch.full((3, 3), float("nan")), GRID)


def test_steps_of_rows_that_hardly_matter_are_bounded() -> None:
    g = torch.tensor([1.0, 4.0, 0.0])
    steps = row_steps(g)
    assert float(steps[0] / steps[1]) == pytest.approx(2)
    assert bool(torch.isfinite(steps).all())
    assert row_steps(torch.zeros(2)).tolist() == [1, 1]


def test_nearest_by_ratio() -> None:
    assert nearest(torch.tensor([0.9, 1.4, 1.45, 1e9]), torch.tensor([1.0, 2.0, 4.0])).tolist() == [1, 1, 2, 4]
