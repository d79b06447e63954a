"""LowRankSparseLinear: y = x Vᵀ Uᵀ + x Sᵀ + b, from the tensors as they are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .installed import kernels
from .layouts import LayerSpec
from .operator import product, sparse
from .stored import StoredIndex

MOST_ROWS = 8
"""For each column, of layers inside a block; vocabularies are wider."""


class LowRankSparseLinear(StoredIndex, nn.Linear):  # type: ignore[misc]
    """A linear layer whose weight is U V + S, with S in one of the layouts of `layouts`.

    An nn.Linear to whoever asks, so that LoRA and the like can be laid over it (peft knows layers by their class).

    Parameters: U (out, rank) and V (rank, in), absent at rank 0; weight (nnz,), the entries of S in row-major order,
    or (out,), the factors of its rows, where S is codes; bias (out,) or None. Buffers: the index tensors of the layout,
    until `settle` checks them and puts the index that `forward` computes with in their place; state dicts hold the
    layout's again. All parameters are trainable; the zeros of S, and all codes, have no parameter and stay as they are.
    """

    bias: Any  # nn.Parameter | None
    _is_hf_initialized = True  # whatever a model's own code does to new linear layers, it leaves this one alone

    def __init__(
        self,
        spec: LayerSpec,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        owner: StoredIndex | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a dense weight
        self.out_features, self.in_features = spec.shape
        self._hold(spec, device=device, dtype=dtype, owner=owner)
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features). RuntimeError for x of another width, as of nn.Linear."""
        if self._checked and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            y = self._at_once(x)
            if y is not None:
                return y
        if x.shape[-1] != self.in_features:
            raise RuntimeError(f"x has {x.shape[-1]} features, and this layer takes {self.in_features}.")
        if x.is_meta:
            return x.new_empty(*x.shape[:-1], self.out_features)
        index, starts = self._index_and_starts()
        values: Tensor = self.weight
        U, V, bias = self.U, self.V, self.bias
        kind = x.device.type
        casts = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if casts else values.dtype
        apart = self._trains_rows(dtype)
        if casts:
            x = x.to(dtype)
            U, V, bias = (t if t is None else t.to(dtype) for t in (U, V, bias))
            values = values if apart else values.to(dtype)
        if not apart or x.dtype != dtype:  # which the operator refuses
            return product(x, values, index, starts, U, V, bias, self.out_features, self.form)
        # Factors of rows after the product: their gradient is then a sum over tokens of what was computed already, and
        # they, which move by less than bfloat16 resolves, are not rounded.
        ones = values.new_ones(self.out_features, dtype=x.dtype)
        y = product(x, ones, index, starts, None, None, None, self.out_features, self.form)
        y = y * values if bias is None else torch.addcmul(bias, y, values)
        if U is not None and V is not None:
            y = y + F.linear(F.linear(x, V), U)
        return y.to(x.dtype)

    def _trains_rows(self, dtype: torch.dtype) -> bool:
        """Whether gradients of the factors of coded rows are computed, in a way that holds each product without them:
        not of float16, which is too narrow for that, nor of an output head, where it takes more than it spares."""
        fits = dtype != torch.float16 and self.out_features <= MOST_ROWS * self.in_features
        return fits and torch.is_grad_enabled() and self.weight.requires_grad and self.form.startswith("codes")

    def sparse(self) -> Tensor:
        """S as a dense (out, in) matrix, without gradients."""
        index, starts = self._index_and_starts()
        return sparse(self.weight.detach(), index, starts, self.spec.shape, self.form)

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The product without looking anything up; None where that is not possible."""
        makers = kernels()
        if self._ready is None or self._ready[0] is not makers:
            index, starts = self._index_and_starts()
            parts = (self.weight, index, starts, self.U, self.V, self.bias)
            self._ready = makers, makers.ready(*parts, self.spec.shape, self.form)
        call = self._ready[1]
        found: Tensor | None = None if call is None else call(x, self._parameters)
        return found

    def extra_repr(self) -> str:
        s = self.spec
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={s.rank}, nnz={s.nnz}, "
            f"pattern={s.pattern}, layout={s.layout}, bias={self.bias is not None}"
        )
