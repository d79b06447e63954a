"""Experts of a model, each with layers of its own: which of these are the same matrix, and which nobody asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from ..shim.experts import SplitExperts


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


def surplus_experts(model: nn.Module, disk: Mapping[str, Collection[str]]) -> Iterator[tuple[str, int]]:
    """Tensors on disk of experts that the model does not have, and how many it has; disk: parameter -> its tensors."""
    split = {name: module.count for name, module in model.named_modules() if isinstance(module, SplitExperts)}
    for parameter, tensors in disk.items():
        module, _, matrix = parameter.removesuffix(".weight").rpartition(".")
        owner, _, number = module.rpartition(".")
        if owner in split and matrix and number.isdigit() and int(number) >= split[owner]:
            yield from ((tensor, split[owner]) for tensor in tensors)
