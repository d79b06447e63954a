"""Compressed layers one by one, beside nn.Linear of the same shape and dtype."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .report import LayerSpeed
from .timing import interleaved

COLD_BYTES = 1 << 27
"""Dense weights that are read between two uses of a layer: more than a cache holds, as in a model."""
MOST_COPIES = 256


def compressed_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> layer. By the class's name: a checkpoint whose own code was run has a class of its own."""
    return {name: m for name, m in model.named_modules() if type(m).__name__ == "LowRankSparseLinear"}


def by_shape(layers: Sequence[Any]) -> list[list[Any]]:
    """Layers of the same shape, pattern, form and dtype together, the largest share of the work first."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for layer in layers:
        key = (layer.spec.shape, layer.spec.pattern, layer.form, layer.weight.dtype, layer.bias is None)
        groups.setdefault(key, []).append(layer)
    return sorted(groups.values(), key=lambda group: -len(group) * group[0].in_features * group[0].out_features)


def layer_speeds(layers: Sequence[Any], rows: Sequence[int], rounds: int) -> Iterator[LayerSpeed]:
    """For each shape and each number of rows, at sizes whose weights no cache keeps from one use to the next."""
    for group in by_shape(layers):
        first = group[0]
        m, n = first.spec.shape
        dtype, device, bias = first.weight.dtype, first.weight.device, first.bias
        dense_nbytes = m * n * dtype.itemsize
        copies = min(MOST_COPIES, max(2, -(-COLD_BYTES // dense_nbytes)))
        weights = [torch.randn(m, n, dtype=dtype, device=device) for _ in range(copies)]
        for count in rows:
            x = torch.randn(count, n, dtype=dtype, device=device)
            with torch.inference_mode():
                dense, ours = interleaved(
                    (
                        [partial(nn.functional.linear, x, W, bias) for W in weights],
                        [partial(layer, x) for layer in group],
                    ),
                    rounds,
                    device,
                )
            yield LayerSpeed(
                (m, n), len(group), round(statistics.mean(layer.spec.rank for layer in group)),
                statistics.mean(layer.spec.nnz for layer in group) / (m * n), first.spec.pattern, first.form, count,
                ours, dense, round(statistics.mean(_nbytes(layer) for layer in group)), dense_nbytes,
            )  # fmt: skip


def _nbytes(layer: Any) -> int:
    """Bytes that one product reads: those of the tensors in memory, which have settled by now."""
    held = [t for part in (layer, *layer._owner) for t in (*part.parameters(), *part.buffers())]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in held}.values())
