"""What the shim calls: each product goes the way that `choice` names, or back to plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..shim.layouts import LayerSpec, n_of_m, position_bits
from . import cpu
from .choice import cpu_way, forced
from .native import LEVELS, library

WIDEST = 1 << 16
"""Columns that sparse.c can number."""


class Kernels:
    """See shim.operator.Kernels; every method answers None where plain torch has to do."""

    def __init__(self) -> None:
        self.forced = forced()

    def product(
        self, x: Tensor, values: Tensor, index: Tensor, starts: Tensor | None, U: Tensor | None, V: Tensor | None,
        bias: Tensor | None, out_features: int, form: str,
    ) -> Tensor | None:  # fmt: skip
        parts = [t for t in (x, values, index, starts, U, V, bias) if t is not None]
        if not _plain(parts) or any(t.is_floating_point() and t.dtype != x.dtype for t in parts):
            return None
        flat = x.reshape(-1, x.shape[-1])
        if not (flat.shape[0] and values.numel() and flat.shape[1] < WIDEST):
            return None
        if x.device.type == "cpu":
            y = self._on_cpu(flat.contiguous(), values, index, starts, U, V, bias, out_features, form)
        else:
            y = self._on_gpu(flat.contiguous(), values, index, starts, U, V, bias, out_features, form)
        # Not a view: the operator's output may be changed in place.
        if y is None or x.dim() == 2:
            return y
        return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], out_features))

    def _on_cpu(
        self, x: Tensor, values: Tensor, index: Tensor, starts: Tensor | None, U: Tensor | None, V: Tensor | None,
        bias: Tensor | None, m: int, form: str,
    ) -> Tensor | None:  # fmt: skip
        if form in ("rows", "columns"):
            return cpu.block(x, values, index, U, V, bias, m, form)
        code = library()
        if code is None or starts is None or not _contiguous(values, index, starts, U, V, bias):
            return None
        rows, n = x.shape
        way = self.forced or cpu_way(
            form, rows, values.numel() / (m * n), native=values.dtype in cpu.DTYPES,
            half=values.element_size() == 2, spreads=code.level >= LEVELS.index("AVX-512"),
        )  # fmt: skip
        layer = cpu.describe(values, index, starts, U, V, bias, (m, n), form)
        if way in ("spread", "gather"):
            return cpu.few(code, layer, x)
        if way in ("walk", "tile") and values.element_size() in (2, 4):
            y = cpu.low_rank(x, U, V, bias, m)
            return cpu.walk(code, layer, x, y) if way == "walk" and layer.dtype >= 0 else cpu.tile(code, layer, x, y)
        return None

    def _on_gpu(
        self, x: Tensor, values: Tensor, index: Tensor, starts: Tensor | None, U: Tensor | None, V: Tensor | None,
        bias: Tensor | None, m: int, form: str,
    ) -> Tensor | None:  # fmt: skip
        return None

    def spread(self, values: Tensor, index: Tensor, starts: Tensor, shape: tuple[int, int]) -> Tensor | None:
        code = library()
        form = "bits" if starts.dim() == 1 else "gaps"
        if code is None or not _plain((values, index, starts)) or values.device.type != "cpu":
            return None
        if values.element_size() not in (2, 4) or shape[1] >= WIDEST or not _contiguous(values, index, starts):
            return None
        dense = values.new_empty(shape)
        layer = cpu.describe(values, index, starts, None, None, None, shape, form)
        failed = code.expand(
            layer, dense.data_ptr(), 0, shape[0], values.element_size(), torch.get_num_threads(), code.level
        )
        return None if failed else dense

    def bits(self, spec: LayerSpec, index: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        tensors = list(index.values())
        code = library()
        if code is None or not _plain(tensors) or any(t.device.type != "cpu" for t in tensors):
            return None
        for suffix, (shape, dtype) in spec.tensor_shapes(torch.float32).items():
            if suffix in index and (tuple(index[suffix].shape) != shape or index[suffix].dtype != dtype):
                return None  # the plain way says what is wrong
        if not _contiguous(*tensors):
            return None
        if spec.layout == "bitmask":
            starts = cpu.starts_of_bits(code, index["S_mask"], spec.shape, spec.nnz)
            return None if starts is None else (index["S_mask"], starts)
        if spec.layout in ("gaps4", "gaps8"):
            per_byte = 2 if spec.layout == "gaps4" else 1
            return cpu.bits_of_gaps(
                code, index["S_gaps"], index["S_offsets"], spec.group_rows, spec.shape, spec.nnz, per_byte
            )
        if spec.layout == "n:m":
            keep, group = n_of_m(spec.pattern)
            return cpu.bits_of_groups(code, index["S_index"], keep, group, position_bits(group), spec.shape)
        return None


def _plain(tensors: Any) -> bool:
    """Whether these are ordinary tensors with memory of their own, outside any tracing."""
    if torch._C._get_tracing_state() is not None:
        return False
    return all(type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided for t in tensors)


def _contiguous(*tensors: Tensor | None) -> bool:
    return all(t is None or t.is_contiguous() for t in tensors)
