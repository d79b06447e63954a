"""U V + S under a second moment: what is recovered, what never rises, what a singular H must not break."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from losparse_cli.linalg.admm import Metric, _inverse, solve
from losparse_cli.linalg.alternating import decompose_scaled
from losparse_cli.linalg.factors import Decomposition
from losparse_cli.linalg.patterns import Pattern, parse_pattern

UNSTRUCTURED = Pattern("unstructured")
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.02}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(n: int, seed: int = 0, tokens: int = 4096, rank: int = 8) -> Tensor:
    """The second moment of inputs that mostly lie in a few directions, with a few that are much larger."""
    X = normal(tokens, rank, seed=seed) @ normal(rank, n, seed=seed + 1) + 0.5 * normal(tokens, n, seed=seed + 2)
    X[:, : n // 16] *= 4
    return X.T @ X / tokens


def output_error(W: Tensor, solved: Decomposition, H: Tensor) -> float:
    """sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)) in float64."""
    E, W, H = (W - solved.factors.dense()).double(), W.double(), H.double()
    return float(((E @ H * E).sum() / (W @ H * W).sum()).sqrt())


def alone(W: Tensor, H: Tensor, rank: int, nnz: int, pattern: Pattern = UNSTRUCTURED, **options: Any) -> Decomposition:
    return solve([W], H, [(rank, nnz)], pattern, **options)[0]


def test_a_planted_sum_is_recovered() -> None:
    m, n, rank, k = 96, 128, 3, 6
    L = normal(m, rank) @ normal(rank, n, seed=1)
    S = torch.zeros(m, n)
    generator = torch.Generator().manual_seed(2)
    for row in S:
        row[torch.randperm(n, generator=generator)[:k]] = 20 * torch.randn(k, generator=generator).sign()
    X = normal(2000, n, seed=3)
    H = X.T @ X / 2000  # well conditioned: its eigenvalues lie between 0.5 and 1.6
    solved = alone(L + S, H, rank, m * k)
    assert output_error(L + S, solved, H) < 1e-3
    assert bool(solved.factors.support[S != 0].all())
    assert solved.output_errors[0] > 0.02  # which the start is not


def test_it_is_much_better_than_projections_that_know_the_diagonal_alone() -> None:
    ratios = []
    for seed in range(4):
        W, H = normal(48, 96, seed=10 + seed), correlated(96, seed)
        joint = output_error(W, alone(W, H, 4, 48 * 40), H)
        scaled = output_error(W, decompose_scaled(W, H, 4, 48 * 40, UNSTRUCTURED), H)
        assert joint < scaled
        ratios.append(joint / scaled)
    assert sum(ratios) / len(ratios) < 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("pattern", "scope", "nnz"),
    [
        ("unstructured", "row", 48 * 30),
        ("unstructured", "matrix", 48 * 30 + 7),
        ("rows", "row", 96 * 11),
        ("columns", "row", 48 * 29),
        ("2:4", "row", 48 * 48),
    ],
)
def test_every_pattern_is_kept_and_errors_never_rise(pattern: str, scope: str, nnz: int, dtype: torch.dtype) -> None:
    W, H = normal(48, 96, seed=5).to(dtype).float(), correlated(96)
    solved = alone(W, H, 5, nnz, parse_pattern(pattern), scope=scope, steps=60, dtype=dtype)
    factors = solved.factors
    assert (factors.rank, factors.nnz, int(factors.support.sum())) == (5, nnz, nnz)
    assert factors.U.dtype == factors.V.dtype == factors.values.dtype == dtype
    support = factors.support
    if pattern == "rows":
        assert set(support.sum(1).tolist()) == {0, 96}
    elif pattern == "columns":
        assert set(support.sum(0).tolist()) == {0, 48}
    elif pattern == "2:4":
        assert bool((support.view(48, -1, 4).sum(2) == 2).all())
    elif scope == "row":
        assert bool((support.sum(1) == 30).all())
    errors = solved.output_errors
    assert all(later <= earlier for earlier, later in pairwise(errors[:-1]))
    assert errors[-1] <= errors[-2] * (1 + ROUNDING[dtype])
    assert errors[-1] < errors[0]
    assert errors[-1] == pytest.approx(output_error(W, solved, H), rel=1e-3)
    residual = W - factors.dense()
    assert solved.errors[-1] == pytest.approx(float(residual.norm() / W.norm()), rel=1e-4)
    assert solved.residual_squared == pytest.approx(float(residual.square().sum()), rel=1e-4)


def test_s_is_the_best_one_on_its_support() -> None:
    """No other values on that support do better by much: least squares for each row, from a dense solver."""
    W, H = normal(24, 48, seed=6), correlated(48)
    solved = alone(W, H, 3, 24 * 12)
    factors = solved.factors
    R = (W - factors.U @ factors.V).double()
    damped = H.double() + 0.03 * H.diagonal().mean().double() * torch.eye(48, dtype=torch.float64)
    best = torch.zeros_like(R)
    for row in range(24):
        kept = factors.support[row]
        best[row, kept] = torch.linalg.solve(damped[kept][:, kept], (damped @ R[row])[kept])
    cost = [float(((R - S) @ damped * (R - S)).sum()) for S in (best, factors.sparse().double())]
    assert cost[0] <= cost[1] <= 1.01 * cost[0]


def test_the_low_rank_part_alone_is_the_closed_form() -> None:
    """With no S the optimum is known: the leading directions of W H^(1/2)."""
    n, rank = 64, 5
    W, H = normal(40, n, seed=7), correlated(n)
    damped = H.double() + 0.03 * H.diagonal().mean().double() * torch.eye(n, dtype=torch.float64)
    values = torch.linalg.svdvals(W.double() @ torch.linalg.cholesky(damped))
    E = (W - alone(W, H, rank, 0).factors.dense()).double()
    assert float((E @ damped * E).sum()) == pytest.approx(float(values[rank:].square().sum()), rel=0.01)


def test_rank_zero_no_entries_and_all_entries() -> None:
    W, H = normal(32, 48, seed=8), correlated(48)
    pruned = alone(W, H, 0, 32 * 24)
    assert (pruned.factors.rank, pruned.factors.U.shape, pruned.factors.V.shape) == (0, (32, 0), (0, 48))
    assert 0 < pruned.output_errors[-1] < output_error(W, decompose_scaled(W, H, 0, 32 * 24, UNSTRUCTURED), H)
    low = alone(W, H, 4, 0)
    assert low.factors.nnz == 0
    assert low.output_errors[-1] < 1
    full = alone(W, H, 4, W.numel())
    assert full.output_errors[-1] < 1e-4
    nothing = alone(W, H, 0, 0)
    assert nothing.output_errors[-1] == pytest.approx(1.0)


def test_pruning_by_the_best_of_all_supports() -> None:
    """One row of six inputs, every support tried: the joint solver is near the best of all twenty."""
    ratios = []
    for seed in range(8):
        n, k = 6, 3
        w, H = normal(1, n, seed=seed).double(), correlated(n, seed=seed, rank=2).double()
        damped = H + 0.03 * H.diagonal().mean() * torch.eye(n, dtype=torch.float64)
        costs = []
        for kept in map(list, combinations(range(n), k)):
            s = torch.zeros(1, n, dtype=torch.float64)
            s[0, kept] = torch.linalg.solve(damped[kept][:, kept], (damped @ w[0])[kept])
            costs.append(float((w - s) @ damped @ (w - s).T))
        e = w - alone(w.float(), H.float(), 0, k).factors.dense().double()
        ratios.append(float(e @ damped @ e.T) / min(costs))
    assert min(ratios) > 0.999
    assert sorted(ratios)[len(ratios) // 2] < 1.05


# --- H as it comes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_fewer_tokens_than_inputs(tokens: int) -> None:
    W, X = normal(32, 64, seed=9), normal(tokens, 64, seed=tokens)
    H = X.T @ X / tokens
    solved = alone(W, H, 4, 32 * 16)
    assert bool(torch.isfinite(solved.factors.dense()).all())
    assert output_error(W, solved, H) == pytest.approx(solved.output_errors[-1], rel=1e-2, abs=1e-4)
    assert solved.output_errors[-1] < 0.2


def test_dead_inputs_get_nothing() -> None:
    W, H = normal(32, 64, seed=11), correlated(64)
    dead = [0, 5, 63]
    H[dead], H[:, dead] = 0, 0
    solved = alone(W, H, 4, 32 * 20)
    assert torch.equal(solved.factors.dense()[:, dead], torch.zeros(32, len(dead)))
    assert int(solved.factors.support.sum()) == 32 * 20
    living = [k for k in range(64) if k not in dead]
    without = alone(W[:, living], H[living][:, living], 4, 32 * 20)
    # The mean of the diagonal, which the damping is a share of, counts the dead inputs.
    assert solved.output_errors[-1] == pytest.approx(without.output_errors[-1], rel=0.02)


def test_more_entries_than_inputs_that_live() -> None:
    W, H = normal(8, 16, seed=12), correlated(16)
    H[4:], H[:, 4:] = 0, 0
    solved = alone(W, H, 1, 8 * 10)
    assert solved.factors.nnz == 80
    assert solved.output_errors[-1] < 1e-3
    assert bool(torch.isfinite(solved.factors.dense()).all())


@pytest.mark.parametrize("spoil", [lambda H: H * 0, lambda H: H * torch.nan, lambda H: H * torch.inf, lambda H: -H])
def test_an_h_without_information_is_refused(spoil: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="mean square"):
        alone(normal(8, 16), spoil(correlated(16)), 1, 8 * 4)


def test_the_scale_of_h_does_not_matter() -> None:
    W, H = normal(48, 64, seed=13), correlated(64)
    first = alone(W, H, 4, 48 * 20)
    for scale in (100.0, 1e-6, 1e6):
        other = alone(W, scale * H, 4, 48 * 20)
        assert other.output_errors[-1] == pytest.approx(first.output_errors[-1], rel=1e-2)
        assert float((first.factors.support & other.factors.support).sum()) > 0.98 * 48 * 20
    exact = alone(W, 4 * H, 4, 48 * 20)  # a power of four rounds nowhere
    assert torch.equal(exact.factors.support, first.factors.support)
    assert torch.equal(exact.factors.dense(), first.factors.dense())


def test_a_weight_of_zero() -> None:
    solved = alone(torch.zeros(16, 32), correlated(32), 2, 16 * 4)
    assert solved.factors.nnz == 64
    assert torch.equal(solved.factors.dense(), torch.zeros(16, 32))
    assert solved.output_errors[-1] == 0


# --- several at once --------------------------------------------------------------------------------


def test_together_they_find_what_each_finds_alone() -> None:
    H = correlated(64)
    weights = [normal(m, 64, seed=m) for m in (40, 24, 56)]
    sizes = [(3, 40 * 12), (0, 24 * 30), (6, 0)]
    together = solve(weights, H, sizes, UNSTRUCTURED, steps=40)
    for W, size, one in zip(weights, sizes, together, strict=True):
        single = alone(W, H, *size, steps=40)
        assert torch.equal(one.factors.support, single.factors.support)
        assert torch.equal(one.factors.dense(), single.factors.dense())
        assert one.output_errors == single.output_errors
    with pytest.raises(ValueError, match="zip"):
        solve(weights, H, sizes[:2], UNSTRUCTURED)


def test_more_steps_do_not_do_worse() -> None:
    W, H = normal(48, 96, seed=14), correlated(96)
    errors = [alone(W, H, 4, 48 * 30, steps=steps).output_errors[-1] for steps in (1, 15, 120)]
    assert errors[2] < errors[1] < errors[0]


def test_the_inputs_are_left_alone() -> None:
    W, H = normal(16, 32, seed=15), correlated(32)
    before = W.clone(), H.clone()
    alone(W, H, 2, 16 * 8)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])


# --- what it is made of -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 255, 256, 257, 600])
def test_the_inverse_is_that_of_float64(n: int) -> None:
    H = correlated(n, tokens=2 * n + 8) if n > 16 else normal(n, 4 * n) @ normal(n, 4 * n).T
    d = H.diagonal().rsqrt()
    A = H * d[:, None] * d
    A.diagonal().add_(0.1)
    found, exact = _inverse(A), torch.linalg.inv(A.double())
    condition = float(torch.linalg.cond(A.double()))
    assert float((found.double() - exact).norm() / exact.norm()) < 1e-6 * condition
    torch.testing.assert_close(found @ A, torch.eye(n), atol=1e-3, rtol=0)
    torch.testing.assert_close(found, found.T, atol=1e-5, rtol=1e-4)


def test_a_matrix_that_rounding_made_indefinite_is_inverted_all_the_same() -> None:
    A = torch.ones(64, 64) - 1e-5 * torch.eye(64)
    assert bool(torch.isfinite(_inverse(A)).all())


def test_output_squared_takes_the_damping_out_again() -> None:
    E, H = normal(20, 32, seed=16), correlated(32)
    H[3], H[:, 3] = 0, 0
    metric = Metric(H)
    exact = float((E.double() @ H.double() * E.double()).sum())
    assert metric.output_squared(E * metric.scale) == pytest.approx(exact, rel=1e-4)
    alive = E.clone()
    alive[:, 3] = 0
    damped = exact + 0.03 * float(H.diagonal().mean()) * float(alive.square().sum())
    assert float(metric.squared(E * metric.scale)) == pytest.approx(damped, rel=1e-4)
