"""What a plan makes otherwise than it was asked for, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .recipe import MOST_BITS

if TYPE_CHECKING:
    from .plan import Layer, LayerPlan


class Notes:
    """Gathers the layers of which something is to be said, those of which it is the same together."""

    def __init__(self) -> None:
        self._dense: dict[tuple[bool, str], list[tuple[Layer, str]]] = {}
        self._less: dict[float, list[LayerPlan]] = {}

    def stays_dense(self, layer: Layer, why: str, remedy: str = "") -> None:
        """The layer is left out for its size. why: in a few words. remedy: a sentence after a space."""
        kind = bool(layer.rows), why.partition(" ")[0]
        self._dense.setdefault(kind, []).append((layer, f"({why}).{remedy}"))

    def share(self, plan: LayerPlan, keep: float) -> None:
        """The layer has codes for a share of its bytes, or for as much of it as codes can use."""
        if 8 * plan.layer.itemsize * keep > MOST_BITS:
            self._less.setdefault(keep, []).append(plan)

    def sentences(self) -> tuple[str, ...]:
        said = [f"{_and_more(members[0][0], len(members))} dense {members[0][1]}" for members in self._dense.values()]
        for keep, plans in self._less.items():
            bits = 8 * plans[0].layer.itemsize
            said.append(
                f"keep {keep:g} is {bits * keep:.3g} bits a weight, and whole numbers take {MOST_BITS:g} at most: "
                f"{_and_more(plans[0].layer, len(plans))} at {MOST_BITS / bits:.0%} of the bytes. For more, say "
                "--values float."
            )
        return tuple(said)


def _and_more(layer: Layer, count: int) -> str:
    (m, n), others = layer.shape, count - 1
    more = f" and {others} more layer{'s' * (others > 1)} stay" if others else " stays"
    return f"{layer.name} ({m} x {n}){more}"
