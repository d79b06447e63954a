"""A layer's S in whole numbers: coded at given steps, or at those that spend a given number of bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..budget.plan import LayerPlan, code_overhead, mask_bits
from ..budget.recipe import MOST_CODE_BITS
from ..checkpoint.report import LayerReport
from ..errors import CheckpointError
from ..linalg.error import output_squared, relative_error, squared_norm
from ..linalg.factors import Decomposition, LowRankCodes, LowRankSparse
from ..linalg.integers import (
    Metric,
    code,
    column_metric,
    fit_rows,
    rounded,
    row_steps,
    steps_of_width,
    storable,
    unrounded,
)
from ..linalg.patterns import parse_pattern, select
from ..linalg.rates import Curve, curve, step_within
from ..linalg.svd import balanced_factors, output_factors, seed_of, truncated_svd
from ..shim.layouts import COLUMN_FACTORS
from .solve import JOINT_STEPS, as_matrix, encode, solve_jointly

TRIES = 12
MOST_CARRIED = 0.05  # of a layer's share, more or less than it
NEAR = 0.998
"""Share of the bytes allowed that is spent at least, before no other step is tried."""


class Coder:
    """Layers that are fed the same inputs, of second moment H (in, in), or None without data.

    g: of each layer the Fisher information of its outputs, None where it is not known.
    """

    def __init__(
        self,
        plans: Sequence[LayerPlan],
        stored: Sequence[Tensor],
        H: Tensor | None,
        g: Sequence[Tensor | None],
        seed: int,
        device: torch.device,
    ) -> None:
        self.plans, self._dtypes = plans, [W.dtype for W in stored]
        self._H = H if H is not None and bool(H.any()) else None
        weights = [as_matrix(W, plan.layer, device) for plan, W in zip(plans, stored, strict=True)]
        self._weights = weights
        try:
            # Other engines' formats, for which a width is fixed, know no factors of columns.
            allowed = torch.ones(1) if any(plan.width for plan in plans) else COLUMN_FACTORS
            self._metric = None if self._H is None else column_metric(self._H, allowed)
        except ValueError as error:
            raise CheckpointError(
                f"The inputs of {plans[0].layer.name} are so alike that codes cannot be solved for. Give more text, or "
                "add --solver rounding."
            ) from error
        rows = [
            torch.ones(len(W), device=device) if one is None else row_steps(one.to(device))
            for W, one in zip(weights, g, strict=True)
        ]
        jointly = self._solved_jointly(rows)
        self._low_rank = [
            (jointly[k].U, jointly[k].V) if k in jointly else self._factors(plan, weights[k], dtype, seed)
            for k, (plan, dtype) in enumerate(zip(plans, self._dtypes, strict=True))
        ]
        self._rest = [
            W if U.shape[1] == 0 else torch.addmm(W, U.float(), V.float(), alpha=-1)
            for W, (U, V) in zip(weights, self._low_rank, strict=True)
        ]
        self._goals = [jointly[k].sparse() if k in jointly else rest for k, rest in enumerate(self._rest)]
        """What codes are rounded from: of S that is sparse, the values that suit its support best."""
        scale = 1.0 if self._metric is None else self._metric.scale
        self._units = [scale * one for one in rows]
        self._supports = [
            jointly[k].support if k in jointly else support_of(self._scaled(k), plan) if plan.sparse else None
            for k, plan in enumerate(plans)
        ]
        self._of_width: dict[int, Decomposition] | None = None

    def _scaled(self, k: int) -> Tensor:
        """What is to be coded of layer k, in units that one step serves."""
        W = self._goals[k] / self._units[k][:, None]
        return W if self._metric is None else W.div_(self._metric.columns)

    def _solved_jointly(self, rows: Sequence[Tensor]) -> dict[int, LowRankSparse]:
        """Where S is to be sparse, its support, its values and U V, before anything is rounded, in the metric of the
        codes; {} without data. rows: of each layer what its rows' errors are divided by, to count alike.

        Where most of S is zero, columns that follow have little left to mend errors with, so that rounding with
        feedback does not find what ADMM does: 0.14 of a layer's output is lost with a tenth of S, and 0.095 here.
        """
        found: dict[int, LowRankSparse] = {}
        members = [k for k, plan in enumerate(self.plans) if plan.sparse]
        if self._H is None or not members:
            return found
        scaled = [self._weights[k] / rows[k][:, None] for k in members]
        plans, count = [self.plans[k] for k in members], len(members)
        solved = solve_jointly(plans, scaled, self._H, [JOINT_STEPS] * count, [torch.float32] * count)
        for k, one in zip(members, solved, strict=True):
            factors, dtype = one.factors, self._dtypes[k]
            assert isinstance(factors, LowRankSparse)
            support = factors.support
            U = factors.U * rows[k][:, None]
            values = factors.values * rows[k][:, None].expand_as(support)[support]
            found[k] = LowRankSparse(U.to(dtype), factors.V.to(dtype), values, support)
        return found

    def _factors(self, plan: LayerPlan, W: Tensor, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
        if plan.rank == 0:
            return W.new_zeros(len(W), 0, dtype=dtype), W.new_zeros(0, W.shape[1], dtype=dtype)
        seed = seed_of(seed, plan.layer.name)
        if self._H is None:
            U, V = balanced_factors(*truncated_svd(W, plan.rank, seed=seed))
        else:
            U, V = output_factors(W, self._H, plan.rank, seed=seed)
        return U.to(dtype), V.to(dtype)

    def finest(self) -> list[float]:
        """Of each layer log2 of the finest step that makes sense: codes have 15 bits, which no size asks for."""
        largest = [float(self._scaled(k).abs_().amax()) for k in range(len(self.plans))]
        return [math.log2(most) - MOST_CODE_BITS if most > 0 else 0.0 for most in largest]

    def curves(self) -> list[Curve]:
        """What codes of each layer take by the step."""
        found = enumerate(zip(self.plans, self._supports, strict=True))
        return [curve_of(self._scaled(k), plan, support) for k, (plan, support) in found]

    def _support(self, rest: dict[int, Tensor]) -> Tensor | None:
        """Of these layers together."""
        found = [(W, self._supports[k]) for k, W in rest.items()]
        if all(support is None for _, support in found):
            return None
        return torch.cat([torch.ones_like(W, dtype=torch.bool) if one is None else one for W, one in found])

    def at(self, log_steps: Sequence[float]) -> list[Decomposition]:
        """The layers coded with a step of 2 ** log_step each; those of a fixed width with steps of their own."""
        if self._of_width is None:
            self._of_width = self._in_widths()
        free = [k for k, plan in enumerate(self.plans) if not plan.width]
        found = self._of_width | (self._at({k: log_steps[k] for k in free}) if free else {})
        return [found[k] for k in range(len(self.plans))]

    def latents(self, found: Sequence[LowRankSparse | LowRankCodes]) -> list[Tensor]:
        """Of each layer as it was coded, what its codes were rounded from, (m, n) in their steps."""
        return [
            _latent(self._goals[k], one, self._metric) for k, one in enumerate(found) if isinstance(one, LowRankCodes)
        ]

    def _in_widths(self) -> dict[int, Decomposition]:
        """Layers of a fixed width, each row, or run of its columns, at the step that suits it best.

        Where steps are chosen, errors in a column count by how large it is (as in llama.cpp's importance
        matrices): that costs a little of the layer's own error, and spares the loss much of it (docs/performance.md).
        """
        found = {}
        for k, plan in enumerate(self.plans):
            if not plan.width:
                continue
            W, support, run = self._goals[k], self._supports[k], plan.run
            weights = torch.ones_like(W[0]) if self._H is None else self._H.diagonal()
            a, runs = steps_of_width(W, weights, plan.width, run)
            a = storable(a, self._dtypes[k], run)
            if self._metric is None:
                q = rounded(W, a, 0.0, plan.width, runs)
                q = q if support is None else q * support
            else:
                q = code(W, self._metric, a, support, 0.0, plan.width, runs)
            rows = fit_rows(self._rest[k], q, self._columns, self._H, a, torch.float32)
            found[k] = self._made(k, q, storable(rows, self._dtypes[k], run).to(self._dtypes[k]), None, runs)
        return found

    @property
    def _columns(self) -> Tensor:
        W = self._weights[0]
        return torch.ones(W.shape[1], device=W.device) if self._metric is None else self._metric.columns

    def _at(self, log_steps: dict[int, float]) -> dict[int, Decomposition]:
        """These layers at these steps."""
        # fp16 holds no factor below 6e-8.
        factors = {
            k: (self._units[k] * 2.0**step).to(self._dtypes[k]).float().clamp_min(torch.finfo(self._dtypes[k]).tiny)
            for k, step in log_steps.items()
        }
        rest, goals = ({k: held[k] for k in log_steps} for held in (self._rest, self._goals))
        if self._metric is None:
            allowed = self._supports
            codes = {k: rounded(W, factors[k]) for k, W in goals.items()}
            codes = {k: q if (where := allowed[k]) is None else q * where for k, q in codes.items()}
        else:
            together = code(
                torch.cat(list(goals.values())), self._metric, torch.cat(list(factors.values())), self._support(goals)
            )
            parts = torch.split(together, [len(W) for W in rest.values()])
            codes = dict(zip(rest, parts, strict=True))
        return {
            k: self._made(k, q, fit_rows(rest[k], q, self._columns, self._H, factors[k], self._dtypes[k]), log_steps[k])
            for k, q in codes.items()
        }

    def _made(
        self, k: int, q: Tensor, rows: Tensor, log_step: float | None, runs: Tensor | None = None
    ) -> Decomposition:
        """Layer k as these codes and row factors make it."""
        W, (U, V) = self._weights[k], self._low_rank[k]
        made = LowRankCodes(U, V, rows, self._columns, q, runs)
        E = W - made.dense()
        weight, residual = squared_norm(W), squared_norm(E)
        output: tuple[float, ...] = ()
        if self._H is not None:
            output = (relative_error(output_squared(E, self._H), output_squared(W, self._H)),)
        return Decomposition(made, (relative_error(residual, weight),), weight, residual, output, log_step=log_step)


def latents_of(W: Tensor, factors: LowRankCodes, H: Tensor) -> Tensor:
    """What the codes of a layer that is there already would have been rounded from, as of `Coder.latents`."""
    try:
        metric = column_metric(H, torch.ones(1)) if bool(H.any()) else None
    except ValueError:  # its inputs are all too alike
        metric = None
    return _latent(W - factors.U.float() @ factors.V.float(), factors, metric)


def _latent(rest: Tensor, factors: LowRankCodes, metric: Metric | None) -> Tensor:
    return unrounded(rest, factors.codes.float(), factors.rows.float(), metric, factors.columns)


def support_of(X: Tensor, plan: LayerPlan) -> Tensor:
    """Where codes may be other than zero, bool (m, n): where the pattern leaves the largest of X.

    X: in units that one step serves, so that its squares are what it costs to leave entries out, as in SparseGPT
    (Frantar and Alistarh, arXiv:2301.00774).
    """
    return select(X, parse_pattern(plan.pattern), plan.nnz, plan.scope)


def curve_of(X: Tensor, plan: LayerPlan, support: Tensor | None) -> Curve:
    """Bits by the step of what a layer codes: X (m, n), in units that one step serves, where `support` allows."""
    if support is None:
        return curve(X)
    if plan.pattern == "unstructured":
        return curve(X * support, plan.nnz / X.numel())
    mask = mask_bits(plan.layer.shape, plan.nnz, plan.pattern, plan.scope)
    width = plan.nnz // max(1, int(support.any(1).sum()))  # rows keep all or nothing, or as many as the others
    return curve(X[support].view(-1, width)).spread(plan.nnz / X.numel(), mask / X.numel())


class AnyCoder(Protocol):
    """Layers that can be coded at given steps, as `Coder` codes them."""

    plans: Sequence[LayerPlan]

    def finest(self) -> list[float]: ...

    def curves(self) -> list[Curve]: ...

    def at(self, log_steps: Sequence[float]) -> list[Decomposition]: ...


@dataclass(frozen=True)
class Coded:
    """A layer at a step: what was found, its line of the report, and its tensors by suffix."""

    solved: Decomposition
    report: LayerReport
    tensors: dict[str, Tensor]


def coded_at(coder: AnyCoder, log_steps: Sequence[float]) -> list[Coded]:
    """Each layer of `coder` at the step that is asked for it."""
    made = []
    for plan, solved in zip(coder.plans, coder.at(log_steps), strict=True):
        report, tensors = encode(plan, solved, solved.factors.U.dtype)
        made.append(Coded(solved, report, tensors))
    return made


def coded_within(coder: AnyCoder, pots: Sequence[Pot], log_steps: Sequence[float]) -> list[Coded]:
    """Each layer at the finest step at which its pot keeps within its bytes; log_steps: of each layer, to begin with.

    CheckpointError for bytes within which nothing was found.
    """
    finest = coder.finest()
    for pot in pots:
        pot.finest = min(finest[k] for k in pot.members)
        pot.step = max(pot.finest, log_steps[pot.members[0]])
    for _ in range(TRIES):
        # One of zeros, or with an outlier, takes no finer step than makes sense for it; the others may.
        steps = {k: max(pot.step, finest[k]) for pot in pots for k in pot.members}
        found = coded_at(coder, [steps[k] for k in range(len(finest))])
        for pot in pots:
            pot.look([found[k] for k in pot.members])
        if all(pot.settled for pot in pots):
            break
    chosen = {k: one for pot in pots for k, one in zip(pot.members, pot.best, strict=False)}
    for k, plan in enumerate(coder.plans):
        if k not in chosen:
            raise CheckpointError(
                f"{plan.layer.name} does not fit in {plan.bits:.3g} bits a weight. Give it more, or leave it out with "
                f"--ignore '{plan.layer.name}'."
            )
    return [chosen[k] for k in range(len(coder.plans))]


class Pot:
    """Bytes that layers of one step share. members: their numbers. allowed: bytes. near: share of them that will do.
    bound: whether they are a bound alone, within which the step that was asked for will do.

    step: log2 of the step to look at. finest: of the finest that is tried. best: the layers at the finest step that
    fits so far.
    """

    def __init__(self, members: Sequence[int], allowed: float, near: float = NEAR, *, bound: bool = False) -> None:
        self.members, self.allowed, self._near, self._bound = members, allowed, near, bound
        self.best: list[Coded] = []
        self.settled = False
        self.finest, self.step = -math.inf, 0.0
        # log2 of the finest step that fits and of the coarsest that does not, and the bytes at each.
        self._fits, self._bursts = (math.inf, 0.0), (-math.inf, 0.0)

    def look(self, found: list[Coded]) -> None:
        """Take in what the layers are at its step, and choose the next one."""
        step, size = self.step, float(sum(one.report.bytes_after for one in found))
        if size > self.allowed:
            self._bursts = max(self._bursts, (step, size))
        elif step < self._fits[0] or not self.best:
            self._fits, self.best = (step, size), found
        (fits, less), (bursts, more) = self._fits, self._bursts
        enough = math.isinf(self.allowed) or less >= self._near * self.allowed
        enough = enough or fits - max(bursts, self.finest) < 1e-4 or (self._bound and math.isinf(bursts))
        self.settled = bool(self.best) and enough
        if self.settled:
            self.step = fits
            return
        aim = (1 + self._near) / 2 * self.allowed
        if math.isfinite(fits) and math.isfinite(bursts):
            part = min(0.95, max(0.05, (aim - less) / (more - less)))
            self.step = fits + part * (bursts - fits)
            return
        # A code takes a bit less at twice the step, and one that is zero hardly less.
        codes = max(1, sum(one.report.spec.nnz for one in found))
        move = min(4.0, max(-4.0, 8 * (size - aim) / codes))
        self.step = max(self.finest, step + math.copysign(max(2 * abs(move), 0.02), move))


def own_pot(k: int, plan: LayerPlan) -> Pot:
    """Of layer k alone, that is; codes of a fixed width take what they take."""
    return Pot([k], math.inf if plan.width else plan.expected_bytes)


def own_steps(coder: AnyCoder) -> list[float]:
    """Of each layer log2 of the step at which it should take the bits that its plan asks for."""
    return [
        step_within([(one, plan.layer.weights)], 8 * (plan.expected_bytes - code_overhead(plan.layer, plan.rank)))
        for plan, one in zip(coder.plans, coder.curves(), strict=True)
    ]


def code_alone(coder: AnyCoder) -> list[Coded]:
    """Each layer in the bits that its plan asks for."""
    pots = [own_pot(k, plan) for k, plan in enumerate(coder.plans)]
    return coded_within(coder, pots, own_steps(coder))


class Ledger:
    """Bytes of the layers of a section, coded one after the other, each within a few hundredths of its share: what one
    leaves the next one takes, or all of the others where it is much, and the last one makes all come out."""

    def __init__(self, plans: Iterable[LayerPlan]) -> None:
        self._waiting: dict[str, dict[str, int]] = {}  # pool -> layer -> its share
        for plan in plans:
            self._waiting.setdefault(plan.pool, {})[plan.layer.name] = plan.expected_bytes
        self._left = {pool: sum(shares.values()) for pool, shares in self._waiting.items()}

    def code(self, coder: AnyCoder) -> Coded:
        """The one layer of `coder`, whose bytes are then spent."""
        [plan] = coder.plans
        if plan.width:
            return code_alone(coder)[0]
        waiting, left = self._waiting[plan.pool], self._left[plan.pool]
        share, beside = waiting[plan.layer.name], code_overhead(plan.layer, plan.rank)
        rest = sum(waiting.values())
        over = left - rest  # which is much behind a layer of zeros, say
        allowed = share + max(min(MOST_CARRIED * share, over), over * share / rest)
        [found] = coder.curves()
        step = step_within([(found, plan.layer.weights)], 8 * (allowed - beside))
        pot = Pot([0], left) if len(waiting) == 1 else Pot([0], allowed, 1 - MOST_CARRIED / 2)
        [one] = coded_within(coder, [pot], [step])
        self.spend(plan, one.report.bytes_after)
        return one

    def spend(self, plan: LayerPlan, nbytes: int) -> None:
        """The layer was written, in so many bytes; one that the ledger does not know is none of its."""
        if self._waiting.get(plan.pool, {}).pop(plan.layer.name, None) is not None:
            self._left[plan.pool] -= nbytes
