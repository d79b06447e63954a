"""H = XᵀX / tokens of what each linear layer is fed, gathered while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.blocks import Call, run_block


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
    on_output: Callable[[Any], None] = lambda output: None,
) -> list[Moments]:
    """Run the dense `block` on every call, hand its output to `on_output`, and return the moments of its layers.

    layers: names of linear modules inside `block`. Layers that are fed the very same tensor (q, k, v; gate, up)
    share one Moments. Layers that were never called are left out. CheckpointError names a layer, after `prefix`, whose
    inputs are not finite, and the `remedy`.
    """
    modules = {name: block.get_submodule(name) for name in layers}
    leaders: dict[str, str] = {}  # layer -> the first layer that is fed the same tensor
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    fed: list[tuple[Tensor, str]] = []

    def watch(name: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if name not in leaders:
                leaders[name] = next((leader for seen, leader in fed if seen is x), name)
            if leaders[name] != name:
                return
            fed.append((x, name))
            rows = x.reshape(-1, x.shape[-1]).float()
            H = sums.get(name)
            if H is None:
                H = sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            H.addmm_(rows.T, rows)
            tokens[name] = tokens.get(name, 0) + rows.shape[0]

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            for call in calls:
                on_output(run_block(block, call))
                fed.clear()
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for leader, H in sums.items():
        if not tokens[leader]:  # an expert that was called with no rows
            continue
        if not bool(torch.isfinite(H.diagonal()).all()):
            raise CheckpointError(
                f"What {prefix}{leader} is fed is not finite: the model overflows, or its weights are damaged. {remedy}"
            )
        members = tuple(name for name in layers if leaders.get(name) == leader)
        found.append(Moments(members, H / tokens[leader], tokens[leader]))
    return found
