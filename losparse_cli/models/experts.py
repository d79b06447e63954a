"""Experts of a model, each with layers of its own: which of these are the same matrix, and which nobody asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import nn

from ..shim.experts import SplitExperts


def expert_layers(block: nn.Module, layers: Collection[str]) -> list[dict[str, tuple[str, ...]]]:
    """For each matrix of the experts in `block`: the first of `layers` of every expert -> those that are fed the same.

    Gate and up of an expert are fed the same; of several experts every matrix is fed something else.
    """
    found = []
    for name, module in block.named_modules():
        if not isinstance(module, SplitExperts):
            continue
        prefix = f"{name}." if name else ""
        gate, up, down = module.names
        for matrices in ((gate, up), (down,)):
            asked = [
                tuple(full for matrix in matrices if matrix and (full := f"{prefix}{number}.{matrix}") in layers)
                for number in range(module.count)
            ]
            found.append({members[0]: members for members in asked if members})
    return [group for group in found if group]


def surplus_experts(model: nn.Module, disk: Mapping[str, Collection[str]]) -> Iterator[tuple[str, int]]:
    """Tensors on disk of experts that the model does not have, and how many it has; disk: parameter -> its tensors."""
    split = {name: module.count for name, module in model.named_modules() if isinstance(module, SplitExperts)}
    for parameter, tensors in disk.items():
        module, _, matrix = parameter.removesuffix(".weight").rpartition(".")
        owner, _, number = module.rpartition(".")
        if owner in split and matrix and number.isdigit() and int(number) >= split[owner]:
            yield from ((tensor, split[owner]) for tensor in tensors)
