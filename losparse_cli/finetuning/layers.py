"""The form a linear layer has while it is trained: U, V, and S as one parameter, with what pruning knows of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..linalg.factors import LowRankSparse

NEURONS = ("rows", "columns")
"""Patterns of which S loses whole neurons; of all others single entries."""


class TrainedLinear(nn.Module):
    """y = x (U V + S)ᵀ + b, everything trainable.

    Parameters: U (out, rank) and V (rank, in), absent at rank 0; bias or None; S, absent if it is empty. S consists of
    units, which live or are pruned: its rows, its columns, or for other patterns its entries. `dense`: all (out, in)
    are there; otherwise only the units that `factors` has, and the others can never come: S is then (kept rows, in),
    (out, kept columns) or, its entries in row-major order, (nnz,).

    Buffers, one element a unit, which are part of the state, so that training goes on exactly: kept, window (importance
    summed since masks were chosen last), steps (how many were summed) and smoothed (importance over all windows).
    transposed: as of GPT-2's Conv1D, for when the layer is written.
    """

    U: Tensor | None
    V: Tensor | None
    S: Tensor | None
    bias: Tensor | None
    index: Tensor | None
    kept: Tensor
    window: Tensor
    smoothed: Tensor
    steps: Tensor

    def __init__(
        self, factors: LowRankSparse, bias: Tensor | None, *, pattern: str, dense: bool, transposed: bool = False
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = self.shape = m, n = tuple(factors.support.shape)
        self.pattern, self.transposed, self.rank = pattern, transposed, factors.U.shape[1]
        self.dimension = NEURONS.index(pattern) if pattern in NEURONS else None
        for name, factor in (("U", factors.U), ("V", factors.V)):
            self.register_parameter(name, nn.Parameter(factor.float().clone()) if self.rank else None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        values, index = factors.sparse().float(), None
        if not dense and self.dimension is None:
            index = factors.support.flatten().nonzero().squeeze(1)
            values = factors.values.float()
        elif not dense:
            index = factors.support.any(dim=1 - self.dimension).nonzero().squeeze(1)  # type: ignore[operator]
            values = values.index_select(self.dimension, index)  # type: ignore[arg-type]
        self.S = nn.Parameter(values.clone()) if values.numel() else None
        self.register_buffer("index", index, persistent=False)
        units = values.shape[self.dimension] if self.dimension is not None else values.numel()
        self.unit_size = (n, m)[self.dimension] if self.dimension is not None else 1
        self.register_buffer("kept", torch.ones(units, dtype=torch.bool, device=values.device))
        self.register_buffer("window", torch.zeros(units, device=values.device))
        self.register_buffer("smoothed", torch.zeros(units, device=values.device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=values.device))

    @property
    def weight(self) -> Tensor:
        """U V + S, (out, in), with gradients. Some models ask it for dtype and device."""
        if self.S is None:
            return self._factor("U") @ self._factor("V")
        W = self.S
        if self.index is not None:
            zeros = W.new_zeros(self.shape)
            if self.dimension is None:
                W = zeros.view(-1).scatter(0, self.index, W).view(self.shape)
            else:
                W = zeros.index_copy(self.dimension, self.index, W)
        return W if self.U is None or self.V is None else torch.addmm(W, self.U, self.V)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        if self.S is None:
            return F.linear(F.linear(x, self._factor("V")), self._factor("U"), self.bias)
        # One product with the sum, and not three: a batch has more rows than U has columns.
        return F.linear(x, self.weight, self.bias)

    def _factor(self, name: str) -> Tensor:
        factor: Tensor | None = getattr(self, name)
        assert factor is not None, "a layer has factors or an S"
        return factor

    def mean_of_units(self, scores: Tensor) -> Tensor:
        """The mean over each unit of `scores`, which has the shape of the parameter S: (units,)."""
        return scores.flatten() if self.dimension is None else scores.mean(dim=1 - self.dimension)

    def mask(self) -> Tensor:
        """1 for kept and 0 for pruned units; it broadcasts to the parameter S."""
        assert self.S is not None, "only what has an S is pruned"
        kept = self.kept.to(torch.float32)
        if self.dimension is None:
            return kept.view(self.S.shape)
        return kept[:, None] if self.dimension == 0 else kept

    @torch.no_grad()
    def factors(self, dtype: torch.dtype) -> LowRankSparse:
        """U, V and S in `dtype`, with the support that the masks leave."""
        m, n = self.shape
        place = self.kept.device
        U = torch.zeros(m, 0, dtype=dtype, device=place) if self.U is None else self.U.detach().to(dtype)
        V = torch.zeros(0, n, dtype=dtype, device=place) if self.V is None else self.V.detach().to(dtype)
        if self.S is None:
            return LowRankSparse(U, V, U.new_zeros(0), torch.zeros(m, n, dtype=torch.bool, device=place))
        kept = (self.mask() > 0).expand_as(self.S)
        values = self.S.detach()[kept].to(dtype)
        if self.index is not None:
            support = torch.zeros(m, n, dtype=torch.bool, device=place)
            if self.dimension is None:
                support.view(-1)[self.index] = kept
            else:
                support.index_copy_(self.dimension, self.index, kept)
            kept = support
        return LowRankSparse(U, V, values, kept)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, {self.pattern}"
