"""Alternating projections: a low-rank fit, then the largest entries of what it leaves.

One iteration is the start of LoSparse (Li et al., ICML 2023, section 3.1: truncated SVD, S from the
residual); more are GoDec (Zhou and Tao, ICML 2011): neither projection can raise ‖W − L − S‖_F. OATS (Zhang and
Papyan, ICLR 2025, arXiv 2409.13652) does the same to W diag(d), d the root mean square of each input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .error import output_squared, relative_error, squared_norm
from .factors import Decomposition, LowRankSparse
from .patterns import Pattern, select
from .svd import balanced_factors, balanced_product, truncated_svd


def decompose(
    W: Tensor,
    rank: int,
    nnz: int,
    pattern: Pattern,
    *,
    scope: str = "matrix",
    iterations: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Decomposition:
    """The best U V + S found for W in `iterations` rounds, stored as `dtype`.

    W: (out_features, in_features), floating, finite; computed in float32. `nnz` as in
    `patterns.select`. U and V are rounded to `dtype` before the residual is taken, so that S
    repairs their rounding. ValueError if rank or nnz do not fit the shape.
    """
    W = W.float()
    weight_squared = squared_norm(W)
    best: LowRankSparse | None = None
    best_squared = float("inf")
    errors: list[float] = []
    target = W
    for t in range(max(1, iterations)):
        U, s, Vh = truncated_svd(target, rank, seed=seed + t)
        U, V = (factor.to(dtype) for factor in balanced_factors(U, s, Vh))
        residual = torch.addmm(W, U.float(), V.float(), alpha=-1) if rank else W.clone()
        support = select(residual, pattern, nnz, scope)
        # By index, not by mask: on a CPU that gathers five times faster.
        index = torch.nonzero(support.view(-1)).view(-1)
        values = residual.view(-1)[index].to(dtype)
        residual.view(-1)[index] -= values.float()
        squared = squared_norm(residual)
        if squared >= best_squared:
            break  # converged: from here on rounding decides, and the better state is kept
        best, best_squared = LowRankSparse(U, V, values, support), squared
        errors.append(relative_error(squared, weight_squared))
        if rank == 0 or nnz == 0:
            break  # a single projection is the whole answer
        if t + 1 < iterations:
            target = torch.addmm(residual, U.float(), V.float())  # W − S
    assert best is not None, "a finite weight always yields a first iterate"
    return Decomposition(best, tuple(errors), weight_squared, best_squared)


def decompose_scaled(
    W: Tensor,
    H: Tensor,
    rank: int,
    nnz: int,
    pattern: Pattern,
    *,
    scope: str = "row",
    iterations: int = 80,
    dtype: torch.dtype = torch.float32,
) -> Decomposition:
    """OATS: alternating projections of W diag(d), scaled back; of H (n, n) only the diagonal is used.

    The low-rank part is followed by one warm power step an iteration, which comes within a thousandth of the exact
    SVD's error. ValueError if H has no positive diagonal entry.
    """
    W = W.float()
    d = H.diagonal().clamp_min(0).sqrt().float()
    if not bool((d > 0).any()) or not bool(torch.isfinite(d).all()):
        raise ValueError("the inputs' mean squares are zero, or not finite")
    A = W * d
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(W.shape[0], rank, generator=generator).to(W.device)
    S = torch.zeros_like(A)
    for t in range(iterations):
        R = A - S
        for _ in range(4 if t == 0 else 1):
            Q = torch.linalg.qr(R @ (R.T @ Q)).Q
        P = Q.T @ R
        residual = torch.addmm(A, Q, P, alpha=-1)
        support = select(residual, pattern, nnz, scope)
        S = residual * support
    inverse = torch.where(d > 0, 1 / d, 0.0)
    U, V = (factor.to(dtype) for factor in balanced_product(Q, P * inverse))
    residual = torch.addmm(W, U.float(), V.float(), alpha=-1)
    factors = LowRankSparse(U, V, residual[support].to(dtype), support)
    E = W - factors.dense()
    weight_squared, residual_squared = squared_norm(W), squared_norm(E)
    output = relative_error(output_squared(E, H), output_squared(W, H))
    errors = (relative_error(residual_squared, weight_squared),)
    return Decomposition(factors, errors, weight_squared, residual_squared, (output,))
