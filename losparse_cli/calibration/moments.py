"""H = XᵀX / tokens of what each linear layer is fed, gathered while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.blocks import Call, run_block
from ..models.experts import expert_layers

TILE = 384  # columns of H whose products are computed together: those left of them are known by symmetry


SHARED = 1.0
"""Tokens an input of what all experts are fed, that each sees beside its own."""


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
    share one Moments. Layers that were never called are left out, but for those of experts: with `share` each expert
    sees what all see, too (`_share`). Where nobody asks for outputs, and the first call
    called each layer once, later calls end with the last layer that is fed. CheckpointError names a layer, after
    `prefix`, whose inputs are not finite, and the `remedy`.
    """
    modules = {name: block.get_submodule(name) for name in layers}
    leaders: dict[str, str] = {}  # layer -> the first layer that is fed the same tensor
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    fed: list[tuple[Tensor, str]] = []
    called: list[str] = []
    stops = False

    def watch(name: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if name not in leaders:
                leaders[name] = next((leader for seen, leader in fed if seen is x), name)
            if leaders[name] == name:
                fed.append((x, name))
                rows = x.reshape(-1, x.shape[-1]).float()
                if name not in sums:
                    sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
                _add_squares(sums[name], rows)
                tokens[name] = tokens.get(name, 0) + rows.shape[0]
            called.append(name)
            if stops and len(called) >= len(modules) and set(called) == set(modules):
                raise _AllFed

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]  # type: ignore[arg-type]
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
        _share(block, layers, leaders, sums, weights)
    for leader, H in sums.items():
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
    block: nn.Module, layers: Sequence[str], leaders: dict[str, str], sums: dict[str, Tensor], weights: dict[str, float]
) -> None:
    """Let every expert see SHARED tokens an input more, of second moments as all experts together have them.

    Few tokens say little of what an expert is fed, and none say nothing: what all are fed is the next best. Adds to
    `sums` and `weights` in place, and to `leaders` those of experts that no token was sent to.
    """
    for group in expert_layers(block, layers):
        seen = [leader for leader in group if leader in weights]
        if not seen:
            continue
        mean = torch.zeros_like(sums[seen[0]])
        for leader in seen:
            mean += sums[leader]
        mean /= sum(weights[leader] for leader in seen)
        more = SHARED * len(mean)
        for leader, members in group.items():
            if leader in weights:
                sums[leader].add_(mean, alpha=more)
            else:
                sums[leader] = mean * more
                leaders |= dict.fromkeys(members, leader)
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
