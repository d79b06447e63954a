"""config.json of a compressed checkpoint, and the loader shim that lies beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, FormatVersionError, UsageError
from ..shim.layouts import FORMAT_VERSION, LayerSpec, format_version
from ..shim.loader import write_loader
from .reader import FLOATING, TORCH_DTYPES, TensorEntry
from .source import Checkpoint
from .writer import write_json

AUTO_CONFIG = "losparse_quantizer.LosparseConfig"


@dataclass(frozen=True)
class FusedTensor:
    """What became of a tensor of the dense checkpoint that holds a matrix of all experts, (count, ., .): a layer each.

    module, matrix: expert k's is `{module}.{k}.{matrix}` on disk, (out, in). transposed: in the tensor it is (in, out).
    """

    module: str
    matrix: str
    count: int
    transposed: bool

    @property
    def parts(self) -> list[str]:
        """Name on disk of each expert's matrix, compressed or dense."""
        return [f"{self.module}.{number}.{self.matrix}.weight" for number in range(self.count)]


def fused_of(entries: Iterable[TensorEntry]) -> dict[str, FusedTensor]:
    """Tensor of the dense checkpoint -> what becomes of it, of those that `entries` are parts of."""
    found: dict[str, FusedTensor] = {}
    for entry in entries:
        if entry.part is not None and entry.part.whole not in found:
            module, _, matrix = entry.name.removesuffix(".weight").rpartition(".")
            owner = module.rpartition(".")[0]
            found[entry.part.whole] = FusedTensor(owner, matrix, entry.part.count, entry.part.transposed)
    return found


def fused_tensors(checkpoint: Checkpoint) -> dict[str, FusedTensor]:
    """What config.json of a compressed checkpoint says of them; CheckpointError if it cannot be understood."""
    recorded = (checkpoint.quantization or {}).get("fused") or {}
    try:
        found = {tensor: FusedTensor(**fields) for tensor, fields in recorded.items()}
        if all(
            (type(one.module), type(one.matrix), type(one.count), type(one.transposed)) == (str, str, int, bool)
            for one in found.values()
        ):
            return found
    except (TypeError, AttributeError):
        pass
    raise CheckpointError(f"config.json of {checkpoint.address} has a damaged list 'fused'. Compress it again.")


def skipped_layers(checkpoint: Checkpoint) -> dict[str, str]:
    """Layer that stayed dense -> why, as config.json says it; CheckpointError if it cannot be understood."""
    recorded = (checkpoint.quantization or {}).get("skipped") or {}
    if isinstance(recorded, dict) and all(isinstance(reason, str) for reason in recorded.values()):
        return dict(recorded)
    raise CheckpointError(f"config.json of {checkpoint.address} has a damaged list 'skipped'. Compress it again.")


def write_config(
    destination: Path,
    config: Mapping[str, Any],
    specs: Mapping[str, LayerSpec],
    skipped: Mapping[str, str],
    fused: Mapping[str, FusedTensor] | None = None,
) -> bool:
    """Write config.json and the shim; True if `trust_remote_code=True` alone will load the checkpoint.

    An `auto_map` that is there already is kept. If it names an AutoConfig of the model's own, ours cannot
    be added: the checkpoint then loads only where losparse is installed.
    """
    auto_map = dict(config.get("auto_map") or {})
    ours = "AutoConfig" not in auto_map
    if ours:
        auto_map["AutoConfig"] = AUTO_CONFIG
    quantization = {
        "quant_method": "losparse",
        "format_version": format_version(specs.values(), fused=bool(fused)),
        "modules": {name: spec.to_dict() for name, spec in specs.items()},
        "skipped": dict(skipped),
    }
    if fused:
        quantization["fused"] = {tensor: asdict(one) for tensor, one in fused.items()}
    write_json(destination / "config.json", {**config, "auto_map": auto_map, "quantization_config": quantization})
    write_loader(destination)
    return ours


def dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as it was before compression: without our blocks."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    auto_map = {k: v for k, v in (plain.pop("auto_map", None) or {}).items() if v != AUTO_CONFIG}
    return plain | ({"auto_map": auto_map} if auto_map else {})


def layer_specs(checkpoint: Checkpoint) -> dict[str, LayerSpec]:
    """Module name -> LayerSpec of a compressed checkpoint, as `specs_of`."""
    return specs_of(checkpoint.config, checkpoint.address)


def specs_of(config: Mapping[str, Any], address: str) -> dict[str, LayerSpec]:
    """Module name -> LayerSpec, from the config.json of the compressed checkpoint at `address`.

    UsageError if it is not compressed; FormatVersionError if it is newer than this code; CheckpointError
    if an entry is wrong.
    """
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != "losparse":
        raise UsageError(f"{address} is no losparse checkpoint. Make one with: losparse compress {address}")
    version = quantization.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise FormatVersionError(
            f"{address} has losparse format version {version}; this losparse reads versions up to "
            f"{FORMAT_VERSION}. Upgrade with: pip install --upgrade losparse"
        )
    modules = quantization.get("modules")
    if not isinstance(modules, dict):
        raise CheckpointError(f"config.json of {address} lists no compressed modules. Compress it again.")
    specs = {}
    for name, fields in modules.items():
        try:
            specs[name] = LayerSpec.from_dict(fields)
            specs[name].tensor_shapes(torch.float32)
        except (ValueError, OverflowError) as error:
            raise CheckpointError(f"config.json of {address}, layer {name}: {error}. Compress it again.") from error
    return specs


def layer_tensors(checkpoint: Checkpoint, name: str, spec: LayerSpec) -> dict[str, TensorEntry]:
    """Suffix -> entry of the stored tensors of one layer, checked against its spec.

    A model saved again under another head carries another prefix on disk, so the name is tried with and
    without its first part, too. CheckpointError if a tensor is missing or has another shape or dtype.
    """
    entries = checkpoint.entries
    tries = (
        spec.tensor or name,
        name,
        name.partition(".")[2],
        f"{checkpoint.config.get('model_type')}.{name}",
        f"model.{name}",
    )
    disk = next((t for t in tries if t and f"{t}.weight" in entries), None)
    if disk is None:
        raise CheckpointError(
            f"{checkpoint.address}: layer {name} has no tensor {spec.tensor or name}.weight. Compress it again."
        )
    values = entries[f"{disk}.weight"]
    if values.dtype not in FLOATING:
        raise CheckpointError(f"{values.path}: {values.name} is {values.dtype}, not floating point. Compress it again.")
    found = {}
    for suffix, (shape, dtype) in spec.tensor_shapes(TORCH_DTYPES[values.dtype]).items():
        entry = entries.get(f"{disk}.{suffix}")
        if entry is None:
            raise CheckpointError(f"{checkpoint.address}: the tensor {disk}.{suffix} is missing. Compress it again.")
        if entry.shape != shape or TORCH_DTYPES.get(entry.dtype) != dtype:
            raise CheckpointError(
                f"{entry.path}: {entry.name} is {entry.dtype} {list(entry.shape)}, but config.json asks for "
                f"{str(dtype).removeprefix('torch.')} {list(shape)}. Compress it again."
            )
        found[suffix] = entry
    return found
