"""U V + S of each layer, summed in float32 and rounded once to the stored dtype."""

from __future__ import annotations

from functools import partial

from ..checkpoint.config import dense_config, layer_specs, layer_tensors
from ..checkpoint.layers import read_finite_layer
from ..checkpoint.reader import TensorEntry
from ..checkpoint.source import Checkpoint
from ..checkpoint.writer import tensor_part
from ..errors import SourceError
from ..models.experts import refuse_missing_experts, refuse_surplus_experts
from ..models.names import NameMap
from ..models.skeleton import empty_model
from ..shim.layouts import LayerSpec
from .folder import TensorPart, Unit, copied


def dense_units(checkpoint: Checkpoint) -> list[Unit]:
    """Every tensor of the dense form of a compressed checkpoint, in the order of its own.

    CheckpointError if config.json asks for other experts than there are.
    """
    _check_experts(checkpoint)
    made: dict[str, Unit] = {}
    used: set[str] = set()
    for name, spec in layer_specs(checkpoint).items():
        parts = layer_tensors(checkpoint, name, spec)
        weight = parts["weight"]
        itemsize = {"F64": 8, "F32": 4}.get(weight.dtype, 2)
        nbytes = spec.shape[0] * spec.shape[1] * itemsize
        made[weight.name] = Unit((weight.name,), nbytes, partial(_dense, checkpoint, name, spec, parts))
        used |= {entry.name for entry in parts.values()}
    return [
        made.get(name) or copied(checkpoint, entry)
        for name, entry in checkpoint.entries.items()
        if name in made or name not in used
    ]


def _check_experts(checkpoint: Checkpoint) -> None:
    """As config.json decides what loads: with other experts than it asks for the result would be another model."""
    if not any(".experts." in name for name in checkpoint.entries):
        return
    try:
        model = empty_model(checkpoint.folder, dense_config(checkpoint.config))
    except SourceError:  # of code of its own, or too new for transformers: nothing is known of its experts
        return
    disk = NameMap(model, checkpoint.entries).disk
    for refuse in (refuse_surplus_experts, refuse_missing_experts):
        refuse(model, disk, checkpoint.folder)


def _dense(checkpoint: Checkpoint, name: str, spec: LayerSpec, parts: dict[str, TensorEntry]) -> list[TensorPart]:
    factors = read_finite_layer(checkpoint, name, spec, parts)
    W = factors.dense().to(factors.U.dtype)
    return [tensor_part(parts["weight"].name, W.T.contiguous() if spec.transposed else W)]
