"""U V + S -> a plain dense checkpoint that any engine loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .budget.units import parse_size
from .checkpoint.card import base_metadata, write_dense_card
from .checkpoint.companions import companion_files, copy_companions
from .checkpoint.config import dense_config, layer_specs, layer_tensors
from .checkpoint.layers import read_layer
from .checkpoint.output import output_path
from .checkpoint.reader import TensorEntry
from .checkpoint.source import Checkpoint, open_checkpoint
from .checkpoint.workfolder import WorkFolder
from .checkpoint.writer import ShardWriter, Slot, plan_shards, tensor_part, write_json
from .errors import SourceError, write_errors
from .progress import Progress
from .shim.layouts import LayerSpec
from .shim.loader import is_loader


@dataclass(frozen=True)
class _Unit:
    """One tensor of the dense checkpoint: copied from `entry`, or made from the layer `name`."""

    entry: TensorEntry
    name: str = ""
    spec: LayerSpec | None = None
    parts: dict[str, TensorEntry] | None = None


def export(
    source: str | Path,
    output: Path,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the dense form of a compressed checkpoint to `output`, and return that folder.

    Each layer is U V + S, summed in float32 and rounded once to the stored dtype. One layer is in memory at
    a time; a killed export goes on where it was. CheckpointError if config.json asks for other experts than there are.
    """
    checkpoint = open_checkpoint(source, revision=revision, cache_dir=cache_dir)
    specs = layer_specs(checkpoint)
    output = output_path(output)
    _check_experts(checkpoint)
    companion_files(checkpoint.folder)  # what may not be copied is reported before the work, not after it
    units = _units(checkpoint, specs)
    shards = plan_shards([_slot(unit) for unit in units], parse_size(max_shard_size))
    mark = _fingerprint(checkpoint, max_shard_size)
    with WorkFolder(output, mark, overwrite=overwrite, reads=[checkpoint.folder]) as work:
        if work.finished:  # killed after its last step: only the journal was left to remove
            return output
        writer, told = ShardWriter(work.path, shards, work.journal), progress or Progress()
        told.start("tensors", len(units), writer.done)
        files = {file.path: file for file in checkpoint.files}
        for unit in units[writer.done :]:
            if unit.spec is None:
                entry = unit.entry
                writer.append([(entry.name, entry.dtype, entry.shape, files[entry.path].chunks(entry))])
            else:
                writer.append([tensor_part(unit.entry.name, _dense(checkpoint, unit))])
            told.advance("tensors", name=unit.entry.name)
        writer.finish()
        with write_errors(work.path):
            copy_companions(checkpoint.folder, work.path)
            for path in work.path.glob("losparse_*.py"):
                if is_loader(path.name):
                    path.unlink()
            write_json(work.path / "config.json", dense_config(checkpoint.config))
            write_dense_card(work.path, base_metadata(checkpoint.folder), checkpoint.name)
        work.publish()
    return output


def _check_experts(checkpoint: Checkpoint) -> None:
    """As config.json decides what loads: with other experts than it asks for the result would be another model."""
    if not any(".experts." in name for name in checkpoint.entries):
        return
    from .models.experts import refuse_missing_experts, refuse_surplus_experts
    from .models.names import NameMap
    from .models.skeleton import empty_model

    try:
        model = empty_model(checkpoint.folder, dense_config(checkpoint.config))
    except SourceError:  # of code of its own, or too new for transformers: nothing is known of its experts
        return
    disk = NameMap(model, checkpoint.entries).disk
    for refuse in (refuse_surplus_experts, refuse_missing_experts):
        refuse(model, disk, checkpoint.folder)


def _units(checkpoint: Checkpoint, specs: dict[str, LayerSpec]) -> list[_Unit]:
    made, used = {}, set()
    for name, spec in specs.items():
        parts = layer_tensors(checkpoint, name, spec)
        made[parts["weight"].name] = _Unit(parts["weight"], name, spec, parts)
        used |= {entry.name for entry in parts.values()}
    return [
        made.get(name, _Unit(entry)) for name, entry in checkpoint.entries.items() if name in made or name not in used
    ]


def _slot(unit: _Unit) -> Slot:
    if unit.spec is None:
        return Slot((unit.entry.name,), unit.entry.nbytes)
    itemsize = 8 if unit.entry.dtype == "F64" else 4 if unit.entry.dtype == "F32" else 2
    return Slot((unit.entry.name,), unit.spec.shape[0] * unit.spec.shape[1] * itemsize)


def _dense(checkpoint: Checkpoint, unit: _Unit) -> torch.Tensor:
    assert unit.spec is not None
    assert unit.parts is not None
    factors = read_layer(checkpoint, unit.name, unit.spec, unit.parts)
    W = factors.dense().to(factors.U.dtype)
    return W.T.contiguous() if unit.spec.transposed else W


def _fingerprint(checkpoint: Checkpoint, max_shard_size: str) -> dict[str, Any]:
    paths = [checkpoint.folder / "config.json", *(file.path for file in checkpoint.files)]
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
    return {"export": __version__, "source": checkpoint.commit or files, "shards": parse_size(max_shard_size)}
