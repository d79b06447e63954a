"""What a plan makes otherwise than it was asked for, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .recipe import MOST_BITS, MOST_CODE_BITS

if TYPE_CHECKING:
    from .plan import Layer, LayerPlan


class Notes:
    """Gathers the layers of which something is to be said, those of which it is the same together."""

    def __init__(self) -> None:
        self._dense: dict[tuple[bool, str], list[tuple[Layer, str]]] = {}
        self._less: dict[float, list[LayerPlan]] = {}
        self._unused: dict[str, list[LayerPlan]] = {}

    def stays_dense(self, layer: Layer, why: str, remedy: str = "") -> None:
        """The layer is left out for its size. why: in a few words. remedy: a sentence after a space."""
        kind = bool(layer.rows), why.partition(" ")[0]
        self._dense.setdefault(kind, []).append((layer, f"({why}).{remedy}"))

    def share(self, plan: LayerPlan, keep: float) -> None:
        """The layer has codes for a share of its bytes, or for as much of it as codes can use."""
        if 8 * plan.layer.itemsize * keep > MOST_BITS:
            self._less.setdefault(keep, []).append(plan)

    def kept(self, plan: LayerPlan) -> None:
        """The layer has codes, some of which are zero by its pattern: perhaps so many that the others need less."""
        if plan.value_bits > MOST_CODE_BITS:
            self._unused.setdefault(plan.pool, []).append(plan)

    def sentences(self) -> tuple[str, ...]:
        said = [f"{_and_more(members[0][0], len(members))} dense {members[0][1]}" for members in self._dense.values()]
        for keep, plans in self._less.items():
            bits = 8 * plans[0].layer.itemsize
            said.append(
                f"keep {keep:g} is {bits * keep:.3g} bits a weight, and whole numbers take {MOST_BITS:g} at most, "
                f"in which they lose less than floats in all of it: {_and_more(plans[0].layer, len(plans))} at "
                f"{MOST_BITS / bits:.0%} of the bytes. For floats all the same, say --values float."
            )
        for plans in self._unused.values():
            asked, each = plans[0].bits, plans[0].value_bits
            said.append(
                f"{asked:.3g} bits a weight are {each:.0f} for each value that is not zero, and a code has "
                f"{MOST_CODE_BITS} at most: {_and_more(plans[0].layer, len(plans))} smaller than was asked for."
            )
        return tuple(said)


def _and_more(layer: Layer, count: int) -> str:
    (m, n), others = layer.shape, count - 1
    more = f" and {others} more layer{'s' * (others > 1)} stay" if others else " stays"
    return f"{layer.name} ({m} x {n}){more}"
