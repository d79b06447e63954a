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
    change of its input‖² over all calibration tokens, both with factors and norms as they are stored.
    """

    factors: dict[str, LowRankSparse]
    loss_before: float
    loss_after: float


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
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> Matched:
    """Train `block` on the inputs in `calls` towards `targets`, what the dense block gives for them.

    layers: name inside the block -> factors to start from; their supports stay. norms: one-dimensional parameters that
    are trained along, with the dtype in which they are stored; they are left changed in `block`. The layers' weights
    are left as they were. If the result is no better than the start, the start is returned, and the norms put back.
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
    scale = sum(float(_change(target, call).square().sum()) for target, call in zip(targets, calls, strict=True))

    def measure() -> float:
        with torch.no_grad():
            lost = [_loss(block, call, target) for call, target in zip(calls, targets, strict=True)]
        return float(sum(float(x) for x in lost)) / scale if scale else 0.0

    before = measure()
    try:
        _train(block, calls, targets, trained, refinement, seed, scale / len(calls), on_step)
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
        after = measure()
        if not after < before:
            found, after = dict(layers), before
            with torch.no_grad():
                for name, value in started.items():
                    block.get_parameter(name).copy_(value)
    finally:
        for name in forms:
            parametrize.remove_parametrizations(block.get_submodule(name), "weight", leave_parametrized=False)
        for name in norms:
            block.get_parameter(name).requires_grad_(False)
    return Matched(found, before, after)


def _train(
    block: nn.Module,
    calls: Sequence[Call],
    targets: Sequence[Tensor],
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
            order = torch.randperm(len(calls), generator=generator).tolist()
        k = order.pop()
        warm = min(1.0, (step + 1) / max(1, refinement.steps // 20))
        rate = refinement.lr * warm * 0.5 * (1 + math.cos(math.pi * step / refinement.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = _loss(block, calls[k], targets[k]) / scale if scale else _loss(block, calls[k], targets[k])
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, float(loss.detach()))


def _loss(block: nn.Module, call: Call, target: Tensor) -> Tensor:
    return (hidden_states(run_block(block, call)).float() - target).square().sum()


def _change(target: Tensor, call: Call) -> Tensor:
    """What the dense block adds to its input, where its output has the shape of that."""
    given = next((x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)), None)
    return target - given if given is not None and given.shape == target.shape else target
