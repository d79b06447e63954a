"""Whole numbers of a fixed width as `pack-quantized` of the library compressed-tensors has them, U V as an adapter.

Layers of `--grid` arrive as they are: codes of 4 bits with a factor for each run of 32 columns of a row, of 8 bits with
one for each row. Column factors move to what feeds the layers (`folding`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.config import dense_config, layer_specs, layer_tensors
from ..checkpoint.layers import read_layer
from ..checkpoint.reader import TORCH_DTYPES, TensorEntry
from ..checkpoint.source import Checkpoint
from ..checkpoint.writer import tensor_part
from ..errors import UsageError
from ..linalg.factors import LowRankCodes
from ..linalg.integers import in_runs, limits
from ..models.feeds import find_feeds
from ..models.names import NameMap
from ..models.skeleton import empty_model
from ..shim.layouts import LayerSpec
from .dense import dense_units
from .folder import TensorPart, Unit
from .folding import Folding, fold

RUN = 32
"""Columns that share a factor, of codes of 4 bits."""


@dataclass(frozen=True)
class Scheme:
    """bits: of a number, as a two's complement. run: columns that share a factor, 0 for whole rows."""

    bits: int
    run: int


@dataclass
class PackedCheckpoint:
    """units, config: of the folder. adapter: tensors of U V by PEFT's names, adapter_config: its configuration; empty
    where all layers have rank 0. doubts: what is not exactly as it was, a sentence each."""

    units: list[Unit]
    config: dict[str, Any]
    adapter: dict[str, Tensor] = field(default_factory=dict)
    adapter_config: dict[str, Any] = field(default_factory=dict)
    layers: int = 0
    doubts: tuple[str, ...] = ()


def packed_checkpoint(checkpoint: Checkpoint) -> PackedCheckpoint:
    """UsageError that names a layer which the format cannot hold, and says what makes one that it can."""
    specs = layer_specs(checkpoint)
    model = empty_model(checkpoint.folder, checkpoint.config)
    parts = {name: layer_tensors(checkpoint, name, spec) for name, spec in specs.items()}
    files = {file.path: file for file in checkpoint.files}
    folding = fold(
        specs, find_feeds(model), lambda name: files[parts[name]["S_scale"].path].read(parts[name]["S_scale"])
    )
    linear = {name: spec for name, spec in specs.items() if spec.kind != "embedding" and not _is_head(model, name)}
    schemes = {name: _scheme(checkpoint, name, spec, parts[name], folding) for name, spec in linear.items()}
    if not schemes:
        raise UsageError(f"{checkpoint.address} has no compressed layer but embeddings. Export it with --dense.")
    writer = _Packing(checkpoint, specs, parts, schemes, folding, model)
    doubts = ()
    offset = [name for name in folding.rows if name in writer.norms and writer.norm_offset(name)]
    if offset:
        doubts = (f"{len(offset)} norms hold 1 less than their factor and are rounded to the dtype of the model.",)
    quantization = _quantization(schemes, [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)])
    config = {**dense_config(checkpoint.config), "quantization_config": quantization}
    adapter, adapter_config = writer.adapter()
    return PackedCheckpoint(writer.units(), config, adapter, adapter_config, len(schemes), doubts)


def _is_head(model: Any, name: str) -> bool:
    return model.get_output_embeddings() is model.get_submodule(name)


def _scheme(
    checkpoint: Checkpoint, name: str, spec: LayerSpec, parts: dict[str, TensorEntry], folding: Folding
) -> Scheme:
    remedy = "Compress the dense model with --grid int4 or --grid int8, or export it with --dense."
    if spec.layout != "codes":
        raise UsageError(f"{checkpoint.address}: S of {name} is of floats, which compressed-tensors has not. {remedy}")
    if spec.transposed:
        raise UsageError(
            f"{checkpoint.address}: {name} lies transposed on disk, as compressed-tensors has none. {remedy}"
        )
    if name in folding.kept:
        raise UsageError(
            f"{checkpoint.address}: {name} has factors of its columns, which compressed-tensors has not. {remedy}"
        )
    factors = read_layer(checkpoint, name, spec, parts)
    assert isinstance(factors, LowRankCodes)
    run = RUN if spec.shape[1] % RUN == 0 else 0
    for scheme in (Scheme(4, run), Scheme(8, 0)):
        numbers, _ = in_runs(factors.codes, scheme.run)
        least, most = limits(scheme.bits)
        if int(numbers.amin()) >= least and int(numbers.amax()) <= most:
            return scheme
    raise UsageError(f"{checkpoint.address}: {name} has codes of more than 8 bits. {remedy}")


class _Packing:
    """What goes into the folder, and into the adapter beside it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        specs: dict[str, LayerSpec],
        parts: dict[str, dict[str, TensorEntry]],
        schemes: dict[str, Scheme],
        folding: Folding,
        model: Any,
    ) -> None:
        self._checkpoint, self._specs, self._parts = checkpoint, specs, parts
        self._schemes, self._folding, self._model = schemes, folding, model
        self._files = {file.path: file for file in checkpoint.files}
        names = NameMap(model, checkpoint.entries)
        self._in_memory = {tensor: name for name, tensors in names.disk.items() for tensor in tensors}
        self.norms = {name for name, module in model.named_modules() if not isinstance(module, torch.nn.Linear)}

    def units(self) -> list[Unit]:
        ours = {parts["weight"].name: name for name, parts in self._parts.items() if name in self._schemes}
        used = {entry.name for name in self._schemes for entry in self._parts[name].values()}
        dense = {unit.names[0]: unit for unit in dense_units(self._checkpoint)}
        made = []
        for disk, entry in self._checkpoint.entries.items():
            if disk in ours:
                made.append(self._layer(ours[disk], disk.removesuffix(".weight")))
            elif disk not in used and disk in dense:
                made.append(self._other(disk, entry, dense[disk]))
        return made

    def norm_offset(self, name: str) -> float:
        """What the class of this norm adds to its weight: 1 in Gemma's."""
        kind = type(self._model.get_submodule(name)).__name__
        return 1.0 if kind.startswith("Gemma") else 0.0

    def _factors(self, name: str) -> LowRankCodes:
        factors = read_layer(self._checkpoint, name, self._specs[name], self._parts[name])
        assert isinstance(factors, LowRankCodes)
        return factors

    def _layer(self, name: str, disk: str) -> Unit:
        scheme, (m, n) = self._schemes[name], self._specs[name].shape
        names = tuple(f"{disk}.{suffix}" for suffix in ("weight_packed", "weight_scale", "weight_shape"))
        runs, per_word = n // scheme.run if scheme.run else 1, 32 // scheme.bits
        return Unit(names, 4 * m * -(-n // per_word) + 8 * m * runs + 16, partial(self._packed, name, names, scheme))

    def _packed(self, name: str, names: tuple[str, ...], scheme: Scheme) -> list[TensorPart]:
        factors = self._factors(name)
        numbers, power = in_runs(factors.codes, scheme.run)
        moved = self._folding.rows.get(name)
        rows = factors.rows.float() if moved is None else factors.rows.float() * moved
        exact = rows[:, None] * power
        scale = exact.to(factors.rows.dtype)
        if not torch.equal(scale.float(), exact):
            raise UsageError(
                f"{self._checkpoint.address}: factors of {name} leave the range of {factors.rows.dtype}. Export it with "
                "--dense."
            )
        words = pack(numbers.reshape(factors.codes.shape), scheme.bits)
        shape = torch.tensor(factors.codes.shape, dtype=torch.int64)
        return [tensor_part(n, t) for n, t in zip(names, (words, scale.contiguous(), shape), strict=True)]

    def _other(self, disk: str, entry: TensorEntry, unit: Unit) -> Unit:
        """What is no compressed layer: as it is, or with the factors that come to it, or leave it."""
        parameter = self._in_memory.get(disk, disk)
        module, _, suffix = parameter.rpartition(".")
        rows, columns = self._folding.rows.get(module), self._folding.columns.get(module)
        if rows is None and (columns is None or suffix != "weight"):
            return unit

        def make() -> list[TensorPart]:
            W = self._files[entry.path].read(entry).float()
            if rows is not None:
                offset = self.norm_offset(module) if suffix == "weight" and W.dim() == 1 else 0.0
                W = (W + offset) * (rows if W.dim() == 1 else rows[:, None]) - offset
            if columns is not None and W.dim() == 2:
                W = W / columns
            return [tensor_part(disk, W.to(TORCH_DTYPES[entry.dtype]))]

        return Unit(unit.names, unit.nbytes, make)

    def adapter(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """U V of every layer that has some, as PEFT's LoRA."""
        ranks = {name: self._specs[name].rank for name in self._schemes if self._specs[name].rank}
        if not ranks:
            return {}, {}
        tensors = {}
        for name in ranks:
            factors = self._factors(name)
            V, U = factors.V.float(), factors.U.float()
            columns, rows = self._folding.columns.get(name), self._folding.rows.get(name)
            V = V if columns is None else V / columns
            U = U if rows is None else U * rows[:, None]
            stem = f"base_model.model.{name}"
            tensors[f"{stem}.lora_A.weight"] = V.contiguous()
            tensors[f"{stem}.lora_B.weight"] = U.contiguous()
        most = max(ranks.values())
        others = {name: rank for name, rank in ranks.items() if rank != most}
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
            "r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": others, "lora_dropout": 0.0,
            "bias": "none", "target_modules": sorted(ranks),
        }  # fmt: skip
        return tensors, config


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Numbers (m, n) of so many bits -> int32 (m, n bits / 32): offset by half of their range, the first lowest."""
    m, n = numbers.shape
    together = 32 // bits
    moved = torch.nn.functional.pad(numbers.long() - limits(bits)[0], (0, -n % together)).view(m, -1, together)
    words = (moved << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _quantization(schemes: dict[str, Scheme], linears: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    groups = {}
    kinds = sorted(set(schemes.values()), key=lambda scheme: (scheme.bits, scheme.run))
    for number, scheme in enumerate(kinds):
        own = [name for name, one in schemes.items() if one == scheme]
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else own,
            "weights": {
                "num_bits": scheme.bits, "type": "int", "symmetric": True, "dynamic": False,
                "strategy": "group" if scheme.run else "channel", "group_size": scheme.run or None,
            },
            "input_activations": None,
            "output_activations": None,
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linears if name not in schemes],
    }
