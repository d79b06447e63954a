"""A compressed checkpoint's tensors, as an engine hands them out one at a time -> layers that compute its share.

Engines put layers of a checkpoint one below the other (q, k and v), and give each of several ranks some rows, or some
columns. No engine is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.layers import unpack_layer
from ..linalg.factors import LowRankCodes, LowRankSparse
from ..shim.codec import smallest
from ..shim.layouts import COLUMN_FACTORS, LayerSpec
from ..shim.linear import LowRankSparseLinear

Factors = LowRankCodes | LowRankSparse
Kind = TypeVar("Kind", LowRankCodes, LowRankSparse)
Ranges = Sequence[tuple[int, int]]
"""Rows, from and up to, in the order in which they are wanted."""


@dataclass
class Part:
    """One layer of the checkpoint on its way into an engine's. spec: None for one that stayed dense. rows: those that
    this rank computes, None for all; columns: likewise, one range. tensors: what has arrived, by suffix."""

    name: str
    spec: LayerSpec | None
    rows: Ranges | None = None
    columns: tuple[int, int] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def take(self, suffix: str, tensor: Tensor) -> None:
        """A tensor arrives. ValueError if the layer has none of this name, or has it already."""
        if suffix not in self._expected:
            raise ValueError(f"The weights hold {self.name}.{suffix}, of which config.json says nothing. {_AGAIN}")
        if suffix in self.tensors:
            raise ValueError(f"The weights hold {self.name}.{suffix} twice. {_AGAIN}")
        self.tensors[suffix] = tensor.clone()  # what the engine hands out is a view of a file

    @property
    def _expected(self) -> tuple[str, ...]:
        return ("weight",) if self.spec is None else tuple(self.spec.tensor_shapes(torch.float32))

    def factors(self, dtype: torch.dtype) -> Factors | Tensor:
        """This rank's share of U, V and S, or of the dense weight; ValueError if a tensor is missing or damaged."""
        for suffix in self._expected:
            if suffix not in self.tensors:
                raise ValueError(f"The weights hold no {self.name}.{suffix}. {_AGAIN}")
        tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in self.tensors.items()}
        if self.spec is None:
            W = tensors["weight"]
            return _columns(_rows(W, self.rows), self.columns)
        for suffix, (shape, _) in self.spec.tensor_shapes(dtype).items():
            if tuple(tensors[suffix].shape) != shape:
                raise ValueError(
                    f"{self.name}.{suffix} has shape {tuple(tensors[suffix].shape)} in the weights and {shape} in "
                    f"config.json. {_AGAIN}"
                )
        try:
            whole = unpack_layer(self.spec, tensors)
        except ValueError as error:
            raise ValueError(f"Layer {self.name} cannot be read: {error}. {_AGAIN}") from error
        return share(whole, self.rows, self.columns)


_AGAIN = "Download or compress the checkpoint again."


def share(factors: Factors, rows: Ranges | None, columns: tuple[int, int] | None) -> Factors:
    """Some rows and columns of U V + S: U by rows, V by columns, S by both."""
    U, V = _rows(factors.U, rows), _columns(factors.V, columns)
    if isinstance(factors, LowRankCodes):
        c = factors.columns if columns is None else factors.columns[slice(*columns)]
        codes = _columns(_rows(factors.codes, rows), columns)  # what runs they lie in only matters on disk
        return LowRankCodes(U, V, _rows(factors.rows, rows), c, codes)
    if rows is None and columns is None:
        return factors
    support = _columns(_rows(factors.support, rows), columns)
    S = _columns(_rows(factors.sparse(), rows), columns)
    return LowRankSparse(U, V, S[support].to(factors.values.dtype), support)


def _rows(matrix: Tensor, rows: Ranges | None) -> Tensor:
    return matrix if rows is None else torch.cat([matrix[begin:end] for begin, end in rows])


def _columns(matrix: Tensor, columns: tuple[int, int] | None) -> Tensor:
    return matrix if columns is None else matrix[:, slice(*columns)].contiguous()


def layers(parts: Sequence[Part], dtype: torch.dtype, device: torch.device) -> nn.ModuleList:
    """What computes these parts, one below the other: as few layers as there can be. ValueError as `Part.factors`."""
    made: list[Factors | Tensor] = []
    for part in parts:
        one = part.factors(dtype)
        part.tensors.clear()
        above = _stacked(made[-1], one) if made else None
        if above is None:
            made.append(one)
        else:
            made[-1] = above
    return nn.ModuleList([_layer(one, dtype, device) for one in made])


def _stacked(above: Factors | Tensor, below: Factors | Tensor) -> Factors | Tensor | None:
    """One matrix of two that read the same input; None where they are of unlike kinds."""
    if isinstance(above, Tensor) and isinstance(below, Tensor):
        return torch.cat((above, below))
    if isinstance(above, LowRankCodes) and isinstance(below, LowRankCodes):
        if not torch.equal(above.columns, below.columns):
            return None
        wide = torch.promote_types(above.codes.dtype, below.codes.dtype)
        codes = torch.cat((above.codes.to(wide), below.codes.to(wide)))
        return replace(_both(above, below), rows=torch.cat((above.rows, below.rows)), codes=codes)
    if isinstance(above, LowRankSparse) and isinstance(below, LowRankSparse):
        values, support = torch.cat((above.values, below.values)), torch.cat((above.support, below.support))
        return replace(_both(above, below), values=values, support=support)
    return None


def _both(above: Kind, below: Kind) -> Kind:
    """`above` with V of both and U of each in columns of its own."""
    left, right = F.pad(above.U, (0, below.rank)), F.pad(below.U, (above.rank, 0))
    return replace(above, U=torch.cat((left, right)), V=torch.cat((above.V, below.V)))


def _layer(factors: Factors | Tensor, dtype: torch.dtype, device: torch.device) -> nn.Module:
    if isinstance(factors, Tensor):
        dense = nn.Linear(1, 1, bias=False, device="meta")
        dense.weight = nn.Parameter(factors.to(device, dtype), requires_grad=False)
        return dense
    m, n = factors.U.shape[0], factors.V.shape[1]
    index: dict[str, Tensor] = {}
    if isinstance(factors, LowRankCodes):
        spec = LayerSpec((m, n), factors.rank, factors.nnz, "unstructured", "codes", index_bytes=1)
        values = factors.rows
    else:
        spec, index = smallest(factors.support, factors.rank, "unstructured")
        values = factors.values
    layer = LowRankSparseLinear(spec, bias=False, device=device, dtype=dtype)
    found = {"weight": values, **index, **({"U": factors.U, "V": factors.V} if factors.rank else {})}
    with torch.no_grad():
        for suffix, tensor in found.items():
            getattr(layer, suffix).copy_(tensor)
    layer.requires_grad_(False)
    if isinstance(factors, LowRankCodes):
        scale = torch.searchsorted(COLUMN_FACTORS, factors.columns.cpu()).to(torch.uint8)
        layer.settle_with(factors.codes.to(device), scale.to(device))
    else:
        layer.settle()
    return layer


def product(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """x (..., in) -> (..., out) of all the layers, one below the other."""
    y = [F.linear(x, layer.weight) if type(layer) is nn.Linear else layer(x) for layer in layers]
    return y[0] if len(y) == 1 else torch.cat(y, -1)
