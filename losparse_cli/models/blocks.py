"""The repeated blocks of a model, and what each is called with: captured from the model's own forward pass.

Nothing is assumed about how blocks follow each other. Every batch runs the model's own code in a thread of its
own, halted at each block; whoever consumes the `Relay` answers for the block, and the model goes on from there to
whatever it does next: another block, the step from encoder to decoder, masks and position tables of its own. Only
one thread ever runs at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from threading import Semaphore, Thread
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .reading import cannot_be_run, input_embeddings


def find_blocks(model: nn.Module, layers: Collection[str]) -> tuple[str, ...]:
    """Names of the repeated blocks beside which any of the linear layers `layers` lies, in the order of the modules.

    Blocks are the entries of the outermost `ModuleList`s, those of a list whose entries hold none of the layers left
    out; a layer that is such an entry itself lies in none.
    """
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
    found: list[str] = []
    for name in lists:
        blocks = [f"{name}.{child}" for child, _ in model.get_submodule(name).named_children()]
        found += blocks if holding(blocks, layers) else []
    return tuple(found)


def holding(blocks: Collection[str], layers: Collection[str]) -> tuple[str, ...]:
    """Those of the blocks in which any of the layers lies."""
    inside = {block_of(layer, blocks) for layer in layers}
    return tuple(block for block in blocks if block in inside)


def block_of(name: str, blocks: Collection[str]) -> str | None:
    """The block that the module or parameter `name` lies in, None if in none; the block "" is the whole model."""
    return next((block for block in blocks if not block or name.startswith(f"{block}.")), None)


def hidden_size(model: Any) -> int:
    """Width of what flows between the blocks: that of the input embeddings where the config does not say, else 0."""
    settings = model.config.get_text_config()
    named = getattr(settings, "hidden_size", None) or getattr(settings, "d_model", None)
    weight = getattr(input_embeddings(model), "weight", None)  # SAM 3 embeds patches, by a module of its own
    return int(named or (0 if weight is None else weight.shape[1]))


def bias_heads(model: nn.Module) -> int:
    """Heads of the biases for each pair of positions that the first block of a stack hands to all others, as in T5.

    Of a model with a decoder beside an encoder, twice: there two of them are carried at a time. 0 if there are none.
    """
    tables = {
        name: module
        for name, module in model.named_modules()
        if name.endswith(".relative_attention_bias") and isinstance(module, nn.Embedding)
    }
    if any(".1." in name for name in tables):  # one for each block, which keeps it to itself
        return 0
    return sum(table.embedding_dim for table in tables.values())


@dataclass
class Call:
    """One block's call for one batch. `output` is what the model will be told the block returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    caches: list[tuple[Any, dict[str, Any]]] | None = None
    """What caches among the arguments held before the block first ran, as (cache or part of one, its attributes)."""
    written: tuple[Any, ...] = ()
    """What the block put into dicts that it was given, for others to find."""
    absent: bool = False
    """Whether the batch goes past the block: then there is nothing to run, and no output."""


THREAD = "losparse-pass"
"""Name of every thread that runs a forward pass."""


class _Stopped(BaseException):
    """Raised inside the model's code when nobody needs what it would compute next."""


class _Runner:
    """The forward pass of one batch, in a thread that runs only while `advance` waits for it."""

    def __init__(self, run: Callable[[], Any], gradients: bool) -> None:
        self._run, self._gradients = run, gradients
        self._go, self._halted = Semaphore(0), Semaphore(0)
        self._stop = False
        self.block: str | None = None
        self.call: Call | None = None
        self.error: BaseException | None = None
        self.result: Any = None
        """What the model returned, if it came to its end."""
        self._thread = Thread(target=self._main, name=THREAD, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        self._go.acquire()
        try:
            if not self._stop:
                with torch.set_grad_enabled(self._gradients):  # of this thread: autograd's switch is not shared
                    self.result = self._run()
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.block = self.call = None
            self._halted.release()

    def halt(self, block: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called by the model's code in place of the block."""
        if self._stop:  # the model catches what stops it, and goes on
            raise _Stopped
        self.block, self.call = block, Call(args, kwargs)
        self._halted.release()
        self._go.acquire()
        if self._stop:
            raise _Stopped
        call, self.call = self.call, None
        return call.output

    def advance(self) -> None:
        """Let the model's code run until it reaches a block, or its end."""
        self._go.release()
        self._halted.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        if self._thread.is_alive():
            self._stop = True
            self._go.release()
            self._thread.join()


class Relay:
    """Runs `model` on every batch, block by block in lockstep; a context manager.

    blocks: names, in the order in which the model is expected to call them. batches: keyword arguments of
    `model`. Iterating yields (block, its calls, one a batch); set each call's `output` before going on. The passes
    end after the last block, so that whatever follows it (an output head, say) may be without weights.
    optional: blocks that some batches go past, as text does a tower for images; their calls are `absent`.
    """

    gradients = False
    """Whether autograd hears of what the model does between its blocks."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        batches: Sequence[dict[str, Tensor]],
        optional: Collection[str] = (),
    ) -> None:
        self._model, self._blocks, self._optional = model, tuple(blocks), frozenset(optional)
        self._batches = batches
        self._runners: list[_Runner] = []
        self._current: _Runner | None = None

    def __enter__(self) -> Self:
        for name in self._blocks:
            self._model.get_submodule(name).forward = self._stub(name)  # hides the class's own method
        self._runners = [
            _Runner(lambda batch=batch: self._model(**batch), self.gradients)  # type: ignore[misc]
            for batch in self._batches
        ]
        return self

    def _stub(self, name: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            assert self._current is not None
            return self._current.halt(name, args, kwargs)

        return forward

    def __iter__(self) -> Iterator[tuple[str, list[Call]]]:
        """UsageError if the model cannot be run on the batches, or if its blocks come in another order."""
        early: set[_Runner] = set()  # halted at a block whose turn is yet to come
        for expected in self._blocks:
            calls = []
            for runner in self._runners:
                self._current = runner
                if runner not in early:
                    self._advance(runner)
                early.discard(runner)
                if runner.block not in (None, expected) and expected in self._optional:
                    early.add(runner)
                    calls.append(Call((), {}, absent=True))
                    continue
                if runner.block != expected or runner.call is None:
                    raise UsageError(
                        f"{type(self._model).__name__} calls {runner.block or 'nothing more'} where {expected} was "
                        "expected, so it cannot be calibrated block by block. Compress it without --calibration."
                    )
                calls.append(runner.call)
            yield expected, calls

    def _advance(self, runner: _Runner) -> None:
        with cannot_be_run(type(self._model).__name__, "Compress it without --calibration.", self._batches):
            runner.advance()

    def result(self, number: int) -> Any:
        """What the model returns for batch `number`, once the last call that it was halted at has got its output."""
        runner = self._current = self._runners[number]
        if runner.call is not None:
            self._advance(runner)
        result, runner.result = runner.result, None
        return result

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for runner in self._runners:
            runner.stop()
        for name in self._blocks:
            vars(self._model.get_submodule(name)).pop("forward", None)


def run_block(block: nn.Module, call: Call) -> Any:
    """What `block` itself returns for the call, renewed first; the block may be under a `Relay`."""
    renew(call)
    forward = vars(block).pop("forward", None)
    try:
        return block(*call.args, **call.kwargs)
    finally:
        if forward is not None:
            block.forward = forward


def renew(call: Call) -> None:
    """Take away from caches what an earlier run of a block on this call added: some models keep one whatever they are
    told."""
    if call.caches is None:
        call.caches = [(part, _copied(vars(part))) for part in _cache_parts((*call.args, *call.kwargs.values()))]
    for part, held in call.caches:
        vars(part).clear()
        vars(part).update(_copied(held))


def _cache_parts(values: Iterable[Any]) -> Iterator[Any]:
    """The caches among `values`, those inside them, and their layers."""
    from transformers import Cache

    for value in values:
        if isinstance(value, Cache):
            yield value
            yield from _cache_parts(vars(value).values())
            yield from getattr(value, "layers", ())


def _copied(held: Any, depth: int = 0) -> Any:
    """A copy. Keys and values grow into new tensors; states that a layer holds in lists or dicts are overwritten."""
    if isinstance(held, list):
        return [_copied(value, depth + 1) for value in held]
    if isinstance(held, dict):
        return {key: _copied(value, depth + 1) for key, value in held.items()}
    return held.clone() if isinstance(held, Tensor) and depth > 1 else held


def hidden_states(output: Any) -> Tensor:
    """The activations in what a block returned: the first tensor of floating values, in whatever it lies.

    UsageError if there is none.
    """
    found = _first(output)
    if found is None:
        raise UsageError(
            f"A block returns {type(output).__name__} without activations, so the model cannot be calibrated block by "
            "block. Compress it without --calibration."
        )
    return found


def _first(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    return next((found for part in parts_of(output).values() if (found := _first(part)) is not None), None)


def parts_of(output: Any) -> dict[Any, Any]:
    """What a container of any kind holds, in its order; {} for anything else."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, list | tuple):
        return dict(enumerate(output))
    return {f.name: getattr(output, f.name) for f in fields(output)} if is_dataclass(output) else {}


def with_hidden_states(output: Any, states: Tensor) -> Any:
    """`output` of a block with its activations replaced by `states`."""
    first = hidden_states(output)
    return changed(output, lambda tensor: states if tensor is first else tensor)


def changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`output` of a block with every tensor of floating values in it put through `change`."""
    if isinstance(output, Tensor):
        return change(output) if output.is_floating_point() else output
    before = parts_of(output)
    parts = {key: changed(part, change) for key, part in before.items()}
    if all(parts[key] is part for key, part in before.items()):
        return output
    if isinstance(output, Mapping):
        made: Any = type(output)
        return made(**parts) if hasattr(output, "to_tuple") else made(parts)  # transformers' ModelOutput takes keywords
    if isinstance(output, list | tuple):
        return type(output)(*parts.values()) if hasattr(output, "_fields") else type(output)(parts.values())
    made = copy(output)  # a dataclass, frozen or not, whose constructor may want more
    for key, part in parts.items():
        object.__setattr__(made, key, part)
    return made
