"""Block matching: U, V, the entries of S and the norms of one block, trained to reproduce the dense block's output.

The step that 3BASiL (arXiv 2603.01376) calls transformer matching and that block-wise reconstruction has been called
since BRECQ (2102.05426), with the supports of S held fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..linalg.factors import LowRankSparse
from ..models.blocks import Call, hidden_states, run_block
from .request import Refinement


@dataclass(frozen=True)
class Matched:
    """What matching found for one block.

    factors: layer -> U, V and S as they are stored. loss_before, loss_after: ‖block − dense block‖² / ‖dense block's
    change of its input‖² over all tokens it was trained on, both with factors and norms as they are stored.
    held_out_before, held_out_after: the same over those held out, None without any.
    """

    factors: dict[str, LowRankSparse]
    loss_before: float
    loss_after: float
    held_out_before: float | None = None
    held_out_after: float | None = None


LOSSES = ("loss_before", "loss_after", "held_out_before", "held_out_after")


class _LowRankPlusSparse(nn.Module):
    """The weight of a linear layer as a function of U, V and S; a parametrization of torch."""

    def __init__(self, factors: LowRankSparse, transposed: bool) -> None:
        super().__init__()
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

    def factors(self, dtype: torch.dtype, support: Tensor) -> LowRankSparse:
        U, V, S = (x.detach() for x in (self.U, self.V, self.S))
        return LowRankSparse(U.to(dtype), V.to(dtype), S[support].to(dtype), support)


def match_block(
    block: nn.Module,
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    layers: Mapping[str, LowRankSparse],
    norms: Mapping[str, torch.dtype],
    refinement: Refinement,
    *,
    transposed: Mapping[str, bool],
    held_out: int = 0,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> Matched:
    """Train `block` on the inputs in `calls` towards `targets`, what the dense block gives for them.

    held_out: of the calls, how many at the end are not trained on, only measured, and decide nothing. layers: name
    inside the block -> factors to start from; their supports stay. norms: one-dimensional parameters that are trained
    along, with the dtype in which they are stored; they are left changed in `block`. The layers' weights are left as
    they were. If the result is no better than the start, the start is returned, and the norms put back.
    """
    started = {name: block.get_parameter(name).detach().clone() for name in norms}
    forms = {}
    for name, factors in layers.items():
        forms[name] = _LowRankPlusSparse(factors, transposed[name])
        linear = block.get_submodule(name)
        linear.weight.requires_grad_(False)
        parametrize.register_parametrization(linear, "weight", forms[name], unsafe=True)
    trained: list[nn.Parameter] = []
    for form in forms.values():
        trained += [form.U, form.V, form.S]
    for name in norms:
        parameter = block.get_parameter(name)
        parameter.requires_grad_()
        trained.append(parameter)
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
        found = {}
        with torch.no_grad():
            for name, form in forms.items():
                found[name] = form.factors(layers[name].values.dtype, layers[name].support)
                form.U.copy_(found[name].U)
                form.V.copy_(found[name].V)
                form.S.copy_(found[name].sparse())
            for name, dtype in norms.items():
                parameter = block.get_parameter(name)
                parameter.copy_(parameter.to(dtype))
        after, unseen_after = measure(pairs, scale), measure_unseen()
        if not after < before:
            found, after, unseen_after = dict(layers), before, unseen_before
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
    trained: Sequence[nn.Parameter],
    refinement: Refinement,
    seed: int,
    scale: float,
    on_step: Callable[[int, float], None] | None,
) -> None:
    optimizer = torch.optim.Adam(trained, lr=refinement.lr, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(refinement.steps):
        if not order:
            order = torch.randperm(len(pairs), generator=generator).tolist()
        call, target = pairs[order.pop()]
        warm = min(1.0, (step + 1) / max(1, refinement.steps // 20))
        rate = refinement.lr * warm * 0.5 * (1 + math.cos(math.pi * step / refinement.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = _loss(block, call, target) / (scale or 1.0)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, float(loss.detach()))


def _loss(block: nn.Module, call: Call, target: Tensor) -> Tensor:
    return (hidden_states(run_block(block, call)).float() - target).square().sum()


def _scale(pairs: Sequence[tuple[Call, Tensor]]) -> float:
    return sum(float(_change(target, call).square().sum()) for call, target in pairs)


def _change(target: Tensor, call: Call) -> Tensor:
    """What the dense block adds to its input, where its output has the shape of that."""
    given = next((x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)), None)
    return target - given if given is not None and given.shape == target.shape else target
