"""A compressed layer on disk -> its factors in memory."""

from __future__ import annotations

import torch

from ..errors import CheckpointError
from ..shim.codec import decode
from ..shim.layouts import LayerSpec
from .reader import TensorEntry
from .source import Checkpoint


def read_layer(
    checkpoint: Checkpoint, name: str, spec: LayerSpec, entries: dict[str, TensorEntry]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U, V, values, support) of one layer, every index checked; U and V have rank 0 columns if absent.

    CheckpointError names the layer if an index leaves its range.
    """
    files = {file.path: file for file in checkpoint.files}
    tensors = {suffix: files[entry.path].read(entry) for suffix, entry in entries.items()}
    try:
        return unpack_layer(spec, tensors)
    except ValueError as error:
        path = entries["weight"].path
        raise CheckpointError(
            f"{path}: layer {name} has a damaged index ({error}). Download or compress it again."
        ) from error


def unpack_layer(
    spec: LayerSpec, tensors: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U, V, values, support) from the stored tensors by suffix; ValueError if an index leaves its range."""
    support = decode(spec, {k: t for k, t in tensors.items() if k.startswith("S_")})
    m, n = spec.shape
    values = tensors["weight"]
    U = tensors.get("U", values.new_zeros(m, 0))
    V = tensors.get("V", values.new_zeros(0, n))
    return U, V, values, support
