"""How text, or rows with images, go through a model: the blocks in their order, and those never reached."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from .blocks import find_blocks, holding
from .reading import cannot_be_run

REMEDY = "Compress it without --calibration."


@dataclass(frozen=True)
class Route:
    """blocks: in the order in which they are called, each once, those beside them without a layer, too, so that no more
    than one is in memory at a time; ("",) if the whole model has to be one, and why.

    unreached: blocks that text never gets to, as those of a tower for pictures. blind: those of them that hold a layer
    to be compressed. What lies in neither is outside. optional: blocks that rows with images reach, and others do not.
    """

    blocks: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    why: str = ""
    blind: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What cannot be done as usual, each a sentence with its reason."""
        told = []
        if self.why:
            told.append(f"{self.why}, so it is calibrated as a whole: all of its weights are in memory at once.")
        if self.blind:
            more = f" and {len(self.blind) - 1} more blocks" if len(self.blind) > 1 else ""
            told.append(f"Text never reaches {self.blind[0]}{more}: what lies there is compressed without it.")
        return told


def find_route(model: Any, layers: Collection[str], kinds: Sequence[Mapping[str, torch.Tensor]] = ()) -> Route:
    """The route through the blocks around `layers`; UsageError if the model does nothing with what it is to read.

    kinds: keyword arguments of one batch of each kind, that which reaches most blocks first; () for text alone.
    """
    blocks = find_blocks(model, layers)
    asked = holding(blocks, layers)
    name = type(model).__name__
    if not asked:
        return Route(("",), why=f"{name} has no repeated blocks around its layers")
    first, *rest = kinds or [text_of_nothing(model)]
    seen = _watch(model, blocks, first, REMEDY)
    others = [_watch(model, blocks, kind, "Give every row an image.") for kind in rest]
    if seen.changed:
        return Route(("",), why=f"{name} changes weights of its blocks itself, all at once")
    if not seen.whole and seen.called == list(blocks[: len(seen.called)]):
        return Route(tuple(blocks))  # how it goes on is not known, and `Relay` sees if it goes otherwise
    unreached = tuple(block for block in blocks if block not in seen.touched)
    apart = [block for block in asked if block in seen.touched and block not in seen.called]
    if apart:
        return Route(("",), why=f"{name} runs parts of {apart[0]} by themselves")
    if any(seen.called.count(block) > 1 for block in asked):
        return Route(("",), why=f"{name} calls the same block for several of its layers")
    if not set(asked) & set(seen.called):
        raise UsageError(f"Text reaches none of the layers of {name} that are to be compressed. {REMEDY}")
    blind = tuple(block for block in unreached if block in asked)
    route = tuple(block for block in seen.called if seen.called.count(block) == 1)
    optional = tuple(block for block in route if any(block not in other.touched for other in others))
    if any([b for b in other.called if b in route] != [b for b in route if b in other.touched] for other in others):
        return Route(("",), why=f"{name} takes its blocks in another order where a row has no image")
    return Route(route, unreached, blind=blind, optional=optional)


def assumed_route(model: Any, layers: Collection[str]) -> Route:
    """The route where there is nothing yet to run the model on: through all blocks, in the order of the modules."""
    return Route(find_blocks(model, layers) or ("",))


@dataclass
class _Seen:
    """called: blocks as they were. touched: those of which anything was. changed: whether a weight was written to.

    whole: whether the pass came to its end.
    """

    called: list[str]
    touched: set[str]
    changed: bool = False
    whole: bool = True


def text_of_nothing(model: Any) -> dict[str, torch.Tensor]:
    """A few tokens, as a model is called with text."""
    ids = torch.full((1, 8), 3, dtype=torch.long)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


def _watch(model: Any, blocks: Collection[str], batch: Mapping[str, torch.Tensor], remedy: str) -> _Seen:
    """What a pass over the batch does, without weights; with zeros for weights where it asks for values."""
    with _plain_experts(model), _no_cache(model):
        try:
            return _pass(model, blocks, batch, "meta")
        except Exception:  # whatever looks at values, of which there are none
            with _zeros(model), cannot_be_run(type(model).__name__, remedy, [batch]):
                return _pass(model, blocks, batch, "cpu")


def _pass(model: Any, blocks: Collection[str], batch: Mapping[str, torch.Tensor], device: str) -> _Seen:
    seen = _Seen([], set())

    def note(block: str, itself: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            seen.touched.add(block)
            if itself:
                seen.called.append(block)

        return hook

    hooks = [
        module.register_forward_pre_hook(note(block, module is model.get_submodule(block)))
        for block in blocks
        for module in model.get_submodule(block).modules()
    ]
    versions = [parameter._version for parameter in model.parameters()]
    given = {
        name: tensor.to(device, model.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in batch.items()
    }
    try:
        with torch.no_grad():
            model(**given)
    except Exception:
        if device == "meta" or not seen.called:
            raise
        seen.whole = False  # a head that looks for a certain token, say, or a product that takes no zeros like ours
    finally:
        for hook in hooks:
            hook.remove()
    seen.changed = versions != [parameter._version for parameter in model.parameters()]
    return seen


@contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """No cache, as in what follows: some models cannot make one of what their configuration says."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, cached in before:
            config.use_cache = cached


@contextmanager
def _plain_experts(model: Any) -> Iterator[None]:
    """Experts one by one, in plain products: those in groups take neither the meta device nor zeros like ours."""
    if not hasattr(model, "get_experts_implementation"):
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def _zeros(model: nn.Module) -> Iterator[None]:
    """Zeros in place of what lies on the meta device, a single one in memory for each parameter. Linear layers give
    zeros at once: the products of a large model would take minutes, and copies of its weights."""
    before: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    linears = [module for module in model.modules() if type(module) is nn.Linear and module.weight.is_meta]
    for linear in linears:
        linear.forward = partial(_zero_output, linear.out_features)  # type: ignore[method-assign]
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for kept in tables:
            for key, tensor in kept.items():
                if tensor is not None and tensor.is_meta:
                    before.append((kept, key, tensor))
                    zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    kept[key] = nn.Parameter(zeros, requires_grad=False) if is_parameter else zeros
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward
        for kept, key, tensor in before:
            kept[key] = tensor


def _zero_output(width: int, x: torch.Tensor) -> torch.Tensor:
    return x.new_zeros(*x.shape[:-1], width)
