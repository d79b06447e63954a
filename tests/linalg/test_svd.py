"""Truncated SVD on matrices of known spectrum."""

from __future__ import annotations

import pytest
import torch

from losparse_cli.linalg.svd import OUTPUT_DAMPING, balanced_factors, output_factors, seed_of, truncated_svd


def with_spectrum(shape: tuple[int, int], s: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A matrix of this shape with singular values `s`."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(shape[0], len(s), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], len(s), generator=generator)).Q
    return (left * s) @ right.T


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(300, 700), (700, 300)])
def test_randomized_factors_capture_the_energy_of_the_exact_ones(exponent: float, shape: tuple[int, int]) -> None:
    s = torch.arange(1, 301).float().pow(-exponent)
    A = with_spectrum(shape, s)
    U, got, Vh = truncated_svd(A, 8)
    captured = A.square().sum() - (A - (U * got) @ Vh).square().sum()
    assert captured / s[:8].square().sum() > 0.995
    # No randomized value can exceed the true one (Halko et al., section 8), but for rounding.
    assert (got <= s[:8] * (1 + 1e-4)).all()


@pytest.mark.parametrize("exact", [False, True])
def test_a_matrix_of_low_rank_is_recovered(exact: bool) -> None:
    s = torch.tensor([9.0, 5.0, 2.0, 1.0])
    A = with_spectrum((200, 333), s)
    U, got, Vh = truncated_svd(A, 4, exact=exact)
    torch.testing.assert_close((U * got) @ Vh, A, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got, s, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(U.T @ U, torch.eye(4), atol=1e-5, rtol=0)


def test_balanced_factors_split_the_singular_values_evenly() -> None:
    A = with_spectrum((50, 40), torch.tensor([7.0, 3.0, 1.0]))
    U, V = balanced_factors(*truncated_svd(A, 3, exact=True))
    torch.testing.assert_close(U @ V, A, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(U.norm(dim=0), V.norm(dim=1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(U.norm(dim=0).square(), torch.tensor([7.0, 3.0, 1.0]), atol=1e-4, rtol=1e-4)


def test_the_result_depends_on_the_seed_alone_and_leaves_the_global_generator() -> None:
    A = torch.randn(600, 500, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    first = truncated_svd(A, 5, seed=seed_of(0, "a"))
    drawn = torch.rand(3)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.rand(3), drawn, atol=0, rtol=0)
    torch.manual_seed(99)
    again = truncated_svd(A, 5, seed=seed_of(0, "a"))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    other = truncated_svd(A, 5, seed=seed_of(0, "b"))
    assert not torch.equal(first[0], other[0])
    assert seed_of(0, "a") != seed_of(1, "a")


def test_ranks_outside_the_matrix_are_refused() -> None:
    A = torch.eye(4, 6)
    for rank in (-1, 5):
        with pytest.raises(ValueError, match=r"outside 0\.\.4"):
            truncated_svd(A, rank)
    U, s, Vh = truncated_svd(A, 0)
    assert U.shape == (4, 0)
    assert s.shape == (0,)
    assert Vh.shape == (0, 6)


def test_a_zero_matrix_has_finite_factors() -> None:
    U, V = balanced_factors(*truncated_svd(torch.zeros(300, 200), 4))
    assert torch.isfinite(U).all()
    assert torch.equal(U @ V, torch.zeros(300, 200))


def output_error(E: torch.Tensor, H: torch.Tensor) -> float:
    """tr(E H Eᵀ), with the damping."""
    damped = H.double() + OUTPUT_DAMPING * H.double().diagonal().mean() * torch.eye(len(H))
    return float((E.double() @ damped * E.double()).sum())


@pytest.mark.parametrize("tokens", [5, 400])
def test_output_factors_leave_what_no_others_of_their_rank_can(tokens: int) -> None:
    """The eigenvalues of W H Wᵀ that are left; also where fewer tokens were seen than there are inputs."""
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(30, 40, generator=generator)
    X = torch.randn(tokens, 40, generator=generator) * torch.arange(1, 41).float().pow(-1)
    H = X.T @ X / tokens
    U, V = output_factors(W, H, 4)
    damped = H.double() + OUTPUT_DAMPING * H.double().diagonal().mean() * torch.eye(40)
    eigenvalues = torch.linalg.eigvalsh(W.double() @ damped @ W.double().T)
    assert output_error(W - U @ V, H) == pytest.approx(float(eigenvalues[:-4].sum()), rel=1e-4)
    plain = balanced_factors(*truncated_svd(W, 4))
    assert output_error(W - U @ V, H) < 0.9 * output_error(W - plain[0] @ plain[1], H)
    torch.testing.assert_close(U.norm(dim=0), V.norm(dim=1), atol=1e-4, rtol=1e-4)


def test_output_factors_of_inputs_that_are_all_alike_are_those_of_the_weights() -> None:
    W = with_spectrum((50, 40), torch.tensor([7.0, 3.0, 1.0]))
    U, V = output_factors(W, 5 * torch.eye(40), 2)
    P, Q = balanced_factors(*truncated_svd(W, 2))
    torch.testing.assert_close(U @ V, P @ Q, atol=1e-4, rtol=1e-4)
    none = output_factors(W, torch.eye(40), 0)
    assert [factor.shape for factor in none] == [(50, 0), (0, 40)]
    with pytest.raises(ValueError, match="mean square of the inputs is 0"):
        output_factors(W, torch.zeros(40, 40), 2)
