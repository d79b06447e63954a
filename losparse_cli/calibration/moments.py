"""H = XᵀX / tokens of what each linear layer is fed, gathered while a block runs, by one process or several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UsageError
from ..models.blocks import Call, run_block
from ..models.experts import ExpertLayers, expert_layers
from ..parallel.group import Alone, Ranks
from ..parallel.sums import sum_for_all
from ..parallel.tree import TreeSum
from .squares import add_squares, diagonals, empty_squares, whole

SHARED, EVEN = 1.0, 0.1
"""Tokens an input that an expert sees beside its own: of what all experts are fed, and where each is fed something else
(its second matrix) of inputs that are all alike."""
REMEDY = "Try other text, or compress without --calibration."


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


@dataclass
class Fed:
    """What layers that share their inputs were fed, by all ranks. owner: the rank that holds its second moment."""

    layers: tuple[str, ...]
    tokens: int
    owner: int
    width: int
    _weight: float
    _squares: Tensor | None = None

    def moments(self) -> Moments:
        """At its owner, once: what is summed up is let go of."""
        squares, self._squares = self._squares, None
        assert squares is not None, "its owner asks once"
        return Moments(self.layers, whole(squares, self.width).div_(self._weight), self.tokens)


def gather_moments(
    block: nn.Module,
    layers: Sequence[str],
    calls: Iterable[Call],
    *,
    prefix: str = "",
    remedy: str = REMEDY,
    on_output: Callable[[Any], None] | None = None,
    share: bool = True,
) -> list[Moments]:
    """As `gather_fed`, by one process, with running sums: of each group the moments."""
    found = gather_fed(block, layers, calls, prefix=prefix, remedy=remedy, on_output=on_output, share=share)
    return [fed.moments() for fed in found]


def gather_fed(
    block: nn.Module,
    layers: Sequence[str],
    calls: Iterable[Call],
    *,
    prefix: str = "",
    remedy: str = REMEDY,
    on_output: Callable[[Any], None] | None = None,
    share: bool = True,
    group: Ranks | None = None,
    first: int | None = None,
    owners: Callable[[Sequence[Fed]], Sequence[int]] = lambda found: [0] * len(found),
) -> list[Fed]:
    """Run the dense `block` on every call, hand its output to `on_output`, and sum up what its layers are fed.

    layers: names of linear modules inside `block`. Layers that are fed the very same tensor (q, k, v; gate, up)
    share one second moment. Layers that were never called are left out, but for experts: with `share` each sees what
    all are fed, too (`_shared`). Where nobody asks for outputs, and the first call called each layer once, later calls
    end with the last layer that is fed.

    group: ranks that have calls of their own, None for one alone. first: number of the first of these calls among those
    of all ranks, which follow one another; sums are then the same however calls are dealt out. None: calls are added up
    one after another. owners: decides, on each rank alike, which ranks are to hold the sums. CheckpointError names a
    layer, after `prefix`, whose inputs are not finite, and the `remedy`.
    """
    group = group or Alone()
    experts = expert_layers(block, layers) if share else []
    local = _Gathering(block, layers, experts, first)
    local.run(calls, on_output)
    leaders, tokens, widths = _agreed(group, local, prefix)
    weights: dict[str, float] = {leader: count for leader, count in tokens.items() if count}
    additions = _shared(experts, leaders, weights, widths)
    place = {layer: number for number, layer in enumerate(layers)}
    # Whichever was called first; and no expert of old that was called with no rows.
    ordered = sorted((leader for leader in weights if leader in place), key=place.__getitem__)
    found = []
    for leader in ordered:
        members = tuple(name for name in layers if leaders.get(name) == leader)
        found.append(Fed(members, tokens.get(leader, 0), 0, widths[leader], weights[leader]))
    common: dict[str, Tensor] = {}
    for module in dict.fromkeys(module for module, _ in additions.values() if module):
        common[module] = sum_for_all(group, local.sums.pop(module, TreeSum()))
    for fed, leader, owner in zip(found, ordered, owners(found), strict=True):
        fed.owner = owner
        squares = group.sum_to(owner, local.sums.pop(leader, TreeSum()))
        if group.rank == owner:
            fed._squares = squares = _with(squares, additions.get(leader), common, fed.width)
            if not all(bool(torch.isfinite(part).all()) for part in diagonals(squares, fed.width)):
                raise CheckpointError(
                    f"What {prefix}{leader} is fed is not finite: the model overflows, or its weights are damaged. "
                    f"{remedy}"
                )
    return found


class _Gathering:
    """The sums of this rank's calls. leaders: layer -> the first layer that is fed the same tensor. tokens, widths: of
    what leaders are fed, and of what all experts are."""

    def __init__(
        self, block: nn.Module, layers: Sequence[str], experts: Sequence[ExpertLayers], first: int | None
    ) -> None:
        self._block, self._first = block, first
        self._modules = {name: block.get_submodule(name) for name in layers}
        self._owners = {one.owner: block.get_submodule(one.owner) for one in experts if one.owner}
        self.leaders: dict[str, str] = {}
        self.tokens: dict[str, int] = {}
        self.widths: dict[str, int] = {}
        self.sums: dict[str, TreeSum] = {}
        self._leaf: dict[str, Tensor] = {}  # sums of the call that runs, or of all
        self._fed: list[tuple[Tensor, str]] = []
        self._called: list[str] = []
        self._stops = False

    def run(self, calls: Iterable[Call], on_output: Callable[[Any], None] | None) -> None:
        """Run the block on its calls."""
        hooks = [module.register_forward_pre_hook(self._watch(name)) for name, module in self._modules.items()]
        for name, module in self._owners.items():
            hooks.append(module.register_forward_pre_hook(self._watch_all(name), with_kwargs=True))
        number = -1
        try:
            with torch.no_grad():
                for number, call in enumerate(calls):
                    try:
                        if call.absent:
                            continue
                        output = run_block(self._block, call)
                        if on_output is None:
                            self._stops = sorted(self._called) == sorted(self._modules)
                        else:
                            on_output(output)
                    except _AllFed:
                        pass
                    self._fed.clear()
                    self._called.clear()
                    if self._first is not None:
                        self._close(self._first + number)
        finally:
            for hook in hooks:
                hook.remove()
        self._close(0)

    def _close(self, leaf: int) -> None:
        """What runs from here on is of another leaf."""
        for name in list(self._leaf):
            tree = self.sums.setdefault(name, TreeSum(self._first or 0))
            tree.add(leaf, self._leaf.pop(name))

    def _add(self, name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        if name not in self._leaf:
            self._leaf[name] = empty_squares(rows.shape[1], rows.device)
        add_squares(self._leaf[name], rows)
        self.tokens[name] = self.tokens.get(name, 0) + rows.shape[0]
        self.widths[name] = rows.shape[1]

    def _watch_all(self, owner: str) -> Callable[..., None]:
        return lambda module, args, named: self._add(owner, args[0] if args else named["hidden_states"])

    def _watch(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, leaders = args[0], self.leaders
            if name not in leaders:
                leaders[name] = next((leader for seen, leader in self._fed if seen is x), name)
            if leaders[name] == name:
                self._fed.append((x, name))
                self._add(name, x)
            self._called.append(name)
            if self._stops and len(self._called) >= len(self._modules) and set(self._called) == set(self._modules):
                raise _AllFed

        return hook


def _agreed(group: Ranks, local: _Gathering, prefix: str) -> tuple[dict[str, str], dict[str, int], dict[str, int]]:
    """Leaders, tokens and widths of all ranks together; a layer that one of them alone has called is known to all."""
    leaders: dict[str, str] = {}
    tokens: dict[str, int] = {}
    widths: dict[str, int] = {}
    for its_leaders, its_tokens, its_widths in group.agree([local.leaders, local.tokens, local.widths]):
        for layer, leader in its_leaders.items():
            if leaders.setdefault(layer, leader) != leader:
                raise UsageError(
                    f"{prefix}{layer} shares its inputs with {leader} in some windows of the text alone, so that "
                    "processes disagree about it. Compress the model in one process."
                )
        for name, count in its_tokens.items():
            tokens[name] = tokens.get(name, 0) + count
        widths |= its_widths
    return leaders, tokens, widths


def _shared(
    experts: list[ExpertLayers], leaders: dict[str, str], weights: dict[str, float], widths: dict[str, int]
) -> dict[str, tuple[str, float]]:
    """Let every expert see some tokens more than it was sent: few say little of what it is fed, and none say nothing.

    All experts are fed from the same hidden states, so that the next best is what all of these are; it is all that an
    expert has which no token was sent to. What its second matrix is fed nobody else knows: there all inputs become a
    little more alike. Leader -> (module that is fed what all are, "" for all alike; how much of it). Adds to `weights`
    in place, and to `leaders` and `widths` those of experts without tokens.
    """
    found = {}
    for one in experts:
        count = weights.pop(one.owner, 0)
        for leader, members in one.layers.items():
            if count:
                more = SHARED * widths[one.owner]
                found[leader] = (one.owner, more / count)
                leaders |= dict.fromkeys(members, leader)
                widths[leader] = widths[one.owner]
            elif weights.get(leader):
                more = EVEN * widths[leader]
                found[leader] = ("", more / weights[leader])
            else:
                continue
            weights[leader] = weights.get(leader, 0) + more
    return found


def _with(squares: Tensor | None, addition: tuple[str, float] | None, common: dict[str, Tensor], width: int) -> Tensor:
    """A sum with what `_shared` adds to it."""
    if addition is None:
        assert squares is not None, "a layer with tokens was summed up by some rank"
        return squares
    owner, factor = addition
    if owner:
        return common[owner] * factor if squares is None else squares.add_(common[owner], alpha=factor)
    assert squares is not None, "a layer with tokens was summed up by some rank"
    parts = diagonals(squares, width)
    mean = float(sum(part.sum(dtype=torch.float64) for part in parts)) / width
    for part in parts:
        part.add_(mean * factor)
    return squares
