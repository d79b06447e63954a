"""Low-rank plus sparse under a second moment H: min tr(E H Eᵀ), E = W − U V − S, solved for U, V and S jointly.

ADMM in the way of ALPS (arXiv 2406.07831), HASSLE-free (2502.00899) and 3BASiL (2603.01376): the values of S move
freely and are pulled towards their projection, ever harder; the low-rank part follows by one warm power step. Only
products with H and Cholesky factors of H + ρI are needed, never its eigenvectors. Columns are scaled first so that H
has a unit diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .error import relative_error, squared_norm
from .factors import Decomposition, LowRankSparse
from .patterns import Pattern, select
from .svd import balanced_product

DAMPING = 0.03
"""λ: share of the mean diagonal of H that is added to it."""

RHO_START, RHO_END = 0.1, 1.0
POLISH_ROUNDS, POLISH_STEPS = 3, 10
ROUGH = 20
"""Iterations below which a solve only estimates an error, and one round of polish is enough."""


class Metric:
    """H with dead inputs taken out, damped, and scaled to a unit diagonal.

    H: (n, n), float32, symmetric, positive semidefinite; ValueError if it is not finite or all zero.
    scale: (n,), what the columns of W are multiplied by to enter these coordinates; 0 for dead inputs.
    """

    def __init__(self, H: Tensor, damping: float = DAMPING) -> None:
        diagonal = H.diagonal().double()
        mean = float(diagonal.mean())
        if not mean > 0 or mean == float("inf"):
            raise ValueError(f"the mean square of the inputs is {mean}")
        alive = diagonal > 0
        self.scale = torch.where(alive, (diagonal + damping * mean).sqrt(), 0.0).float()
        inverse = torch.where(alive, 1 / (diagonal + damping * mean).sqrt(), 0.0).float()
        self.inverse_scale = inverse
        self.H = H * inverse[:, None] * inverse
        # The damping, in these coordinates; a dead input keeps a one, so that H + ρI stays regular.
        self.H.diagonal().copy_(torch.ones_like(inverse))
        self.undamped_diagonal = torch.where(alive, diagonal / (diagonal + damping * mean), 0.0).float()

    def inverse(self, rho: float) -> Tensor:
        """(H + ρI)⁻¹."""
        A = self.H.clone()
        A.diagonal().add_(rho)
        return _inverse(A)

    def squared(self, E: Tensor) -> Tensor:
        """tr(E H Eᵀ), with the damping, of E in these coordinates: a float64 scalar."""
        found: Tensor = torch.linalg.vecdot(E @ self.H, E).double().sum()
        return found

    def output_squared(self, E: Tensor) -> float:
        """tr(E H Eᵀ) without the damping, of E in these coordinates."""
        extra = (E.square().double().sum(0) * (1 - self.undamped_diagonal.double())).sum()
        return max(0.0, float(self.squared(E) - extra))


def solve(
    weights: Sequence[Tensor],
    H: Tensor,
    sizes: Sequence[tuple[int, int]],
    pattern: Pattern,
    *,
    scope: str = "row",
    steps: int = 120,
    damping: float = DAMPING,
    dtype: torch.dtype = torch.float32,
) -> list[Decomposition]:
    """U, V and S of each of `weights`, which all see the inputs of second moment H.

    weights: (m_i, n) each; H: (n, n). sizes: of each, the rank of U V and the entries of S. `scope` and nnz as in
    `patterns.select`. The matrices go through the steps side by side, so that each factorisation of H + ρI serves
    them all.
    """
    metric = Metric(H, damping)
    runs = [_Run(W.float(), metric, *size, pattern, scope) for W, size in zip(weights, sizes, strict=True)]
    every = 5
    rho = RHO_START
    growth = (RHO_END / RHO_START) ** (every / steps)
    for t in range(steps):
        if t % every == 0:
            if t:
                rho *= growth
            inverse = metric.inverse(rho)
        for run in runs:
            run.step(inverse, rho)
    for run in runs:
        run.close(POLISH_ROUNDS if steps > ROUGH else 1)
    return [run.finish(dtype) for run in runs]


class _Run:
    """One matrix on its way. All in the metric's coordinates: A = W D, L = U P."""

    def __init__(self, W: Tensor, metric: Metric, rank: int, nnz: int, pattern: Pattern, scope: str) -> None:
        self.W, self.A = W, W * metric.scale
        self.metric, self.rank, self.nnz, self.pattern, self.scope = metric, rank, nnz, pattern, scope
        A = self.A
        self.G = A @ metric.H
        self.total = metric.output_squared(A)
        self.U = self._leading(A)
        self.P = self.U.T @ A
        L = self.U @ self.P
        self.S = self._project(A - L)
        self.Y = torch.zeros_like(A)
        self.best = (float("inf"), self.U, self.P, self.S)
        self.errors: list[float] = []
        self._keep_better()

    def _leading(self, R: Tensor, rounds: int = 4) -> Tensor:
        """About the leading `rank` eigenvectors of R H Rᵀ: (m, rank), orthonormal."""
        r = self.rank
        if r == 0:
            return R.new_zeros(R.shape[0], 0)
        generator = torch.Generator().manual_seed(0)
        U = torch.randn(R.shape[0], r, generator=generator).to(R.device)
        for _ in range(rounds):
            U = self._power(R, U)
        return U

    def _power(self, R: Tensor, U: Tensor) -> Tensor:
        Q: Tensor = torch.linalg.qr(R @ (self.metric.H @ (R.T @ U))).Q
        return Q

    def _project(self, Z: Tensor) -> Tensor:
        support = select(Z, self.pattern, self.nnz, self.scope)
        return Z * support

    def _nearly_project(self, Z: Tensor) -> Tensor:
        """`_project`, except that of equal magnitudes all are kept: half the time, and the last projection is exact."""
        k = self.nnz // Z.shape[0]
        if self.pattern.kind != "unstructured" or self.scope != "row" or k == 0:
            return self._project(Z)
        a = Z.abs()
        threshold = torch.topk(a, k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        return Z * (a >= threshold)

    def step(self, inverse: Tensor, rho: float) -> None:
        T = self.G - self.Y
        T.add_(self.S, alpha=rho)
        if self.rank:
            T.addmm_(self.U, self.P @ self.metric.H, alpha=-1)
        B = T @ inverse
        self.S = self._nearly_project(torch.add(B, self.Y, alpha=1 / rho))
        self.Y.add_(B, alpha=rho).sub_(self.S, alpha=rho)
        if self.rank:
            R = torch.sub(self.A, B, out=B)
            self.U = self._power(R, self.U)
            self.P = self.U.T @ R

    def _keep_better(self) -> None:
        E = self.A - self.S
        if self.rank:
            E.addmm_(self.U, self.P, alpha=-1)
        squared = float(self.metric.squared(E))
        if squared < self.best[0]:
            self.best = (squared, self.U, self.P, self.S)
            self.errors.append(relative_error(self.metric.output_squared(E), self.total))
        else:
            self.errors.append(self.errors[-1])

    def close(self, rounds: int) -> None:
        """The polish: S by conjugate gradients on its support, L by power steps, in turn; never worse."""
        self._keep_better()
        _, self.U, self.P, self.S = self.best
        for _ in range(rounds):
            support = self.S != 0
            L = self.U @ self.P
            self.S = _conjugate_gradients(self.A - L, self.S, support, self.metric.H, POLISH_STEPS)
            if self.rank:
                R = self.A - self.S
                for _ in range(3):
                    self.U = self._power(R, self.U)
                self.P = self.U.T @ R
        self._keep_better()
        _, self.U, self.P, self.S = self.best

    def finish(self, dtype: torch.dtype) -> Decomposition:
        metric = self.metric
        support = select(self.S, self.pattern, self.nnz, self.scope)
        U, V = (factor.to(dtype) for factor in balanced_product(self.U, self.P * metric.inverse_scale))
        # Rounded first, so that S repairs what their rounding costs.
        R = self.A - (U.float() @ V.float()) * metric.scale
        S = _conjugate_gradients(R, self.S * support, support, metric.H, 3)
        values = (S * metric.inverse_scale)[support].to(dtype)
        factors = LowRankSparse(U, V, values, support)
        E = self.W - factors.dense()
        output = relative_error(metric.output_squared(E * metric.scale), self.total)
        weight_squared, residual_squared = squared_norm(self.W), squared_norm(E)
        errors = (relative_error(residual_squared, weight_squared),)
        return Decomposition(factors, errors, weight_squared, residual_squared, (*self.errors, output))


def _inverse(A: Tensor, leaf: int = 256) -> Tensor:
    """A⁻¹ of a symmetric positive definite A (n, n): by Schur complements, so that nearly all of it is products.

    LAPACK's own inverse from Cholesky factors takes five times as long at n = 1536.
    """
    n = A.shape[0]
    if n <= leaf:
        L, info = torch.linalg.cholesky_ex(A)
        shift = 1e-4
        while int(info):  # rounding made it indefinite: a larger diagonal costs accuracy, not correctness
            A = A + shift * torch.eye(n, dtype=A.dtype, device=A.device)
            shift *= 10
            L, info = torch.linalg.cholesky_ex(A)
        found: Tensor = torch.cholesky_inverse(L)
        return found
    h = n // 2
    top, side, bottom = A[:h, :h], A[h:, :h], A[h:, h:]
    P = _inverse(top, leaf)
    G = side @ P  # A₂₁ A₁₁⁻¹
    Q = _inverse(torch.addmm(bottom, G, side.T, alpha=-1), leaf)
    QG = Q @ G
    result = torch.empty_like(A)
    result[:h, :h] = torch.addmm(P, G.T, QG)
    result[h:, :h] = -QG
    result[:h, h:] = -QG.T
    result[h:, h:] = Q
    return result


def _conjugate_gradients(R: Tensor, S: Tensor, support: Tensor, H: Tensor, steps: int) -> Tensor:
    """S on `support` that lowers tr((R − S) H (R − S)ᵀ), each row by itself; H has a unit diagonal (Jacobi)."""
    mask = support.to(R.dtype)
    gradient = ((R - S) @ H).mul_(mask)
    direction = gradient.clone()
    S = S.clone()
    norm = torch.linalg.vecdot(gradient, gradient)
    for _ in range(steps):
        Hd = (direction @ H).mul_(mask)
        alpha = norm / torch.linalg.vecdot(direction, Hd).clamp_min(1e-30)
        S.addcmul_(direction, alpha[:, None])
        gradient.addcmul_(Hd, -alpha[:, None])
        new = torch.linalg.vecdot(gradient, gradient)
        direction = torch.addcmul(gradient, direction, (new / norm.clamp_min(1e-30))[:, None])
        norm = new
    return S
