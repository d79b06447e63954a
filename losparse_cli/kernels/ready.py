"""One layer's product for a few rows of x on a CPU, with all that can be looked up beforehand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cpu import digits_of, few_threads
from .native import Layer, Library


class Ready:
    """Calls the C code for x of any leading sizes, or answers None where that would be wrong or not the fastest.

    layer: what the C code goes by, valid as long as the parameters named in `addresses` lie where they did. rows: for
    each number of rows of x whether the C code takes it whole. The looking up takes as long as a small layer's product.
    """

    __slots__ = (
        "_addresses", "_call", "_dtype", "_first", "_layer", "_level", "_m", "_more", "_n", "_rows", "_threads"
    )  # fmt: skip

    def __init__(
        self, code: Library, layer: Layer, form: str, dtype: torch.dtype, addresses: dict[str, int], rows: list[bool]
    ) -> None:
        coded, structured = bool(layer.bits), form in ("rows", "columns")
        self._call = code.coded if coded else code.block if structured else code.few
        self._first = (layer, form == "rows") if structured else (layer,)
        self._more = (digits_of(layer),) if coded else ()
        self._layer, self._level, self._m, self._n, self._dtype = layer, code.level, layer.m, layer.n, dtype
        self._addresses = tuple(addresses.items())
        self._rows = rows
        self._threads = [few_threads(layer, count, form) for count in range(len(rows))]

    def __call__(self, x: Tensor, parameters: dict[str, Any]) -> Tensor | None:
        """The product; None if a parameter has moved, x is of another kind, or autocast is on."""
        if torch._C._get_tracing_state() is not None or torch.is_autocast_enabled("cpu"):
            return None
        if type(x) is not Tensor or x.dtype is not self._dtype or not x.is_cpu or x.shape[-1] != self._n:
            return None
        rows = x.numel() // self._n
        if rows >= len(self._rows) or not self._rows[rows] or not x.is_contiguous():
            return None
        for name, address in self._addresses:
            if parameters[name].data_ptr() != address:
                return None
        y = x.new_empty((*x.shape[:-1], self._m))
        more = (*self._more, self._threads[rows], self._level)
        failed = self._call(*self._first, x.data_ptr(), y.data_ptr(), rows, *more)
        return None if failed else y
