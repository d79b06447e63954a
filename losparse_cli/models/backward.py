"""The graph of what a model does between its blocks, and each block run once more to carry gradients through it.

The model's own forward pass is halted at each block as by `Relay`, but autograd hears of what it does in between. What
a block returns is handed on as leaves, so the graph is made of small pieces, from the leaves of some blocks to what
another is called with: a mask, a norm between encoder and decoder, the head. Blocks are in none of them. Backwards,
from the last block to the first, a block runs once more on copies of what it was called with, and hands what it finds
for those to the piece that they came from, which adds it to the leaves of blocks before.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import copy as shallow
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Call, Relay, changed, run_block
from .reading import code_errors

REMEDY = "Compress it with --sensitivity off."


@contextmanager
def gradients_allowed(model: nn.Module, block: str) -> Iterator[None]:
    """Turns whatever a model's own code raises where it takes no gradients into a UsageError that names the block."""
    where = f" at {block}" if block else ""
    with code_errors(lambda reason: f"{type(model).__name__} takes no gradients{where} ({reason}). {REMEDY}"):
        yield


class GradientRelay(Relay):
    """A Relay of which autograd hears: `Rerun.set_output` says what a block returned. Its passes go on after the last.

    head: the module after which what the model returns is large, or None.
    """

    gradients = True

    def __init__(
        self, model: nn.Module, blocks: Any, batches: Any, head: nn.Module | None, optional: Collection[str] = ()
    ) -> None:
        super().__init__(model, blocks, batches, optional)
        self.kept: dict[str, list[Call]] = {}
        """Block -> its calls, with what it returned."""
        self._head = head
        self._at = ""

    def __iter__(self) -> Iterator[tuple[str, list[Call]]]:
        for self._at, calls in super().__iter__():
            self.kept[self._at] = calls
            yield self._at, calls

    def _advance(self, runner: Any) -> None:
        with gradients_allowed(self._model, self._at):
            runner.advance()

    def head_call(self, number: int) -> Call | None:
        """The call of the head by batch `number`, which is halted there; None if the model came to its end without."""
        runner = self._current = self._runners[number]
        with self._halted_at_head(lambda *args, **kwargs: runner.halt("", args, kwargs)):
            self._advance(runner)
        return runner.call

    def replay(self, number: int, output: Any) -> Any:
        """What the model returns for this batch if its blocks return what they did, and its head `output`."""
        self._current = _Replay({block: calls[number] for block, calls in self.kept.items()})  # type: ignore[assignment]
        with (
            self._halted_at_head(lambda *args, **kwargs: output),
            gradients_allowed(self._model, self._at),
            torch.enable_grad(),
        ):
            return self._model(**self._batches[number])

    @contextmanager
    def _halted_at_head(self, forward: Callable[..., Any]) -> Iterator[None]:
        if self._head is None:
            yield
            return
        self._head.forward = forward
        try:
            yield
        finally:
            vars(self._head).pop("forward", None)


class _Replay:
    """In the place of a batch's runner."""

    def __init__(self, calls: dict[str, Call]) -> None:
        self._calls = calls

    def halt(self, block: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._calls[block].output


# --- one block ------------------------------------------------------------------------------------


class Rerun:
    """`call`, as `Relay` found it, on copies of its tensors, so that nothing that the block does reaches the graph.

    gradients: whether those copies need gradients whose tensors do.
    """

    def __init__(self, call: Call, *, gradients: bool = False) -> None:
        self._original = call
        self._leaves: list[tuple[Tensor, Tensor]] = []  # (what the model gave, the leaf under its copy)
        self._copies: dict[int, Tensor] = {}
        self._given: dict[int, Tensor] = {}
        self._shared: list[tuple[Any, Any, dict[Any, Any]]] = []  # the model's, ours, as it was

        def copy(given: Tensor) -> Tensor:
            if id(given) not in self._copies:
                leaf = given.detach()
                if gradients and given.requires_grad:
                    self._leaves.append((given, leaf.requires_grad_()))
                made = self._copies[id(given)] = leaf.clone()
                self._given[id(made)] = given
            return self._copies[id(given)]

        def own(value: Any) -> Any:
            if not isinstance(value, dict | UserDict):
                return changed(value, copy)
            made = shallow(value)
            made.update({key: changed(part, copy) for key, part in value.items()})
            self._shared.append((value, made, dict(made)))
            return made

        with torch.set_grad_enabled(gradients):
            self.call = replace(
                call, args=tuple(map(own, call.args)), kwargs={name: own(value) for name, value in call.kwargs.items()}
            )
        # As it was now: blocks write into dicts that they share, as those of Gemma 3n do with keys and values.
        call.args = tuple(map(_as_it_is, call.args))
        call.kwargs = {name: _as_it_is(value) for name, value in call.kwargs.items()}

    def _written(self) -> list[tuple[Any, Any, Any]]:
        """(the model's own dict, key, value) of all that the block put into dicts that it was given."""
        return [
            (shared, key, value)
            for shared, made, before in self._shared
            for key, value in made.items()
            if value is not before.get(key)
        ]

    def set_output(self, output: Any, keep: Callable[[Tensor], Tensor]) -> None:
        """The model is told that the block returned `output`, as leaves that `keep` keeps.

        What the block was given and only returns, as T5's blocks do with the biases of positions, stays what it was.
        """
        leaves: dict[int, Tensor] = {}

        def leaf(tensor: Tensor) -> Tensor:
            if id(tensor) in self._given and tensor._version == 0:  # else the block wrote over it
                return self._given[id(tensor)]
            if id(tensor) not in leaves:
                leaves[id(tensor)] = _leaf(tensor, keep)
            return leaves[id(tensor)]

        self._original.output = changed(output, leaf)
        written = self._written()
        for shared, key, value in written:
            shared[key] = changed(value, leaf)
        self._original.written = tuple(shared[key] for shared, key, _ in written)
        self._original.caches = self.call.caches

    def backward(self, block: nn.Module) -> None:
        """Run the block, and carry the gradients of what it returned to what the model gave it."""
        given = set(self._copies)
        returned = self._returned()
        with torch.enable_grad():
            output = run_block(block, self.call)
            again = floating((output, *(value for _, _, value in self._written())))
            del output
        pairs = [
            (tensor, leaf.grad)
            for tensor, leaf in {id(b): (a, b) for a, b in zip(again, returned, strict=True)}.values()
            if id(leaf) not in given and leaf.grad is not None and tensor.requires_grad
        ]
        if not pairs:
            return
        torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])
        del again, pairs
        back = [(tensor, leaf.grad) for tensor, leaf in self._leaves if leaf.grad is not None]
        if back:
            # Other blocks may be given what lies behind it, too: pieces of the graph are freed with their calls.
            torch.autograd.backward([tensor for tensor, _ in back], [grad for _, grad in back], retain_graph=True)

    def _returned(self) -> list[Tensor]:
        return floating((self._original.output, *self._original.written))

    @property
    def reached(self) -> bool:
        """Whether the loss depends on anything that the block returned."""
        given = set(self._copies)
        return any(leaf.grad is not None for leaf in self._returned() if id(leaf) not in given)


def _as_it_is(value: Any) -> Any:
    return shallow(value) if isinstance(value, dict | UserDict) else value


def floating(value: Any) -> list[Tensor]:
    """Every tensor of floating values in what a block is given or returns, in its order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    changed(value, note)
    return found


def _leaf(tensor: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = keep(tensor.detach()).requires_grad_()
    kept = False

    def keep_gradient(leaf: Tensor) -> None:
        nonlocal kept
        if not kept and leaf.grad is not None:
            leaf.grad, kept = keep(leaf.grad), True

    leaf.register_post_accumulate_grad_hook(keep_gradient)  # type: ignore[no-untyped-call]
    return leaf
