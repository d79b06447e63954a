"""Which layers of a block are solved in one pass over its text: as many as there is room for second moments."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from ..budget.plan import LayerPlan


def rounds(plans: Mapping[str, LayerPlan], room: int, copies: float) -> list[list[str]]:
    """Layers by the rounds in which they are solved, in their order; those of one module, as of an expert, together.

    copies: second moments that are held of each layer, see `copies_held`. A round takes one module at least.
    """
    found: list[list[str]] = []
    taken = 0.0
    for _, members in groupby(plans, lambda layer: layer.rpartition(".")[0]):
        layers = list(members)
        size = sum(moment_bytes(plans[layer]) for layer in layers) * copies
        if not found or taken + size > room:
            found.append([])
            taken = 0
        found[-1] += layers
        taken += size
    return found


def copies_held(batches: int, held_out: int) -> float:
    """Second moments of a layer that are held at once, at most, while those of so many batches are summed up.

    Sums are half as large as what they become (`calibration.squares`). One grows, and others wait for it in the tree.
    """
    growing, waiting = (0.5 + 0.5 * count.bit_length() for count in (batches, held_out))
    return max(growing, 0.5 + waiting) if held_out else growing


def moment_bytes(plan: LayerPlan) -> int:
    """Of the second moment of what a layer is fed."""
    return 4 * plan.layer.shape[1] ** 2
