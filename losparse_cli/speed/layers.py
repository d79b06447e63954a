"""Compressed layers one by one, beside nn.Linear of the same shape and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    """Layers of the same shape, pattern and form together, the largest share of the work first."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for layer in layers:
        groups.setdefault((layer.spec.shape, layer.spec.pattern, layer.form), []).append(layer)
    return sorted(groups.values(), key=lambda group: -len(group) * group[0].in_features * group[0].out_features)


def layer_speeds(
    layers: Sequence[Any], rows: Sequence[int], rounds: int, on_case: Callable[[], object] = lambda: None
) -> Iterator[LayerSpeed]:
    """For each shape and each number of rows, at sizes whose weights no cache keeps from one use to the next."""
    for group in by_shape(layers):
        first = group[0]
        m, n = first.spec.shape
        dtype, device = first.weight.dtype, first.weight.device
        dense_nbytes = m * n * dtype.itemsize
        copies = min(MOST_COPIES, max(2, -(-COLD_BYTES // dense_nbytes)))
        weights = [torch.randn(m, n, dtype=dtype, device=device) for _ in range(copies)]
        for count in rows:
            x = torch.randn(count, n, dtype=dtype, device=device)
            with torch.inference_mode():
                dense, ours = interleaved(
                    (
                        [lambda W=W, x=x: nn.functional.linear(x, W) for W in weights],  # type: ignore[misc]
                        [lambda layer=layer, x=x: layer(x) for layer in group],  # type: ignore[misc]
                    ),
                    rounds,
                    device,
                )
            tensors = [t for t in (*first.parameters(), *first.buffers()) if t is not None]
            yield LayerSpeed(
                (m, n), len(group), first.spec.rank, sum(g.spec.nnz for g in group) / len(group) / (m * n),
                first.spec.pattern, first.form, count, ours, dense,
                sum(t.numel() * t.element_size() for t in tensors), dense_nbytes,
            )  # fmt: skip
            on_case()
