"""LowRankSparseLinear: y = x Vᵀ Uᵀ + x Sᵀ + b, from the tensors as they are stored."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codec import decode, pack_bits, unpack_bits
from .layouts import LayerSpec


class LowRankSparseLinear(nn.Module):
    """A linear layer whose weight is U V + S, with S in one of the layouts of `layouts`.

    Parameters: U (out, rank) and V (rank, in), absent at rank 0; weight (nnz,), the entries of S in
    row-major order; bias (out,) or None. Buffers: the index tensors of the layout. All parameters are
    trainable; the zeros of S have no parameter and stay zero.
    """

    weight: Tensor
    U: Tensor | None
    V: Tensor | None

    def __init__(
        self,
        spec: LayerSpec,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.out_features, self.in_features = spec.shape
        dtype = dtype or torch.get_default_dtype()
        for name in ("U", "V"):
            self.register_parameter(name, None)
        for name, (shape, kind) in spec.tensor_shapes(dtype).items():
            empty = torch.empty(shape, dtype=kind, device=device)
            if kind.is_floating_point:
                self.register_parameter(name, nn.Parameter(empty))
            else:
                self.register_buffer(name, empty)
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device)) if bias else None
        self._index: Tensor | None = None  # what `forward` works from: checked at first use, never saved

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        layout = self.spec.layout
        if self.spec.nnz == 0:
            y = x.new_zeros(*x.shape[:-1], self.out_features)
        elif layout == "columns":
            block = self.weight.view(self.out_features, -1)
            y = F.linear(x.index_select(-1, self._checked_index()), block)
        elif layout == "rows":
            part = F.linear(x, self.weight.view(-1, self.in_features))
            y = part.new_zeros(*x.shape[:-1], self.out_features).index_copy(-1, self._checked_index().long(), part)
        else:
            y = F.linear(x, self.sparse())
        if self.U is not None and self.V is not None:
            y = y + F.linear(F.linear(x, self.V), self.U)
        return y if self.bias is None else y + self.bias

    def sparse(self) -> Tensor:
        """S as a dense (out, in) matrix; gradients flow to the stored entries alone."""
        support = self.support()
        return torch.zeros_like(support, dtype=self.weight.dtype).masked_scatter(support, self.weight)

    def dense(self) -> Tensor:
        """U V + S in float32, (out, in)."""
        S = self.sparse().float()
        if self.U is None or self.V is None:
            return S
        return torch.addmm(S, self.U.float(), self.V.float())

    def support(self) -> Tensor:
        """Where S holds entries: (out, in), bool. ValueError if the index is damaged."""
        if self.spec.layout in ("rows", "columns"):
            return decode(self.spec, dict(self.named_buffers(recurse=False)))
        return unpack_bits(self._checked_index(), self.in_features)

    def _checked_index(self) -> Tensor:
        """The kept rows or columns for those layouts, the support's bits for all others.

        Every index is checked here, once, and again after the layer has moved; ValueError if one is wrong.
        """
        if self._index is None or self._index.device != self.weight.device:
            support = decode(self.spec, dict(self.named_buffers(recurse=False)))
            as_stored = {"bitmask": "S_mask", "rows": "S_rows", "columns": "S_columns"}.get(self.spec.layout)
            self._index = getattr(self, as_stored) if as_stored else pack_bits(support)
        return self._index

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._index = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._index = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        s = self.spec
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={s.rank}, nnz={s.nnz}, "
            f"pattern={s.pattern}, layout={s.layout}, bias={self.bias is not None}"
        )
