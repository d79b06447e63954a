"""Experts that transformers fuses, each with layers of its own while a dense model is trained, and their record."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint.config import FusedTensor
from ..checkpoint.source import Checkpoint
from ..shim.experts import SplitExperts, fused_experts, split_experts


@torch.no_grad()
def take_apart(model: Any, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """Split the fused experts of a dense model, whose layers see the values where they are; module -> what it was."""
    fused = fused_experts(model, [entry.name for entry in checkpoint.entries.values() if len(entry.shape) == 3])
    before = {name: model.get_submodule(name) for name in fused}
    split_experts(model, fused)
    for name, module in before.items():
        values = dict(module.named_parameters(recurse=False))
        experts: SplitExperts = model.get_submodule(name)
        gate, up, down = experts.names
        form = experts.form
        for number in range(form.count):
            first, second = (values[key][number] for key in (form.first, "down_proj"))
            if form.turned:
                first, second = first.T, second.T
            parts = {up: first, down: second}
            if gate is not None:
                parts |= dict(zip((gate, up), first.chunk(2), strict=True))
            for matrix, value in parts.items():
                linear = experts.get_submodule(f"{number}.{matrix}")
                linear.weight = nn.Parameter(value, requires_grad=values["down_proj"].requires_grad)
    return before


def keep_apart(model: Any, before: Mapping[str, nn.Module], layers: Collection[str]) -> None:
    """Put back what was there before experts were split, if none of `layers` is one of theirs; else let go of it."""
    if not any(layer.startswith(f"{name}.") for name in before for layer in layers):
        for name, module in before.items():
            model.set_submodule(name, module)
        return
    chosen = set(layers)
    for name in before:
        for inside, linear in model.get_submodule(name).named_modules():
            if isinstance(linear, nn.Linear) and f"{name}.{inside}" not in chosen:
                linear.weight.data = linear.weight.data.contiguous().clone()  # alone: not all that lay beside it


def fused_record(
    model: Any, recorded: Mapping[str, Mapping[str, Any]], disk: Mapping[str, str]
) -> dict[str, FusedTensor]:
    """What config.json is to say of tensors that hold a matrix of all experts where `model` is dense.

    recorded: what it said of a model that was compressed before. disk: module -> what it is called on disk.
    """
    if recorded:
        return {tensor: FusedTensor(**fields) for tensor, fields in recorded.items()}
    found: dict[str, FusedTensor] = {}
    prefix = f"{model.base_model_prefix}."
    for name, module in model.named_modules():
        if isinstance(module, SplitExperts):
            for matrix, tensor in module.stored.items():
                owner = disk[f"{name}.0.{matrix}"].rsplit(".", 2)[0]
                # A model that was saved without its head is saved with one now.
                whole = prefix + tensor if owner.startswith(prefix) and not tensor.startswith(prefix) else tensor
                found[whole] = FusedTensor(owner, matrix, module.count, module.form.turned)
    return found
