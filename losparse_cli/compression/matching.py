"""Block matching: U, V, the entries of S and the norms of one block, trained to reproduce the dense block's output.

The step that 3BASiL (arXiv 2603.01376) calls transformer matching and that block-wise reconstruction has been called
since BRECQ (2102.05426): with the supports of S held fixed where it is floats, and its codes free to move where it is
whole numbers.

A step is Adam on some windows. Each passes through the block by itself, and their gradients are leaves of one tree
(`parallel.tree`), so that ranks may share a step: all hold the block, and take the same steps. What is summed are the
gradients of dense weights; what those are made of gets its own from their sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..linalg.factors import LowRankCodes, LowRankSparse
from ..models.blocks import Call, hidden_states, run_block
from ..parallel.group import Alone, Ranks
from ..parallel.sums import add_for_all, sum_for_all
from ..parallel.tree import TreeSum
from .moving_codes import MovingCodes, Rounding
from .request import Matching

TINY = 1e-30
Pair = tuple[Call, Tensor]
"""What the block is called with, and what the dense one gives for it."""


@dataclass(frozen=True)
class Matched:
    """What matching found for one block.

    factors: layer -> U, V and S as they are stored. loss_before, loss_after: ‖block − dense block‖² / ‖dense block's
    change of its input‖² over all tokens it was trained on, each relative to what the dense block gives there, both
    with factors and norms as they are stored. held_out_before, held_out_after: the same over those held out, None
    without any.
    """

    factors: dict[str, LowRankSparse | LowRankCodes]
    loss_before: float
    loss_after: float
    held_out_before: float | None = None
    held_out_after: float | None = None


LOSSES = ("loss_before", "loss_after", "held_out_before", "held_out_after")


class _LowRankPlusSparse(nn.Module):
    """The weight of a linear layer as a function of U, V and S."""

    def __init__(self, factors: LowRankSparse, transposed: bool) -> None:
        super().__init__()
        self.started = factors
        self.U = nn.Parameter(factors.U.float().clone())
        self.V = nn.Parameter(factors.V.float().clone())
        self.S = nn.Parameter(factors.sparse())
        self.register_buffer("mask", factors.support.float())
        self.mask: Tensor
        self.transposed = transposed

    def forward(self) -> Tensor:
        W = self.S * self.mask
        if self.U.shape[1]:
            W = torch.addmm(W, self.U, self.V)
        return W.T if self.transposed else W

    @property
    def trained(self) -> list[tuple[nn.Parameter, float]]:
        """Parameters, and of what share of the learning rate each is."""
        return [(self.U, 1.0), (self.V, 1.0), (self.S, 1.0)]

    def factors(self) -> LowRankSparse:
        """As they are stored."""
        dtype, support = self.started.values.dtype, self.started.support
        U, V, S = (x.detach() for x in (self.U, self.V, self.S))
        return LowRankSparse(U.to(dtype), V.to(dtype), S[support].to(dtype), support)

    @torch.no_grad()
    def settle(self, factors: LowRankSparse) -> None:
        """Compute with these from here on."""
        self.U.copy_(factors.U)
        self.V.copy_(factors.V)
        self.S.copy_(factors.sparse())


class _Student:
    """A block whose layers weigh what their forms give, and whose norms move; within it, as a context manager.

    What it computes is of the calls of all ranks together, and the same on all of them.
    """

    def __init__(
        self, block: nn.Module, forms: Mapping[str, _LowRankPlusSparse | MovingCodes], norms: Collection[str],
        group: Ranks,
    ) -> None:  # fmt: skip
        self._block, self._forms, self._group = block, forms, group
        self._linears: dict[str, Any] = {name: block.get_submodule(name) for name in forms}
        self._aside = {name: linear.weight for name, linear in self._linears.items()}
        self._norms = [block.get_parameter(name) for name in norms]

    def __enter__(self) -> Self:
        for name, linear in self._linears.items():
            linear.weight = nn.Parameter(torch.empty_like(self._aside[name]))
        for norm in self._norms:
            norm.requires_grad_()
        self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name, linear in self._linears.items():
            linear.weight = self._aside[name]
        for norm in self._norms:
            norm.requires_grad_(False)

    @property
    def trained(self) -> list[tuple[nn.Parameter, float]]:
        """Parameters, and of what share of the learning rate each is."""
        return [*chain.from_iterable(form.trained for form in self._forms.values()), *((n, 1.0) for n in self._norms)]

    @torch.no_grad()
    def install(self) -> None:
        """Compute with what the forms give now."""
        for name, form in self._forms.items():
            self._linears[name].weight.copy_(form())

    @torch.no_grad()
    def measure(self, pairs: Sequence[Pair], scale: float) -> float:
        lost = add_for_all(self._group, [float(_loss(self._block, *pair)) for pair in pairs])
        return lost / scale if scale else 0.0

    def measure_unseen(self, pairs: Sequence[Pair]) -> float | None:
        """None if no rank has any."""
        if not any(self._group.agree(len(pairs))):
            return None
        return self.measure(pairs, self.scale(pairs))

    def scale(self, pairs: Sequence[Pair]) -> float:
        """What the dense block changes in its inputs."""
        return add_for_all(self._group, [float(_relative(_change(target, call), target)) for call, target in pairs])

    def step(self, pairs: Mapping[int, Pair], scale: float) -> float:
        """The loss of a step, and its gradient at all that is trained. pairs: its leaves that are here."""
        sums = TreeSum(min(pairs, default=0))
        for leaf, pair in pairs.items():
            sums.add(leaf, self._gradient(pair, scale))
        *parts, loss = torch.split(sum_for_all(self._group, sums), [*(one.numel() for one in self._computing), 1])
        # An expert that no token reached stays as it is, whatever moved it before.
        reached = torch.stack([part.any() for part in parts]).tolist()
        moving = (*self._forms.values(), *self._norms)
        for one, parameter, part, there in zip(moving, self._computing, parts, reached, strict=True):
            if not there:
                continue
            if isinstance(one, nn.Parameter):
                one.grad = part.view_as(one)
            else:
                with torch.enable_grad():
                    one().backward(part.view_as(parameter))
        return float(loss)

    @property
    def _computing(self) -> list[nn.Parameter]:
        """The parameters that the block computes with and that change: dense weights, and norms."""
        return [*(linear.weight for linear in self._linears.values()), *self._norms]

    def _gradient(self, pair: Pair, scale: float) -> Tensor:
        """Of the loss by these parameters, one after another; and the loss."""
        computing = self._computing
        sizes = [*(parameter.numel() for parameter in computing), 1]
        found = computing[0].new_zeros(sum(sizes))
        *parts, last = torch.split(found, sizes)
        for parameter, part in zip(computing, parts, strict=True):
            parameter.grad = part.view_as(parameter)  # which backward adds to where it lies
        with torch.enable_grad():
            loss = _loss(self._block, *pair) / (scale or 1.0)
            loss.backward()  # type: ignore[no-untyped-call]
        last.copy_(loss.detach())
        for parameter in computing:
            parameter.grad = None
        return found


def match_block(
    block: nn.Module,
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    layers: Mapping[str, LowRankSparse | LowRankCodes],
    norms: Mapping[str, torch.dtype],
    refinement: Matching,
    *,
    transposed: Mapping[str, bool],
    roundings: Mapping[str, Rounding] | None = None,
    held_out: int = 0,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
    places: Sequence[tuple[int, int]] | None = None,
    group: Ranks | None = None,
) -> Matched:
    """Train `block` on the inputs in `calls` towards `targets`, what the dense block gives for them.

    held_out: of the calls, how many at the end are not trained on, only measured. layers: name inside the block ->
    factors to start from; supports of floats stay. roundings: of the layers whose codes move. norms: one-dimensional
    parameters that are trained along, with the dtype in which they are stored; they are left changed in `block`. The
    layers' weights are left as they were. If the result is no better than the start, on the calls that are held out
    where there are any, the start is returned, and the norms put back.

    places: of each call that is trained on, the number of its step, and its own in it; None for a step each. group:
    ranks that have other calls, each step's in a row; one of them at least is to be trained on.
    """
    seen, ranks = len(calls) - held_out, group or Alone()
    pairs = list(zip(calls, targets, strict=True))
    pairs, unseen = pairs[:seen], pairs[seen:]
    steps: dict[int, dict[int, Pair]] = {}
    for (step, place), pair in zip(places or [(k, 0) for k in range(seen)], pairs, strict=True):
        steps.setdefault(step, {})[place] = pair
    forms: dict[str, _LowRankPlusSparse | MovingCodes] = {}
    for name, factors in layers.items():
        if isinstance(factors, LowRankSparse):
            forms[name] = _LowRankPlusSparse(factors, transposed[name])
        else:
            forms[name] = MovingCodes(factors, (roundings or {})[name], transposed[name])
    started = {name: block.get_parameter(name).detach().clone() for name in norms}
    with _Student(block, forms, norms, ranks) as student:
        scale = student.scale(pairs)
        before, unseen_before = student.measure(pairs, scale), student.measure_unseen(unseen)
        every = sorted(set(chain.from_iterable(ranks.agree(list(steps)))))
        _train(student, [steps.get(step, {}) for step in every], refinement, seed, scale / len(every), on_step)
        found = {name: form.factors() for name, form in forms.items()}
        with torch.no_grad():
            for name, form in forms.items():
                form.settle(found[name])  # type: ignore[arg-type]
            for name, dtype in norms.items():
                parameter = block.get_parameter(name)
                parameter.copy_(parameter.to(dtype))
        student.install()
        after, unseen_after = student.measure(pairs, scale), student.measure_unseen(unseen)
        better = after < before
        if unseen_after is not None and unseen_before is not None:
            better = unseen_after < unseen_before
        if not better:
            found, after, unseen_after = {n: form.started for n, form in forms.items()}, before, unseen_before
            with torch.no_grad():
                for name, value in started.items():
                    block.get_parameter(name).copy_(value)
    return Matched(found, before, after, unseen_before, unseen_after)


def _train(
    student: _Student,
    steps: Sequence[Mapping[int, Pair]],
    refinement: Matching,
    seed: int,
    scale: float,
    on_step: Callable[[int, float], None] | None,
) -> None:
    """steps: of those that all ranks know, what is here."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, share in student.trained:
        groups.setdefault(share, []).append(parameter)
    optimizer = torch.optim.Adam([{"params": one} for one in groups.values()], betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(refinement.steps):
        if not order:
            order = torch.randperm(len(steps), generator=generator).tolist()
        warm = min(1.0, (step + 1) / max(1, refinement.steps // 20))
        rate = refinement.lr * warm * 0.5 * (1 + math.cos(math.pi * step / refinement.steps))
        for share, group in zip(groups, optimizer.param_groups, strict=True):
            group["lr"] = rate * share
        loss = student.step(steps[order.pop()], scale)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # at once: the next step needs room for its leaves
        student.install()
        if on_step is not None:
            on_step(step + 1, loss)


def _loss(block: nn.Module, call: Call, target: Tensor) -> Tensor:
    return _relative(hidden_states(run_block(block, call)).float() - target, target)


def _relative(error: Tensor, target: Tensor) -> Tensor:
    """Squares, relative to each token's: what comes next norms it, and some tokens are a thousand times longer."""
    return (error.square().sum(-1) / target.square().sum(-1).clamp_min(TINY)).sum()


def _change(target: Tensor, call: Call) -> Tensor:
    """What the dense block adds to its input, where its output has the shape of that."""
    given = next((x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)), None)
    return target - given if given is not None and given.shape == target.shape else target
