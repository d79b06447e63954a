"""U V + S: what is recovered, what never rises, what is stored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from losparse_cli.linalg.alternating import decompose, decompose_scaled
from losparse_cli.linalg.error import relative_error, squared_norm
from losparse_cli.linalg.patterns import Pattern, parse_pattern, select

UNSTRUCTURED = Pattern("unstructured")


def planted(m: int = 120, n: int = 160, rank: int = 3, nnz: int = 400) -> torch.Tensor:
    """Low rank plus a few large entries."""
    generator = torch.Generator().manual_seed(0)
    L = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    S = torch.zeros(m * n)
    where = torch.randperm(m * n, generator=generator)[:nnz]
    S[where] = 20 * torch.randn(nnz, generator=generator).sign()
    return L + S.view(m, n)


@pytest.mark.parametrize("pattern", ["unstructured", "rows", "columns", "2:4"])
def test_the_error_never_rises_and_is_that_of_the_stored_factors(pattern: str) -> None:
    W = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
    nnz = {"unstructured": 1229, "rows": 10 * 128, "columns": 13 * 96, "2:4": 96 * 64}[pattern]
    solved = decompose(W, 6, nnz, parse_pattern(pattern), iterations=12, dtype=torch.bfloat16)
    assert all(later < earlier for earlier, later in zip(solved.errors, solved.errors[1:], strict=False))
    factors = solved.factors
    assert factors.U.dtype == factors.V.dtype == factors.values.dtype == torch.bfloat16
    assert (factors.rank, factors.nnz) == (6, nnz)
    residual = W - factors.dense()
    assert float(residual.norm() / W.norm()) == pytest.approx(solved.errors[-1], rel=1e-4)
    assert solved.residual_squared == pytest.approx(float(residual.square().sum()), rel=1e-4)
    assert solved.weight_squared == pytest.approx(float(W.square().sum()), rel=1e-5)


def test_more_iterations_recover_a_planted_sum() -> None:
    W = planted()
    once = decompose(W, 3, 400, UNSTRUCTURED, iterations=1).errors[-1]
    often = decompose(W, 3, 400, UNSTRUCTURED, iterations=60).errors[-1]
    assert once > 0.1
    assert often < 0.01


def test_one_iteration_is_svd_then_the_largest_residuals() -> None:
    W = torch.randn(40, 60, generator=torch.Generator().manual_seed(2))
    factors = decompose(W, 4, 240, UNSTRUCTURED).factors
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    residual = W - (U[:, :4] * s[:4]) @ Vh[:4]
    expected = torch.zeros(W.numel())
    top = residual.abs().view(-1).topk(240).indices
    expected[top] = residual.view(-1)[top]
    torch.testing.assert_close(factors.sparse(), expected.view_as(W), atol=1e-4, rtol=1e-4)


def test_s_repairs_the_rounding_of_u_and_v() -> None:
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    full = decompose(W, 8, W.numel(), UNSTRUCTURED, dtype=torch.bfloat16)
    # With every entry in S, only the rounding of S itself is left: half a unit of bfloat16's 8 bits.
    assert full.errors[-1] < 2**-8


def test_rank_zero_and_empty_s() -> None:
    W = torch.randn(32, 48, generator=torch.Generator().manual_seed(4))
    pruned = decompose(W, 0, 100, UNSTRUCTURED, iterations=5)
    assert len(pruned.errors) == 1
    assert pruned.factors.U.shape == (32, 0)
    assert torch.equal(pruned.factors.dense()[pruned.factors.support], W[pruned.factors.support])
    low = decompose(W, 5, 0, UNSTRUCTURED, iterations=5)
    s = torch.linalg.svdvals(W)
    assert low.errors[-1] == pytest.approx(float(s[5:].norm() / s.norm()), rel=1e-4)
    assert low.factors.density == 0


def test_a_zero_weight_and_tiny_shapes() -> None:
    for shape in ((1, 1), (1, 9), (9, 1), (3, 2)):
        W = torch.ones(shape)
        solved = decompose(W, 1, 1, UNSTRUCTURED)
        assert solved.errors[-1] < 1e-5
    zero = decompose(torch.zeros(20, 30), 2, 7, UNSTRUCTURED)
    assert zero.errors == (0.0,)
    assert zero.factors.nnz == 7


def test_norms() -> None:
    A = torch.randn(50, 70, generator=torch.Generator().manual_seed(5))
    assert squared_norm(A) == pytest.approx(float(A.double().square().sum()), rel=1e-6)
    assert relative_error(4.0, 16.0) == 0.5
    assert relative_error(0.0, 0.0) == 0.0


# --- scaled by what the inputs are ------------------------------------------------------------------


def scales(n: int, seed: int = 6) -> torch.Tensor:
    """Root mean squares of inputs that differ by a factor of about a hundred."""
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).exp()


@pytest.mark.parametrize(
    ("pattern", "scope", "nnz", "near"),
    [
        ("unstructured", "row", 60 * 10, 0.01),
        ("unstructured", "matrix", 60 * 30 + 1, 0.01),
        ("rows", "row", 20 * 88, 0.01),
        ("columns", "row", 60 * 30, 0.01),
        ("2:4", "row", 60 * 44, 0.03),  # whose supports hardly settle
    ],
)
def test_a_diagonal_moment_scales_the_matrix_and_nothing_else(
    pattern: str, scope: str, nnz: int, near: float, matrix: Callable[..., torch.Tensor]
) -> None:
    """Against as many projections of the scaled matrix, with exact singular vectors."""
    W, d = matrix(0.8 ** torch.arange(60) + 0.02, (60, 88)).float(), scales(88)
    solved = decompose_scaled(W, (d * d).diag(), 5, nnz, parse_pattern(pattern), scope=scope, iterations=80)
    A, S = W * d, torch.zeros_like(W)
    for _ in range(80):
        U, s, Vh = torch.linalg.svd(A - S, full_matrices=False)
        residual = A - (U[:, :5] * s[:5]) @ Vh[:5]
        S = residual * select(residual, parse_pattern(pattern), nnz, scope)
    expected = float((residual - S).norm() / A.norm())
    assert float(((W - solved.factors.dense()) * d).norm() / A.norm()) == pytest.approx(expected, rel=near)
    assert solved.output_errors[-1] == pytest.approx(expected, rel=near)
    assert (solved.factors.rank, solved.factors.nnz, int(solved.factors.support.sum())) == (5, nnz, nnz)


def test_equal_inputs_are_no_scale_at_all() -> None:
    W = planted()
    plain = decompose(W, 3, 480, UNSTRUCTURED, scope="row", iterations=40)
    for scale in (1.0, 1e-4, 1e4):
        scaled = decompose_scaled(W, scale * torch.eye(160), 3, 480, UNSTRUCTURED, iterations=40)
        assert scaled.errors[-1] == pytest.approx(plain.errors[-1], rel=0.01)
        assert scaled.output_errors[-1] == pytest.approx(scaled.errors[-1], rel=1e-3)


def test_it_serves_large_inputs_better_than_a_solver_that_does_not_know_them() -> None:
    W, d = torch.randn(60, 90, generator=torch.Generator().manual_seed(8)), scales(90)
    scaled = decompose_scaled(W, (d * d).diag(), 5, 60 * 30, UNSTRUCTURED)
    plain = decompose(W, 5, 60 * 30, UNSTRUCTURED, scope="row", iterations=80)
    lost = [float(((W - solved.factors.dense()) * d).norm()) for solved in (scaled, plain)]
    assert lost[0] < 0.5 * lost[1]
    assert scaled.errors[-1] > plain.errors[-1]  # which is what it pays for that


def test_the_errors_of_a_scaled_solve_are_those_of_its_stored_factors() -> None:
    X = torch.randn(400, 64, generator=torch.Generator().manual_seed(9)) * scales(64)
    W, H = torch.randn(32, 64, generator=torch.Generator().manual_seed(10)), X.T @ X / 400
    solved = decompose_scaled(W, H, 4, 32 * 20, UNSTRUCTURED, dtype=torch.bfloat16)
    factors = solved.factors
    assert factors.U.dtype == factors.V.dtype == factors.values.dtype == torch.bfloat16
    E = W - factors.dense()
    assert solved.errors == (pytest.approx(float(E.norm() / W.norm()), rel=1e-4),)
    outputs = float((X @ E.T).norm() / (X @ W.T).norm())
    assert solved.output_errors == (pytest.approx(outputs, rel=1e-3),)


def test_dead_inputs_and_moments_without_any() -> None:
    W, d = torch.randn(24, 40, generator=torch.Generator().manual_seed(11)), scales(40)
    d[[0, 7, 39]] = 0
    for rank, nnz in ((3, 24 * 10), (0, 24 * 10), (3, 0)):
        solved = decompose_scaled(W, (d * d).diag(), rank, nnz, UNSTRUCTURED)
        assert bool(torch.isfinite(solved.factors.dense()).all())
        assert torch.count_nonzero(solved.factors.support[:, [0, 7, 39]]) == 0
        assert torch.count_nonzero(solved.factors.dense()[:, [0, 7, 39]]) == 0
        assert solved.output_errors[-1] < 1
    for spoilt in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="mean squares"):
            decompose_scaled(W, spoilt * torch.ones(40, 40), 3, 24 * 10, UNSTRUCTURED)
