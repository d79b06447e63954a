"""A total for everything that is written -> bits of the layers, or of floats the share that is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UsageError
from .plan import Layer, Plan, make_plan
from .recipe import MOST_BITS, Recipe
from .units import parse_size, written_size

HALVINGS = 12  # of the most that may be asked for, among which a plan that fits is looked for first
FINER, FINE_STEPS = 0.97, 23  # and then below the smallest of them, in steps of this ratio
ROUNDS, NEAR = 30, 0.99999
"""How often a plan is tried between one that fits and one that does not, and the share of the size that will do."""


@dataclass(frozen=True)
class _Trial:
    """amount: bits a weight, or the share kept. nbytes: of everything that is written; infinite where nothing can be
    planned."""

    amount: float
    nbytes: float = math.inf
    plan: Plan | None = None


def plan_within(
    layers: Iterable[Layer],
    skipped: dict[str, str],
    recipe: Recipe,
    total: Callable[[Plan], int],
    *,
    calibrated: bool = False,
) -> Plan:
    """The plan by a settled recipe that comes nearest to its size from below: by bits, or of floats by the share kept,
    the same for all layers without a setting of their own.

    total: most bytes of everything that is written by a plan. UsageError if no plan is as small, with the least that
    there is; and if the dense model is.
    """
    layers, wanted = tuple(layers), parse_size(recipe.size or 0, "--size")
    field, most = ("bits", MOST_BITS) if recipe.coded else ("keep", 1.0)

    def plan(amount: float) -> Plan:
        changes: dict[str, Any] = {"size": None, field: amount}
        return make_plan(layers, skipped, replace(recipe, **changes), calibrated=calibrated)

    def trial(amount: float) -> _Trial:
        try:
            made = plan(amount)
        except UsageError:  # too little for the factors, or so much that no layer would shrink
            return _Trial(amount)
        return _Trial(amount, total(made), made)

    dense, tried = total(Plan((), skipped)), _search(trial, most, wanted)
    if wanted >= dense or tried[-1].nbytes > wanted:
        least = min(_search(trial, most, 0), key=lambda one: one.nbytes)
        if least.plan is None:
            plan(most)  # nothing can be planned, whatever the size, and this says why
        wrong = f"no less than the {written_size(dense)} of the dense model" if wanted >= dense else "too little"
        unit = " (bytes)" if str(recipe.size).strip().isdigit() else ""
        raise UsageError(
            f"--size {recipe.size}{unit} is {wrong}: with these settings {written_size(int(least.nbytes))} is the "
            "smallest result that there is. Give that much or more, and less than the dense model takes."
        )
    found = _nearest(trial, tried, wanted)
    assert found.plan is not None, "what fits was planned"
    if found.amount < most or found.nbytes >= 0.99 * wanted:
        return found.plan
    note = f"The result takes {written_size(int(found.nbytes))} at most, as it cannot use all of --size {recipe.size}."
    return replace(found.plan, notes=(*found.plan.notes, note))


def _search(trial: Callable[[float], _Trial], most: float, enough: float) -> list[_Trial]:
    """Trials of falling amounts until one takes `enough` bytes, which is the last one then; all if none does."""
    tried: list[_Trial] = []
    for k in range(HALVINGS + 1):
        tried.append(trial(most / 2**k))
        if tried[-1].nbytes <= enough:
            return tried
    least = min(tried, key=lambda one: one.nbytes).amount
    for k in range(1, FINE_STEPS):
        tried.append(trial(least * FINER**k))
        if tried[-1].nbytes <= enough:
            return tried
    return tried


def _nearest(trial: Callable[[float], _Trial], tried: list[_Trial], wanted: int) -> _Trial:
    """The trial that takes nearly `wanted` bytes; of those before, the last fits and all others do not."""
    low = tried[-1]
    high = min((one for one in tried if one.amount > low.amount), key=lambda one: one.amount, default=low)
    for _ in range(ROUNDS if high.amount > low.amount else 0):
        if low.nbytes >= NEAR * wanted:
            break
        # Bytes rise with the amount in a straight line, but where a layer begins to be worth compressing.
        part = ((1 + NEAR) / 2 * wanted - low.nbytes) / (high.nbytes - low.nbytes) if high.plan else 0.5
        one = trial(low.amount + min(max(part, 0.01), 0.99) * (high.amount - low.amount))
        low, high = (one, high) if one.nbytes <= wanted else (low, one)
    return low
