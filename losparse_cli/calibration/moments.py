"""H = XᵀX / tokens of what each linear layer is fed, gathered while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.blocks import Call, run_block
from ..models.experts import ExpertLayers, expert_layers

TILE = 384  # columns of H whose products are computed together: those left of them are known by symmetry
SHARED, EVEN = 1.0, 0.1
"""Tokens an input that an expert sees beside its own: of what all experts are fed, and where each is fed something else
(its second matrix) of inputs that are all alike."""


class _AllFed(BaseException):
    """Raised inside the model's code when every layer was fed, and nobody asks for what the block returns."""


@dataclass
class Moments:
    """Second moment of the inputs that the layers `layers` share.

    H: (in_features, in_features), float32, the mean over tokens of x xᵀ. tokens: how many were seen.
    """

    layers: tuple[str, ...]
    H: Tensor
    tokens: int


def gather_moments(
    block: nn.Module,
    layers: Sequence[str],
    calls: Iterable[Call],
    *,
    prefix: str = "",
    remedy: str = "Try other text, or compress without --calibration.",
    on_output: Callable[[Any], None] | None = None,
    share: bool = True,
) -> list[Moments]:
    """Run the dense `block` on every call, hand its output to `on_output`, and return the moments of its layers.

    layers: names of linear modules inside `block`. Layers that are fed the very same tensor (q, k, v; gate, up)
    share one Moments. Layers that were never called are left out, but for experts: with `share` each sees what all are
    fed, too (`_share`). Where nobody asks for outputs, and the first call called each layer once, later calls end with
    the last layer that is fed. CheckpointError names a layer, after `prefix`, whose inputs are not finite, and the
    `remedy`.
    """
    modules = {name: block.get_submodule(name) for name in layers}
    groups = expert_layers(block, layers) if share else []
    leaders: dict[str, str] = {}  # layer -> the first layer that is fed the same tensor
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    fed: list[tuple[Tensor, str]] = []
    called: list[str] = []
    stops = False

    def add(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        if name not in sums:
            sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        _add_squares(sums[name], rows)
        tokens[name] = tokens.get(name, 0) + rows.shape[0]

    def watch_all(owner: str) -> Callable[..., None]:
        return lambda module, args, named: add(owner, args[0] if args else named["hidden_states"])

    def watch(name: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if name not in leaders:
                leaders[name] = next((leader for seen, leader in fed if seen is x), name)
            if leaders[name] == name:
                fed.append((x, name))
                add(name, x)
            called.append(name)
            if stops and len(called) >= len(modules) and set(called) == set(modules):
                raise _AllFed

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]  # type: ignore[arg-type]
    for group in groups:
        if group.owner:
            module = block.get_submodule(group.owner)
            hooks.append(module.register_forward_pre_hook(watch_all(group.owner), with_kwargs=True))
    try:
        with torch.no_grad():
            for call in calls:
                try:
                    output = run_block(block, call)
                    if on_output is None:
                        stops = sorted(called) == sorted(modules)
                    else:
                        on_output(output)
                except _AllFed:
                    pass
                fed.clear()
                called.clear()
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    weights: dict[str, float] = {leader: count for leader, count in tokens.items() if count}
    if share:
        _share(groups, leaders, sums, weights)
    place = {layer: number for number, layer in enumerate(layers)}
    for leader in sorted(sums, key=place.__getitem__):  # whichever was called first
        H = sums.pop(leader)
        if leader not in weights:  # an expert of old that was called with no rows
            continue
        if not bool(torch.isfinite(H.diagonal()).all()):
            raise CheckpointError(
                f"What {prefix}{leader} is fed is not finite: the model overflows, or its weights are damaged. {remedy}"
            )
        members = tuple(name for name in layers if leaders.get(name) == leader)
        found.append(Moments(members, _mirrored(H).div_(weights[leader]), tokens.get(leader, 0)))
    return found


def _share(
    groups: list[ExpertLayers], leaders: dict[str, str], sums: dict[str, Tensor], weights: dict[str, float]
) -> None:
    """Let every expert see some tokens more than it was sent: few say little of what it is fed, and none say nothing.

    All experts are fed from the same hidden states, so that the next best is what all of these are; it is all that an
    expert has which no token was sent to. What its second matrix is fed nobody else knows: there all inputs become a
    little more alike. Adds to `sums` and `weights` in place, and to `leaders` those of experts without tokens.
    """
    for group in groups:
        common = sums.pop(group.owner, None)
        count = weights.pop(group.owner, 0)
        for leader, members in group.layers.items():
            H = sums.get(leader)
            if common is not None and count:
                more = SHARED * len(common)
                sums[leader] = common * (more / count) if H is None else H.add_(common, alpha=more / count)
                leaders |= dict.fromkeys(members, leader)
            elif H is not None and weights.get(leader):
                more = EVEN * len(H)
                H.diagonal().add_(H.diagonal().mean() * (more / weights[leader]))
            else:
                continue
            weights[leader] = weights.get(leader, 0) + more


def _add_squares(H: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows to H, (n, n), on and above the diagonal of its tiles alone; rows: (tokens, n)."""
    for begin in range(0, len(H), TILE):
        end = begin + TILE
        H[begin:end, begin:].addmm_(rows[:, begin:end].T, rows[:, begin:])


def _mirrored(H: Tensor) -> Tensor:
    """H, in place, with its upper triangle on both sides."""
    for begin in range(0, len(H), TILE):
        end = begin + TILE
        corner = H[begin:end, begin:end]
        corner.copy_(corner.triu().add_(corner.triu(1).T))
        H[end:, begin:end] = H[begin:end, end:].T
    return H
