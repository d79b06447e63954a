"""Which layers of a block are solved in one pass over its text: as many as there is room for second moments."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from ..budget.plan import LayerPlan


def rounds(plans: Mapping[str, LayerPlan], room: int, copies: int) -> list[list[str]]:
    """Layers by the rounds in which they are solved, in their order; those of one module, as of an expert, together.

    copies: second moments that are held of each layer. A round takes one module at least.
    """
    found: list[list[str]] = []
    taken = 0
    for _, members in groupby(plans, lambda layer: layer.rpartition(".")[0]):
        layers = list(members)
        size = sum(moment_bytes(plans[layer]) for layer in layers) * copies
        if not found or taken + size > room:
            found.append([])
            taken = 0
        found[-1] += layers
        taken += size
    return found


def moment_bytes(plan: LayerPlan) -> int:
    """Of the second moment of what a layer is fed."""
    return 4 * plan.layer.shape[1] ** 2
