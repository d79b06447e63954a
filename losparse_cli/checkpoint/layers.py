"""A compressed layer in memory <-> on disk."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..budget.plan import LayerPlan
from ..errors import CheckpointError
from ..shim.codec import decode, smallest
from ..shim.layouts import LayerSpec
from .reader import TensorEntry
from .source import Checkpoint


def encode_layer(
    plan: LayerPlan, U: Tensor, V: Tensor, values: Tensor, support: Tensor
) -> tuple[LayerSpec, dict[str, Tensor]]:
    """The entry in config.json of a layer's factors, and its tensors as stored, by suffix.

    U: (out, rank). V: (rank, in). values: (nnz,), in row-major order. support: (out, in), bool, where they lie.
    """
    layer, rank = plan.layer, U.shape[1]
    spec, index = smallest(support, rank, plan.pattern)
    disk = layer.disk_module if layer.disk_module != layer.name else ""
    spec = replace(spec, transposed=layer.transposed, tensor=disk)
    tensors = {"U": U, "V": V} if rank else {}
    tensors |= {"weight": values, **index}
    return spec, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def read_layer(
    checkpoint: Checkpoint, name: str, spec: LayerSpec, entries: dict[str, TensorEntry]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def unpack_layer(spec: LayerSpec, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(U, V, values, support) from the stored tensors by suffix; ValueError if an index leaves its range."""
    support = decode(spec, {k: t for k, t in tensors.items() if k.startswith("S_")})
    m, n = spec.shape
    values = tensors["weight"]
    U = tensors.get("U", values.new_zeros(m, 0))
    V = tensors.get("V", values.new_zeros(0, n))
    return U, V, values, support
