"""The form of coded layers while a whole model is trained: dense, where memory allows, since codes do not move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..finetuning.conversion import compressed_layers, put
from ..shim.linear import LowRankSparseLinear
from ..shim.operator import sparse


class DenseCodes(nn.Module):
    """y = a ∘ (x Cᵀ) + x Vᵀ Uᵀ + b, where C (out, in) holds codes times the factors of their columns, in `dtype`.

    y is of that dtype, too; a, which moves by less than bfloat16 resolves, is not rounded before.

    The parameters are those of the layer whose place this takes: weight (out,), which is a, bias, U and V.
    """

    C: Tensor

    def __init__(self, layer: LowRankSparseLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias, self.U, self.V = layer.weight, layer.bias, layer.U, layer.V
        index, starts = layer._index_and_starts()
        ones = torch.ones_like(layer.weight)
        C = sparse(ones, index, starts, layer.spec.shape, layer.form).to(dtype)
        self.register_buffer("C", C, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        y = F.linear(x.to(self.C.dtype), self.C) * self.weight
        if self.U is not None and self.V is not None:
            y = y + F.linear(F.linear(x, self.V), self.U)
        return (y if self.bias is None else y + self.bias).to(self.C.dtype)


@torch.no_grad()
def unfold(model: Any, limit: int, dtype: torch.dtype) -> None:
    """Put coded layers into this form, in `dtype`, if they take `limit` bytes at most; else each is unfolded when it
    computes."""
    layers = {name: layer for name, layer in compressed_layers(model).items() if layer.form.startswith("codes")}
    if sum(layer.out_features * layer.in_features * dtype.itemsize for layer in layers.values()) <= limit:
        for name, layer in layers.items():
            put(model, name, DenseCodes(layer, dtype))
