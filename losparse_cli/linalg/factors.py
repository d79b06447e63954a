"""LowRankSparse, LowRankCodes and Decomposition: what every solver returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Factors:
    """What both forms of S have beside them. U: (out_features, rank), V: (rank, in_features), in the stored dtype."""

    U: Tensor
    V: Tensor

    def __post_init__(self) -> None:
        """Row by row, as files hold them: last bits of what is computed from them depend on it."""
        for name, value in vars(self).items():
            if value is not None and not value.is_contiguous():
                object.__setattr__(self, name, value.contiguous())

    def to(self, device: torch.device) -> Self:
        held = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{name: value.to(device) for name, value in held.items()})

    @property
    def rank(self) -> int:
        return self.U.shape[1]

    @property
    def stored(self) -> Tensor:
        """What is stored beside U and V as floats: the entries of S, or the factors of its rows."""
        raise NotImplementedError

    def sparse(self) -> Tensor:
        """S as a dense float32 matrix, (out_features, in_features)."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """U V + S in float32, (out_features, in_features)."""
        return torch.addmm(self.sparse(), self.U.float(), self.V.float())


@dataclass(frozen=True)
class LowRankSparse(_Factors):
    """W ≈ U V + S of one weight.

    U: (out_features, rank), V: (rank, in_features), both in the stored dtype.
    values: (nnz,), the entries of S in row-major order, in the stored dtype.
    support: (out_features, in_features), bool, True where S holds an entry (which may itself be zero).
    """

    values: Tensor
    support: Tensor

    @property
    def stored(self) -> Tensor:
        return self.values

    @property
    def nnz(self) -> int:
        return self.values.numel()

    @property
    def density(self) -> float:
        """Share of S that is stored, 0 to 1."""
        return self.nnz / max(1, self.support.numel())

    def sparse(self) -> Tensor:
        """S as a dense float32 matrix, (out_features, in_features)."""
        S = torch.zeros(self.support.shape, dtype=torch.float32, device=self.values.device)
        S[self.support] = self.values.float()
        return S


@dataclass(frozen=True)
class LowRankCodes(_Factors):
    """W ≈ U V + S of one weight, with S_ij = a_i c_j q_ij in whole numbers q.

    U: (out_features, rank), V: (rank, in_features) and rows, a: (out_features,), in the stored dtype. columns, c:
    (in_features,), float32. codes, q: (out_features, in_features), whole numbers. runs: (out_features, in_features /
    run), int8, what the codes of each row and run of columns are multiples of; None where of 1.
    """

    rows: Tensor
    columns: Tensor
    codes: Tensor
    runs: Tensor | None = None

    @property
    def stored(self) -> Tensor:
        return self.rows

    @property
    def nnz(self) -> int:
        return int(torch.count_nonzero(self.codes))

    def sparse(self) -> Tensor:
        """S as a dense float32 matrix, (out_features, in_features)."""
        return (self.codes.float() * self.columns).mul_(self.rows.float()[:, None])

    def dense(self) -> Tensor:
        """U V + S in float32, (out_features, in_features)."""
        return super().dense() if self.rank else self.sparse()  # no second copy of a large embedding


@dataclass(frozen=True)
class Decomposition:
    """What a solver found for one weight, and what it measured on the way.

    errors: relative Frobenius error, ‖W − U V − S‖_F / ‖W‖_F, after each iteration, with factors as they are
    stored. weight_squared, residual_squared: the squared norms in it, at the end. output_errors: relative error of
    the layer's output, sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)), after each stage of a solver that knows H; never rising but
    for the last, which is that of the factors as they are stored. held_out_error: that error under a second moment that
    the solver did not see, None without one. log_step: of codes, log2 of the step Δ that they were made with.
    """

    factors: LowRankSparse | LowRankCodes
    errors: tuple[float, ...]
    weight_squared: float
    residual_squared: float
    output_errors: tuple[float, ...] = ()
    held_out_error: float | None = None
    log_step: float | None = None
