"""One budget for the model -> a size for each layer, by what each layer's errors cost the model's output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

REACH = 0.10
"""How far a layer's size may move from the uniform one: methods that moved further have exploded elsewhere."""

GRID = 80


@dataclass(frozen=True)
class Curve:
    """One layer's relative output error squared at a few sizes.

    size: of the dense layer, in bytes or parameters. keep: shares of it, ascending. error: at each, descending.
    weight: what the layer's error costs, the divergence of the model's output a unit of error.
    """

    size: float
    keep: tuple[float, ...]
    error: tuple[float, ...]
    weight: float

    def cost(self, keep: float) -> float:
        """weight x error, the logarithm of the error interpolated between the sizes that were measured."""
        k = max(0, min(len(self.keep) - 2, sum(point <= keep for point in self.keep) - 1))
        low, high = self.keep[k], self.keep[k + 1]
        a, b = (math.log(max(error, 1e-12)) for error in self.error[k : k + 2])
        return self.weight * math.exp(a + (b - a) * (keep - low) / ((high - low) or 1.0))


def allocate(curves: Mapping[str, Curve], keep: float, reach: float = REACH) -> dict[str, float]:
    """Layer -> share to keep, so that the costs sum to the least at the size that `keep` of every layer would have.

    Every share lies within `reach` of `keep`, and not below the least that its layer's curve knows. A Lagrangian: at
    the optimum a byte is worth as much in every layer.
    """
    low, high = max(0.02, keep - reach), min(1.0, keep + reach)
    grid = [low + (high - low) * i / GRID for i in range(GRID + 1)]
    tables = {
        name: [curve.cost(share) if share >= curve.keep[0] - 1e-9 else math.inf for share in grid]
        for name, curve in curves.items()
    }
    total = sum(curve.size for curve in curves.values())

    def choose(price: float) -> dict[str, float]:
        chosen = {}
        for name, costs in tables.items():
            size = curves[name].size / total
            chosen[name] = grid[min(range(len(grid)), key=lambda i: costs[i] + price * size * grid[i])]
        return chosen

    def mean(chosen: Mapping[str, float]) -> float:
        return sum(curves[name].size * share for name, share in chosen.items()) / total

    cheap, dear = 0.0, 1.0
    while mean(choose(dear)) > keep and dear < 1e12:
        dear *= 4
    for _ in range(60):
        price = (cheap + dear) / 2
        cheap, dear = (price, dear) if mean(choose(price)) > keep else (cheap, price)
    chosen = choose(dear)
    return _fill(chosen, curves, keep - mean(chosen), high, total)


def _fill(
    chosen: dict[str, float], curves: Mapping[str, Curve], left: float, high: float, total: float
) -> dict[str, float]:
    """Spread what the grid left over, so that the whole budget is used."""
    room: Sequence[str] = [name for name, share in chosen.items() if share < high]
    space = sum(curves[name].size * (high - chosen[name]) for name in room) / total
    step = min(1.0, left / space) if space > 0 and left > 0 else 0.0
    return {name: share + step * (high - share) if share < high else share for name, share in chosen.items()}
