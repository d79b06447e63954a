"""Whole numbers of a fixed width as `pack-quantized` of the library compressed-tensors has them, U V as an adapter.

Layers of `--grid` arrive as they are: codes of 4 bits with a factor for each run of 32 columns of a row, of 8 bits with
one for each row. No layer is computed with here, so any architecture will do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.config import dense_config, fused_tensors, layer_specs, layer_tensors
from ..checkpoint.layers import numbers_of, read_finite_layer
from ..checkpoint.reader import TensorEntry
from ..checkpoint.source import Checkpoint
from ..checkpoint.writer import tensor_part
from ..errors import CheckpointError, UsageError
from ..linalg.factors import LowRankCodes
from ..linalg.integers import limits
from ..models.skeleton import empty_model
from ..shim.layouts import LayerSpec
from .dense import dense_units
from .folder import TensorPart, Unit


@dataclass(frozen=True)
class Scheme:
    """bits: of a number, as a two's complement. run: columns that share a factor, 0 for whole rows."""

    bits: int
    run: int


@dataclass(frozen=True)
class PackedCheckpoint:
    """units, config: of the folder. adapter: tensors of U V by PEFT's names, and adapter_config; empty where all layers
    have rank 0. layers: how many keep their whole numbers."""

    units: list[Unit]
    config: dict[str, Any]
    adapter: dict[str, Tensor]
    adapter_config: dict[str, Any]
    layers: int
    doubts: tuple[str, ...] = ()


def packed_checkpoint(checkpoint: Checkpoint) -> PackedCheckpoint:
    """UsageError that names a layer which the format cannot hold, and says what makes one that it can."""
    if fused_tensors(checkpoint):
        raise UsageError(
            f"{checkpoint.address} has experts that lie in one tensor on disk, which engines do not read as "
            "compressed-tensors. Export it with --dense."
        )
    model = empty_model(checkpoint.folder, checkpoint.config)
    head = model.get_output_embeddings()
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    specs = {
        name: spec
        for name, spec in layer_specs(checkpoint).items()
        if spec.kind != "embedding" and (head is None or model.get_submodule(name) is not head)
    }
    if not specs:
        raise UsageError(f"{checkpoint.address} has no compressed layer but embeddings. Export it with --dense.")
    parts = {name: layer_tensors(checkpoint, name, spec) for name, spec in specs.items()}
    schemes = {name: _scheme(checkpoint, name, spec, parts[name]) for name, spec in specs.items()}
    if Scheme(8, 0) in schemes.values():  # then whole rows of few bits are so, too: less to mix
        schemes = {name: scheme if scheme.run else Scheme(8, 0) for name, scheme in schemes.items()}
    made = {own["weight"].name: _unit(checkpoint, name, specs[name], own, schemes[name]) for name, own in parts.items()}
    units = [made.get(unit.names[0], unit) for unit in dense_units(checkpoint)]
    config = {**dense_config(checkpoint.config), "quantization_config": _quantization(schemes, linears)}
    ranks = {name: spec.rank for name, spec in specs.items() if spec.rank}
    adapter = _adapter(checkpoint, {name: (specs[name], parts[name]) for name in ranks})
    return PackedCheckpoint(
        units, config, adapter, _adapter_config(ranks) if ranks else {}, len(schemes), _doubts(schemes, linears)
    )


def _doubts(schemes: dict[str, Scheme], linears: Iterable[str]) -> tuple[str, ...]:
    """What engines may stumble over."""
    found = []
    if len(set(schemes.values())) > 1:
        found.append(
            "Layers have different widths: load them in transformers without run_compressed=False, which takes one "
            "width for all."
        )
    siblings = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    every = {name: schemes.get(name) for name in linears}
    for group in siblings:
        heads = {name.removesuffix(last) for last in group for name in every if name.endswith(f".{last}")}
        if any(len({every.get(head + last) for last in group if head + last in every}) > 1 for head in heads):
            found.append(f"vLLM merges {' and '.join(group)}, which have different widths here, and refuses them.")
    return tuple(found)


def _codes(checkpoint: Checkpoint, name: str, spec: LayerSpec, parts: dict[str, TensorEntry]) -> LowRankCodes:
    factors = read_finite_layer(checkpoint, name, spec, parts)
    assert isinstance(factors, LowRankCodes)
    return factors


def _scheme(checkpoint: Checkpoint, name: str, spec: LayerSpec, parts: dict[str, TensorEntry]) -> Scheme:
    where = f"{checkpoint.address}: {name}"
    remedy = "Compress the dense model with --grid int4 or --grid int8, or export it with --dense."
    if spec.layout != "codes":
        raise UsageError(f"{where} has floats in S, which compressed-tensors cannot hold. {remedy}")
    if spec.transposed:
        raise UsageError(
            f"{where} lies transposed on disk, which compressed-tensors cannot hold. Export it with --dense."
        )
    factors = _codes(checkpoint, name, spec, parts)
    if not bool((factors.columns == 1).all()):
        raise UsageError(f"{where} has factors of its columns, which compressed-tensors cannot hold. {remedy}")
    numbers = numbers_of(factors)
    for bits in (4, 8):
        least, most = limits(bits)
        if int(numbers.amin()) >= least and int(numbers.amax()) <= most:
            return Scheme(bits, spec.run)
    raise UsageError(f"{where} has codes of more than 8 bits, which compressed-tensors cannot hold. {remedy}")


def _unit(checkpoint: Checkpoint, name: str, spec: LayerSpec, parts: dict[str, TensorEntry], scheme: Scheme) -> Unit:
    m, n = spec.shape
    disk = parts["weight"].name.removesuffix(".weight")
    names = tuple(f"{disk}.{suffix}" for suffix in ("weight_packed", "weight_scale", "weight_shape"))
    nbytes = 4 * m * -(-n * scheme.bits // 32) + 8 * m * (n // scheme.run if scheme.run else 1) + 16
    return Unit(names, nbytes, partial(_packed, checkpoint, name, spec, parts, names, scheme))


def _packed(
    checkpoint: Checkpoint,
    name: str,
    spec: LayerSpec,
    parts: dict[str, TensorEntry],
    names: Iterable[str],
    scheme: Scheme,
) -> list[TensorPart]:
    factors = _codes(checkpoint, name, spec, parts)
    # Exact as --grid makes them; training leaves factors that are rounded here, as a dense weight would be.
    scale = (factors.rows.float()[:, None] * (1 if factors.runs is None else factors.runs)).to(factors.rows.dtype)
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError(f"{checkpoint.address}: factors of {name} overflow. Export it with --dense.")
    shape = torch.tensor(spec.shape, dtype=torch.int64)
    stored = (pack(numbers_of(factors), scheme.bits), scale.contiguous(), shape)
    return [tensor_part(full, tensor) for full, tensor in zip(names, stored, strict=True)]


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Numbers (m, n) of so many bits -> int32 (m, n bits / 32): offset by half of their range, the first lowest."""
    m, n = numbers.shape
    together = 32 // bits
    moved = torch.nn.functional.pad(numbers.long() - limits(bits)[0], (0, -n % together)).view(m, -1, together)
    words = (moved << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _quantization(schemes: dict[str, Scheme], linears: Iterable[str]) -> dict[str, Any]:
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


def _adapter(checkpoint: Checkpoint, layers: dict[str, tuple[LayerSpec, dict[str, TensorEntry]]]) -> dict[str, Tensor]:
    """U V of these layers as PEFT's LoRA has them."""
    tensors = {}
    for name, (spec, parts) in layers.items():
        factors = read_finite_layer(checkpoint, name, spec, parts)
        tensors[f"base_model.model.{name}.lora_A.weight"] = factors.V.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = factors.U.contiguous()
    return tensors


def _adapter_config(ranks: dict[str, int]) -> dict[str, Any]:
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "r": most, "lora_alpha": most,
        "rank_pattern": others, "alpha_pattern": others, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(ranks),
    }  # fmt: skip
