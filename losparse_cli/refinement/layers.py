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
    """y = a ∘ (x Cᵀ) + x Vᵀ Uᵀ + b, where C (out, in) holds codes times the factors of their columns.

    The parameters are those of the layer whose place this takes: weight (out,), which is a, bias, U and V.
    """

    C: Tensor

    def __init__(self, layer: LowRankSparseLinear) -> None:
        super().__init__()
        self.weight, self.bias, self.U, self.V = layer.weight, layer.bias, layer.U, layer.V
        index, starts = layer._index_and_starts()
        ones = torch.ones_like(layer.weight)
        self.register_buffer("C", sparse(ones, index, starts, layer.spec.shape, layer.form), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        y = F.linear(x, self.C) * self.weight
        if self.U is not None and self.V is not None:
            y = y + F.linear(F.linear(x, self.V), self.U)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def unfold(model: Any, limit: int) -> None:
    """Put coded layers into this form if they take `limit` bytes at most; else each is unfolded when it computes."""
    layers = {name: layer for name, layer in compressed_layers(model).items() if layer.form.startswith("codes")}
    if sum(layer.out_features * layer.in_features * layer.weight.itemsize for layer in layers.values()) <= limit:
        for name, layer in layers.items():
            put(model, name, DenseCodes(layer))
