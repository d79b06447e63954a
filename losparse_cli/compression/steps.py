"""One step for the codes of a whole model: the step of each block follows what the blocks before took."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set

from torch import Tensor

from ..budget.plan import LayerPlan, Plan, code_overhead
from ..checkpoint.report import LayerReport
from ..linalg.rates import step_within
from ..progress import Progress
from ..text.windows import Sample
from .coded import MOST_CARRIED, Pot, own_pot
from .foreseen import Foreseen, coded_layers, foresee
from .plan import Job
from .team import Team

LAST = 0.1  # of a pool's bytes, within the last block: what those before missed by is a small part of it
LEAST_BITS = 0.1  # a code, that are kept for layers


class Steps:
    """The step for each layer, so that all layers of as many bits take their bytes together and no more.

    foreseen: layer -> what is known of it. Layers of which nothing is, because no text reaches them, have bytes of
    their own, and no step here. nats: the dense model's loss on each next token of the text, where it was measured too.
    """

    def __init__(self, plans: Iterable[LayerPlan], foreseen: dict[str, Foreseen], nats: float | None = None) -> None:
        self.nats = nats
        self._plans = {p.layer.name: p for p in plans if p.layer.name in foreseen}
        self._foreseen = foreseen
        self._waiting: dict[str, dict[str, LayerPlan]] = {}  # pool -> layer -> its plan
        self._left: dict[str, int] = {}  # bytes
        self._spent: dict[str, int] = {}  # bytes of each layer that was coded
        for name, plan in self._plans.items():
            self._waiting.setdefault(plan.pool, {})[name] = plan
            self._left[plan.pool] = self._left.get(plan.pool, 0) + plan.expected_bytes
        self._bytes = dict(self._left)
        # pool -> layer -> bits beyond what was foreseen of it, and of how many codes
        self._missed: dict[str, dict[str, tuple[float, int]]] = {pool: {} for pool in self._left}

    def g(self, name: str) -> Tensor | None:
        """Fisher information of the layer's outputs, None where it is not known."""
        found = self._foreseen.get(name)
        return None if found is None else found.g

    def log_step(self, name: str) -> float | None:
        """log2 of the step for the layer at this point of the run; None for one that has bytes of its own."""
        if name not in self._plans:
            return None
        pool = self._plans[name].pool
        waiting = self._waiting[pool]
        beside = sum(code_overhead(p.layer, p.rank) for p in waiting.values())
        curves = [(self._foreseen[other].curve, p.layer.weights) for other, p in waiting.items()]
        return step_within(curves, 8 * (self._left[pool] - beside), self._offset(pool))

    def _offset(self, pool: str) -> float:
        """Bits that a code has taken beyond what was foreseen."""
        done = self._missed[pool].values()
        missed, codes = math.fsum(bits for bits, _ in done), sum(codes for _, codes in done)
        return missed / codes if codes else 0.0

    def ceilings(self, names: Iterable[str]) -> dict[str, float]:
        """Bytes that each of these layers may take at most, so that some are left for those that wait beside them:
        where what is foreseen is far off, a last layer might be left less than zeros take.

        What may be missed by is shared by the number of codes: where few bits are foreseen, twice them is little.
        """
        of_pool: dict[str, set[str]] = {}
        for name in names:
            if name in self._plans and name in self._waiting[self._plans[name].pool]:
                of_pool.setdefault(self._plans[name].pool, set()).add(name)
        found: dict[str, float] = {}
        for pool, members in of_pool.items():
            step, offset = self.log_step(next(iter(members))), self._offset(pool)
            assert step is not None, "layers of a pool have a step"
            waiting = self._waiting[pool]
            beside = {name: code_overhead(plan.layer, plan.rank) for name, plan in waiting.items()}
            weights = {name: plan.layer.weights / 8 for name, plan in waiting.items()}
            kept = math.fsum(LEAST_BITS * weights[name] for name in waiting if name not in members)
            left = self._left[pool] - sum(beside.values()) - kept
            bits = {name: max(LEAST_BITS, self._foreseen[name].curve.at(step) + offset) for name in members}
            foreseen = math.fsum(bits[name] * weights[name] for name in members)
            more = max(0.0, left - foreseen) / math.fsum(weights[name] for name in members)
            part = min(1.0, max(0.0, left / foreseen))
            found |= {name: beside[name] + (part * bits[name] + more) * weights[name] for name in members}
        return found

    def log_steps(self, names: Iterable[str]) -> dict[str, float | None]:
        """The same of many layers, as it is now."""
        of_pool: dict[str, float | None] = {}
        found: dict[str, float | None] = {}
        for name in names:
            pool = self._plans[name].pool if name in self._plans else None
            if pool is not None and pool not in of_pool:
                of_pool[pool] = self.log_step(name)
            found[name] = None if pool is None else of_pool[pool]
        return found

    def are_last(self, names: Collection[str], before: Set[str], block: Set[str]) -> bool:
        """Whether what some pool has left for these layers of a block and others, once those `before` have taken
        theirs, is so little that each has to heed what the one before it took. block: all of its layers."""
        for pool in {self._plans[name].pool for name in names if name in self._plans}:
            waiting = self._waiting[pool]
            if len(waiting) > len(block) or not waiting.keys() <= block:
                continue
            left = sum(p.expected_bytes for name, p in waiting.items() if name not in before)
            if left <= LAST * self._bytes[pool] or waiting.keys() <= {*names, *before}:
                return True
        return False

    def pots(self, plans: Sequence[LayerPlan], ceilings: Mapping[str, float] | None = None) -> list[Pot]:
        """The bytes that bind these layers: their own, or for the last of many what is left; else their `ceilings`, and
        none without."""
        shared: dict[str, list[int]] = {}
        pots = []
        for k, plan in enumerate(plans):
            if plan.layer.name in self._plans:
                shared.setdefault(plan.pool, []).append(k)
            else:
                pots.append(own_pot(k, plan))
        for pool, members in shared.items():
            names = {plans[k].layer.name for k in members}
            if set(self._waiting[pool]) <= names:
                pots.append(Pot(members, self._left[pool]))
            else:
                most = math.fsum((ceilings or {}).get(name, math.inf) for name in names)
                pots.append(Pot(members, most, 1 - MOST_CARRIED, bound=True))
        return pots

    def spend(self, report: LayerReport) -> None:
        """The layer was coded at its step, in its bytes; or in others than was said of it before."""
        name, nbytes, log_step = report.name, report.bytes_after, report.log_step
        if name not in self._plans or log_step is None:
            return
        plan = self._plans[name]
        pool, codes = plan.pool, plan.layer.weights
        expected = self._foreseen[name].curve.at(log_step) * codes + 8 * code_overhead(plan.layer, plan.rank)
        self._waiting[pool].pop(name, None)
        self._left[pool] += self._spent.get(name, 0) - nbytes
        self._spent[name] = nbytes
        self._missed[pool][name] = 8 * nbytes - expected, codes


def foreseen_steps(job: Job, plan: Plan, windows: Sample, team: Team, told: Progress, fixed_bytes: int) -> Steps:
    """The steps of a job whose codes follow the loss; fixed_bytes: of memory beside activations."""
    coded = coded_layers(plan)
    if job.recipe.sensitivity != "on":
        return Steps(coded, {})
    found = foresee(job, coded, windows, team, told, fixed_bytes)
    return Steps(coded, found.layers, found.nats)
