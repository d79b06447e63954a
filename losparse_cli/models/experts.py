"""Experts of a model, each with layers of its own: which of these are the same matrix, and which nobody asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..errors import CheckpointError
from ..shim.experts import SplitExperts

APART = "config.json and the weights do not belong together."


@dataclass(frozen=True)
class ExpertLayers:
    """Layers that are the same of each expert. owner: the module that is fed what all of them are fed parts of, "" if
    nobody is. layers: the first of every expert -> those of it that are fed the same."""

    owner: str
    layers: dict[str, tuple[str, ...]]


def expert_layers(block: nn.Module, layers: Collection[str]) -> list[ExpertLayers]:
    """Those of `layers` that belong to experts in `block`: gate and up, which are fed the same, and down."""
    asked, found = set(layers), []
    for name, module in block.named_modules():
        if not isinstance(module, SplitExperts):
            continue
        gate, up, down = module.names
        for owner, matrices in ((name, (gate, up)), ("", (down,))):
            every = [[f"{name}.{number}.{matrix}" for matrix in matrices if matrix] for number in range(module.count)]
            here = [tuple(layer for layer in names if layer in asked) for names in every]
            if any(here):
                found.append(ExpertLayers(owner, {members[0]: members for members in here if members}))
    return found


def refuse_surplus_experts(model: nn.Module, disk: Mapping[str, Collection[str]], folder: Path) -> None:
    """CheckpointError if the files in `folder` hold an expert that the model does not have.

    disk: parameter -> tensors that it is read from.
    """
    counts = _counts(model)
    for parameter, tensors in disk.items():
        module, _, matrix = parameter.removesuffix(".weight").rpartition(".")
        owner, _, number = module.rpartition(".")
        if owner in counts and matrix and number.isdigit() and int(number) >= counts[owner] and tensors:
            raise CheckpointError(
                f"{folder} holds {next(iter(tensors))}, but config.json asks for {counts[owner]} experts. {APART}"
            )


def refuse_missing_experts(model: nn.Module, disk: Mapping[str, Collection[str]], folder: Path) -> None:
    """CheckpointError if the model has an expert of which the files in `folder` hold nothing; disk: as above."""
    held = {parameter.removesuffix(".weight").rpartition(".")[0] for parameter in disk}
    for owner, count in _counts(model).items():
        missing = next((number for number in range(count) if f"{owner}.{number}" not in held), None)
        if missing is not None:
            raise CheckpointError(
                f"{folder} holds no {owner}.{missing}, but config.json asks for {count} experts. {APART}"
            )


def _counts(model: nn.Module) -> dict[str, int]:
    """Module of experts that are split -> how many the model has of them."""
    return {name: module.count for name, module in model.named_modules() if isinstance(module, SplitExperts)}
