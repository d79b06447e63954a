"""Block matching: U, V, the entries of S and the norms of one block, trained to reproduce the dense block's output.

The step that 3BASiL (arXiv 2603.01376) calls transformer matching and that block-wise reconstruction has been called
since BRECQ (2102.05426): with the supports of S held fixed where it is floats, and its codes free to move where it is
whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..linalg.factors import LowRankCodes, LowRankSparse
from ..models.blocks import Call, hidden_states, run_block
from .moving_codes import MovingCodes, Rounding
from .request import Matching

TINY = 1e-30


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
    """The weight of a linear layer as a function of U, V and S; a parametrization of torch."""

    def __init__(self, factors: LowRankSparse, transposed: bool) -> None:
        super().__init__()
        self.started = factors
        self.U = nn.Parameter(factors.U.float().clone())
        self.V = nn.Parameter(factors.V.float().clone())
        self.S = nn.Parameter(factors.sparse())
        self.register_buffer("mask", factors.support.float())
        self.mask: Tensor
        self.transposed = transposed

    def forward(self, weight: Tensor) -> Tensor:
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
) -> Matched:
    """Train `block` on the inputs in `calls` towards `targets`, what the dense block gives for them.

    held_out: of the calls, how many at the end are not trained on, only measured. layers: name inside the block ->
    factors to start from; supports of floats stay. roundings: of the layers whose codes move. norms: one-dimensional
    parameters that are trained along, with the dtype in which they are stored; they are left changed in `block`. The
    layers' weights are left as they were. If the result is no better than the start, on the calls that are held out
    where there are any, the start is returned, and the norms put back.
    """
    started = {name: block.get_parameter(name).detach().clone() for name in norms}
    forms: dict[str, _LowRankPlusSparse | MovingCodes] = {}
    for name, factors in layers.items():
        if isinstance(factors, LowRankSparse):
            forms[name] = _LowRankPlusSparse(factors, transposed[name])
        else:
            forms[name] = MovingCodes(factors, (roundings or {})[name], transposed[name])
        linear = block.get_submodule(name)
        linear.weight.requires_grad_(False)
        parametrize.register_parametrization(linear, "weight", forms[name], unsafe=True)
    trained = [one for form in forms.values() for one in form.trained]
    for name in norms:
        parameter = block.get_parameter(name)
        parameter.requires_grad_()
        trained.append((parameter, 1.0))
    pairs = list(zip(calls, targets, strict=True))
    pairs, unseen = pairs[: len(pairs) - held_out], pairs[len(pairs) - held_out :]
    scale = _scale(pairs)

    def measure(pairs: Sequence[tuple[Call, Tensor]], scale: float) -> float:
        with torch.no_grad():
            lost = [_loss(block, call, target) for call, target in pairs]
        return float(sum(float(x) for x in lost)) / scale if scale else 0.0

    def measure_unseen() -> float | None:
        return measure(unseen, _scale(unseen)) if unseen else None

    before, unseen_before = measure(pairs, scale), measure_unseen()
    try:
        _train(block, pairs, trained, refinement, seed, scale / len(pairs), on_step)
        found = {name: form.factors() for name, form in forms.items()}
        with torch.no_grad():
            for name, form in forms.items():
                form.settle(found[name])  # type: ignore[arg-type]
            for name, dtype in norms.items():
                parameter = block.get_parameter(name)
                parameter.copy_(parameter.to(dtype))
        after, unseen_after = measure(pairs, scale), measure_unseen()
        better = after < before
        if unseen_after is not None and unseen_before is not None:
            better = unseen_after < unseen_before
        if not better:
            found, after, unseen_after = {n: form.started for n, form in forms.items()}, before, unseen_before
            with torch.no_grad():
                for name, value in started.items():
                    block.get_parameter(name).copy_(value)
    finally:
        for name in forms:
            parametrize.remove_parametrizations(block.get_submodule(name), "weight", leave_parametrized=False)
        for name in norms:
            block.get_parameter(name).requires_grad_(False)
    return Matched(found, before, after, unseen_before, unseen_after)


def _train(
    block: nn.Module,
    pairs: Sequence[tuple[Call, Tensor]],
    trained: Sequence[tuple[nn.Parameter, float]],
    refinement: Matching,
    seed: int,
    scale: float,
    on_step: Callable[[int, float], None] | None,
) -> None:
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, share in trained:
        groups.setdefault(share, []).append(parameter)
    optimizer = torch.optim.Adam([{"params": one} for one in groups.values()], betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(refinement.steps):
        if not order:
            order = torch.randperm(len(pairs), generator=generator).tolist()
        call, target = pairs[order.pop()]
        warm = min(1.0, (step + 1) / max(1, refinement.steps // 20))
        rate = refinement.lr * warm * 0.5 * (1 + math.cos(math.pi * step / refinement.steps))
        for share, group in zip(groups, optimizer.param_groups, strict=True):
            group["lr"] = rate * share
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = _loss(block, call, target) / (scale or 1.0)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, float(loss.detach()))


def _loss(block: nn.Module, call: Call, target: Tensor) -> Tensor:
    return _relative(hidden_states(run_block(block, call)).float() - target, target)


def _relative(error: Tensor, target: Tensor) -> Tensor:
    """Squares, relative to each token's: what comes next norms it, and some tokens are a thousand times longer."""
    return (error.square().sum(-1) / target.square().sum(-1).clamp_min(TINY)).sum()


def _scale(pairs: Sequence[tuple[Call, Tensor]]) -> float:
    return sum(float(_relative(_change(target, call), target)) for call, target in pairs)


def _change(target: Tensor, call: Call) -> Tensor:
    """What the dense block adds to its input, where its output has the shape of that."""
    given = next((x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)), None)
    return target - given if given is not None and given.shape == target.shape else target
