"""How text, or rows with images, go through a model: the blocks in their order, and those never reached."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..errors import UsageError
from .blocks import find_blocks, holding
from .reading import cannot_be_run

REMEDY = "Compress it without --calibration."
NOTHING = 8  # tokens
Kind = tuple[Mapping[str, torch.Tensor], float, float]
"""Keyword arguments of a batch; and for each token of the text, how many batches of as many tokens it has, and how many
batches at all, which is how often there are such images."""


@dataclass(frozen=True)
class Flow:
    """What a block does for a token of the text, on average. products: numbers of its weights that are multiplied with
    a vector, each as often as it is, as those of a tower are with many patches and those of an expert with few tokens.
    width: numbers that flow into the block.
    """

    products: float
    width: float


@dataclass(frozen=True)
class Route:
    """blocks: in the order in which they are called, each once, those beside them without a layer, too, so that no more
    than one is in memory at a time; ("",) if the whole model has to be one, and why.

    unreached: blocks that text never gets to, as those of a tower for pictures. blind: those of them that hold a layer
    to be compressed. What lies in neither is outside. optional: blocks that rows with images reach, and others do not.
    flows: of blocks, as far as a pass could see them.
    """

    blocks: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    why: str = ""
    blind: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    flows: Mapping[str, Flow] = field(default_factory=dict, compare=False)

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


def find_route(model: Any, layers: Collection[str], kinds: Sequence[Kind] = ()) -> Route:
    """The route through the blocks around `layers`; UsageError if the model does nothing with what it is to read.

    kinds: that which reaches most blocks first; () for text alone.
    """
    blocks = find_blocks(model, layers)
    asked = holding(blocks, layers)
    name = type(model).__name__
    if not asked:
        return Route(("",), why=f"{name} has no repeated blocks around its layers")
    kinds = kinds or [(text_of_nothing(model), 1 / NOTHING, 1 / NOTHING)]
    remedies = [REMEDY, *["Give every row an image."] * (len(kinds) - 1)]
    passes = [_watch(model, blocks, kind[0], remedy) for kind, remedy in zip(kinds, remedies, strict=True)]
    seen, *others = passes
    flows = _flows(blocks, kinds, passes)
    if seen.changed:
        return Route(("",), why=f"{name} changes weights of its blocks itself, all at once")
    if not seen.whole and seen.called == list(blocks[: len(seen.called)]):
        return Route(tuple(blocks), flows=flows)  # how it goes on is not known, and `Relay` sees if it goes otherwise
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
    return Route(route, unreached, blind=blind, optional=optional, flows=flows)


def _flows(blocks: Collection[str], kinds: Sequence[Kind], passes: Sequence[_Seen]) -> dict[str, Flow]:
    """Of the blocks that a pass saw multiply something."""
    found = {}
    for block in blocks:
        products = width = 0.0
        for (batch, by_tokens, by_images), seen in zip(kinds, passes, strict=True):
            tokens = batch["input_ids"].numel() if "input_ids" in batch else None
            often = by_tokens if tokens in (None, seen.vectors[block]) else by_images
            products += often * seen.products[block]
            width += often * seen.widths[block]
        if products and width:
            found[block] = Flow(products, width)
    return found


def assumed_route(model: Any, layers: Collection[str]) -> Route:
    """The route where there is nothing yet to run the model on: through all blocks, in the order of the modules."""
    return Route(find_blocks(model, layers) or ("",))


@dataclass
class _Seen:
    """called: blocks as they were. touched: those of which anything was. changed: whether a weight was written to.

    whole: whether the pass came to its end. products, widths: of each block, as in `Flow`, for the batch.
    vectors: that flow into it.
    """

    called: list[str] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    products: Counter[str] = field(default_factory=Counter)
    widths: Counter[str] = field(default_factory=Counter)
    vectors: Counter[str] = field(default_factory=Counter)
    changed: bool = False
    whole: bool = True


def text_of_nothing(model: Any) -> dict[str, torch.Tensor]:
    """A few tokens, as a model is called with text."""
    ids = torch.full((1, NOTHING), 3, dtype=torch.long)
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
    seen = _Seen()

    def note(block: str, itself: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen.touched.add(block)
            given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor) and one.dim() > 1]
            x = next((one for one in given if one.is_floating_point()), None)
            if itself:
                seen.called.append(block)
            if x is None:
                return
            if itself:
                seen.widths[block] += x.numel()
                seen.vectors[block] += x.numel() // max(1, x.shape[-1])
            seen.products[block] += _products(module, x, given)

        return hook

    hooks = [
        module.register_forward_pre_hook(note(block, module is model.get_submodule(block)), with_kwargs=True)
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
        seen.products.pop(seen.called[-1], None)  # of which it saw a part
        seen.whole = False  # a head that looks for a certain token, say, or a product that takes no zeros like ours
    finally:
        for hook in hooks:
            hook.remove()
    seen.changed = versions != [parameter._version for parameter in model.parameters()]
    return seen


def _products(module: nn.Module, x: torch.Tensor, given: Sequence[torch.Tensor]) -> int:
    """Weights of the module itself, each as often as it meets a vector of x; given: all that it is called with."""
    found = 0
    for weight in module._parameters.values():
        if weight is None or weight.dim() < 2:
            continue
        if isinstance(module, _ConvNd):
            found += weight.numel() * (x.numel() // max(1, x.shape[1])) // math.prod(module.stride)
        elif x.shape[-1] in weight.shape[-2:]:  # whichever way it lies
            met = weight.numel() * (x.numel() // max(1, x.shape[-1]))
            if weight.dim() == 3:  # of all experts, of which a token is sent to some
                chosen = next((one.shape[-1] for one in given if not one.is_floating_point()), len(weight))
                met = met // max(1, len(weight)) * min(chosen, len(weight))
            found += met
    return found


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
