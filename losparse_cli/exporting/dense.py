"""U V + S of each layer, summed in float32 and rounded once to the stored dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor

from ..checkpoint.config import FusedTensor, fused_tensors, layer_specs, layer_tensors
from ..checkpoint.layers import read_finite_layer
from ..checkpoint.reader import TensorEntry
from ..checkpoint.source import Checkpoint
from ..checkpoint.writer import tensor_part
from ..errors import CheckpointError, SourceError
from ..models.experts import refuse_missing_experts, refuse_surplus_experts
from ..models.names import NameMap
from ..models.skeleton import empty_model
from ..shim.layouts import LayerSpec
from .folder import TensorPart, Unit, copied

Matrix = Callable[[], Tensor]
"""Makes a layer's dense form, as it lies on disk."""


def dense_units(checkpoint: Checkpoint) -> list[Unit]:
    """Every tensor of the dense form of a compressed checkpoint, in the order of its own.

    CheckpointError if config.json asks for other experts than there are.
    """
    fused = fused_tensors(checkpoint)
    _check_experts(checkpoint)
    made: dict[str, Unit] = {}
    matrices: dict[str, tuple[tuple[int, ...], Matrix]] = {}
    used: set[str] = set()
    for name, spec in layer_specs(checkpoint).items():
        parts = layer_tensors(checkpoint, name, spec)
        weight = parts["weight"]
        matrix = partial(_dense, checkpoint, name, spec, parts)
        nbytes = spec.shape[0] * spec.shape[1] * _itemsize(weight)
        matrices[weight.name] = spec.shape, matrix
        made[weight.name] = Unit((weight.name,), nbytes, partial(_alone, weight.name, matrix))
        used |= {entry.name for entry in parts.values()}
    for tensor, one in fused.items():
        unit = _together(checkpoint, tensor, one, matrices)
        first, *others = one.parts
        made = {name: other for name, other in made.items() if name not in others} | {first: unit}
        used |= set(others)
    return [
        made.get(name) or copied(checkpoint, entry)
        for name, entry in checkpoint.entries.items()
        if name in made or name not in used
    ]


def _itemsize(entry: TensorEntry) -> int:
    return {"F64": 8, "F32": 4}.get(entry.dtype, 2)


def _check_experts(checkpoint: Checkpoint) -> None:
    """As config.json decides what loads: with other experts than it asks for the result would be another model."""
    if not any(".experts." in name for name in checkpoint.entries):
        return
    try:
        model = empty_model(checkpoint.folder, checkpoint.config)
    except SourceError:  # of code of its own, or too new for transformers: nothing is known of its experts
        return
    disk = NameMap(model, checkpoint.entries).disk
    for refuse in (refuse_surplus_experts, refuse_missing_experts):
        refuse(model, disk, checkpoint.folder)


def _dense(checkpoint: Checkpoint, name: str, spec: LayerSpec, parts: dict[str, TensorEntry]) -> Tensor:
    factors = read_finite_layer(checkpoint, name, spec, parts)
    W = factors.dense().to(factors.U.dtype)
    return W.T.contiguous() if spec.transposed else W


def _alone(name: str, matrix: Matrix) -> list[TensorPart]:
    return [tensor_part(name, matrix())]


def _together(
    checkpoint: Checkpoint, tensor: str, fused: FusedTensor, matrices: Mapping[str, tuple[tuple[int, ...], Matrix]]
) -> Unit:
    """The tensor of the dense checkpoint that holds a matrix of all experts, one of them in memory at a time.

    matrices: name on disk of a compressed one -> its shape, and what makes it; others are read. CheckpointError if one
    is missing, or of another shape or dtype than the first.
    """
    files = {file.path: file for file in checkpoint.files}
    entries = [checkpoint.entries.get(name) for name in fused.parts]
    missing = next((name for name, entry in zip(fused.parts, entries, strict=True) if entry is None), None)
    if missing is not None:
        raise CheckpointError(f"{checkpoint.address} holds no {missing}, a part of {tensor}. Compress the model again.")
    found = [entry for entry in entries if entry is not None]
    shapes = {tuple(matrices[entry.name][0] if entry.name in matrices else entry.shape) for entry in found}
    dtypes = {entry.dtype for entry in found}
    if len(shapes) != 1 or len(dtypes) != 1:
        raise CheckpointError(
            f"The parts of {tensor} in {checkpoint.address} differ in shape or dtype. Compress the model again."
        )
    [(m, n)], [dtype] = shapes, dtypes

    def matrix(entry: TensorEntry) -> Tensor:
        W = matrices[entry.name][1]() if entry.name in matrices else files[entry.path].read(entry)
        return W.T.contiguous() if fused.transposed else W

    def pieces() -> Iterator[memoryview]:
        for entry in found:
            yield from tensor_part(tensor, matrix(entry))[3]

    shape = (fused.count, n, m) if fused.transposed else (fused.count, m, n)
    nbytes = fused.count * m * n * _itemsize(found[0])
    return Unit((tensor,), nbytes, lambda: [(tensor, dtype, shape, pieces())])
