"""How much the loss minds an error in each output of a layer: the diagonal of Fisher information, by one forward and
one backward pass, of which only one block is in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UsageError
from ..models.backward import GradientRelay, Rerun, gradients_allowed
from ..models.blocks import Call, run_block
from ..models.experts import expert_layers
from ..models.reading import output_embeddings
from ..parallel.group import Alone, Ranks
from ..parallel.sums import sum_for_all
from ..parallel.tree import TreeSum
from .activations import Activations, trim
from .likelihood import categorical, drawn_loss, logits_of, next_token_loss, shown, uniform
from .moments import Fed, gather_fed
from .standing import Standing

LOGITS = 64 << 20
"""Bytes of logits over a vocabulary that are computed at a time."""


@dataclass(frozen=True)
class Sensitivity:
    """Fisher information of a layer's outputs.

    g: (out_features,), float32, the mean over tokens of the squared derivative of the loss by each output. tokens: how
    many were seen. share: how many it is to count for, as all of them cost something, in units of those that the last
    block saw; of an expert, what one of its block sees on average, as other text is sent to others.
    """

    g: Tensor
    tokens: int
    share: float = 1.0


@dataclass(eq=False)
class SensitivityRun:
    """Fisher information of the outputs of linear layers, by two passes of one model over the same batches.

    The loss is that of labels drawn, by `seed`, from what the model says (`likelihood.drawn_loss`), summed over tokens.

    layers: block -> names inside it, in the order in which the model calls the blocks; the block "" is the whole model,
    all of which is in memory then. batches: keyword arguments of the model. load, drop: give a block its weights, which
    need no gradients, and take them away; what lies in no block has its weights, the head too. optional: see `Relay`.
    said: of each batch, which tokens are text, whose labels alone are drawn, (batch, tokens); None for all.
    activations: keeps what flows from block to block, forwards and backwards. on_forward: hears the second moments of
    what a block's layers are fed, as soon as it ran; layers go by their names inside it, as in on_backward. on_text:
    hears the loss of the text's own next tokens, in nats, and how many they are, of a model that predicts such. say:
    hears what goes on. group: ranks that have batches of their own. first: number of the first batch here among those
    of all ranks. owners: as of `gather_fed`.
    """

    model: Any
    layers: Mapping[str, Sequence[str]]
    batches: Sequence[dict[str, Tensor]]
    load: Callable[[str], None]
    drop: Callable[[str], None]
    activations: Activations
    seed: int = 0
    on_forward: Callable[[str, list[Fed]], None] = lambda block, found: None
    on_backward: Callable[[str, dict[str, Sensitivity]], None] = lambda block, found: None
    on_text: Callable[[float, int], None] = lambda nats, tokens: None
    say: Callable[[str], None] = lambda text: None
    state: Path | None = None
    optional: Collection[str] = ()
    said: Sequence[Tensor | None] = ()
    group: Ranks = field(default_factory=Alone)
    first: int = 0
    owners: Callable[[Sequence[Fed]], Sequence[int]] = lambda found: [0] * len(found)

    def __post_init__(self) -> None:
        self._several = getattr(self.model.config, "problem_type", None) == "multi_label_classification"
        writes = getattr(self.model, "can_generate", None)
        self._predicts = writes is not None and writes() and not self.model.config.is_encoder_decoder
        self._kept: dict[str, list[Call]] = {}
        self._found: dict[str, Sensitivity] = {}
        self._standing = Standing()
        self._last = 0  # tokens that the last block saw

    def run(self) -> dict[str, Sensitivity]:
        """By the layers' names in the model; one that is never called, or on whose outputs the loss does not depend, is
        left out.

        UsageError where the model's code takes no gradients, CheckpointError where they are not finite.
        """
        if list(self.layers) == [""]:
            self._whole()
        else:
            earlier = None if self.state is None else Standing.read(self.state)
            self._forward(earlier)
            self._backward()
        return self._found

    def _forward(self, earlier: Standing | None) -> None:
        """All blocks in turn, then each batch on its own to the loss, and back to what the last block returned; or, if
        an earlier pass came further, to where that stood."""
        head = output_embeddings(self.model)
        with GradientRelay(self.model, list(self.layers), self.batches, head, self.optional) as relay:
            for number, (name, calls) in enumerate(relay):
                self.say(f"sensitivity: {number + 1}/{len(self.layers)} forwards")
                self.load(name)
                self.on_forward(name, self._moments(name, calls))
                self.drop(name)
                trim()
            for number in range(len(self.batches) if earlier is None else 0):
                self.say(f"sensitivity: {number + 1}/{len(self.batches)} losses")
                self._end(relay, number, head)
                self.activations.release()
            self._kept = relay.kept
        if earlier is not None:
            self._go_on(earlier)

    def _go_on(self, earlier: Standing) -> None:
        for block in earlier.done:
            del self._kept[block]
            names = [layer for layer in self.layers[block] if f"{block}.{layer}" in earlier.g]
            known = {layer: f"{block}.{layer}" for layer in names}
            self._tell(
                block, {name: Sensitivity(earlier.g[full], earlier.tokens[full]) for name, full in known.items()}
            )
        for text in earlier.texts:
            self.on_text(*text)
        earlier.restore(self._kept, self.activations.keep)
        self._standing = earlier

    def _moments(self, name: str, calls: Sequence[Call]) -> list[Fed]:
        current: list[Rerun] = []

        def reruns() -> Iterator[Call]:
            for call in calls:
                current[:] = [Rerun(call)]
                yield current[0].call

        def returned(output: Any) -> None:
            current.pop().set_output(output, self.activations.keep)
            self.activations.release()

        block = self.model.get_submodule(name)
        return gather_fed(
            block, self.layers[name], reruns(), prefix=f"{name}.", on_output=returned, group=self.group,
            first=self.first, owners=self.owners,
        )  # fmt: skip

    def _end(self, relay: GradientRelay, number: int, head: nn.Module | None) -> None:
        call = relay.head_call(number)
        if call is not None and head is not None:
            if self._in_chunks(relay, number, head, call):
                return
            with torch.enable_grad(), gradients_allowed(self.model, ""):
                call.output = head(*call.args, **call.kwargs)
        output = relay.result(number)
        with torch.enable_grad(), gradients_allowed(self.model, ""):
            # Blocks may be given what lies behind this: where sums around them are the model's own, as in XLM.
            self._loss(output, number).backward(retain_graph=True)  # type: ignore[no-untyped-call]

    def _loss(self, output: Any, number: int) -> Tensor:
        self._hear_text(logits_of(output).get("logits"), number)
        return drawn_loss(output, self._labelled(number), self._generator(number), several=self._several)

    def _hear_text(self, logits: Tensor | None, number: int, part: slice = slice(None)) -> None:
        """part: of the tokens, that the logits are of."""
        ids, mask = self.batches[number].get("input_ids"), self._text(number)
        if not self._predicts or logits is None or ids is None or logits.shape[:2] != ids[:, part].shape:
            return
        if part.stop is not None:
            part = slice(part.start, part.stop + 1)  # and what its last token is to predict
        lost = next_token_loss(logits, ids[:, part], None if mask is None else mask[:, part])
        self._standing.texts.append(lost)
        self.on_text(*lost)

    def _in_chunks(self, relay: GradientRelay, number: int, head: nn.Module, call: Call) -> bool:
        """The loss of a batch whose logits are large, some tokens at a time; False, and nothing done, if they cannot
        be had so.

        What the model does after its head, to cap logits, say, is its own code: it runs again for each chunk.
        """
        states = call.args[0] if len(call.args) == 1 and not call.kwargs else None
        weight = getattr(head, "weight", None)
        if not isinstance(states, Tensor) or states.dim() != 3 or not isinstance(weight, Tensor) or self._several:
            return False
        size = max(1, LOGITS // (4 * weight.shape[0] * states.shape[0]))
        if states.shape[1] <= size:
            return False
        leaf = states.detach().requires_grad_()
        chance = uniform(states.shape[:2], states.device, self._generator(number))
        masks = {name: mask for name, mask in self._labelled(number).items() if mask.shape == states.shape[:2]}
        for begin in range(0, states.shape[1], size):
            part = slice(begin, begin + size)
            with torch.enable_grad():
                try:
                    found = logits_of(relay.replay(number, head(leaf[:, part])))
                except UsageError:
                    if begin:
                        raise
                    return False
                logits = next(iter(found.values()), states)
                if len(found) != 1 or logits.dim() != 3 or logits.shape[:2] != leaf[:, part].shape[:2]:
                    return False  # so it is from the first chunk on
                self._hear_text(found.get("logits"), number, part)
                with gradients_allowed(self.model, ""):
                    hidden = {name: mask[:, part] for name, mask in masks.items()}
                    categorical(logits, hidden, chance[:, part]).backward()  # type: ignore[no-untyped-call]
        with gradients_allowed(self.model, ""):
            torch.autograd.backward([states], [leaf.grad], retain_graph=True)
        return True

    def _backward(self) -> None:
        """From the last block to the first that has layers, each run once more with gradients."""
        names = list(self.layers)
        first = next(number for number, name in enumerate(names) if self.layers[name])
        for number, name in reversed(list(enumerate(names))[first : len(self._kept)]):
            self.say(f"sensitivity: {len(names) - number}/{len(names)} backwards")
            self.load(name)
            block = self.model.get_submodule(name)
            calls = self._kept.pop(name)[::-1]
            with gradients_allowed(self.model, name), _Watch(block, self.layers[name]) as watch:
                for batch in range(len(self.batches)):
                    again = Rerun(calls.pop(), gradients=True)
                    if again.reached:
                        watch.masks = self._masks(batch)
                        again.backward(block)
                        watch.close(self.first + batch)
                    del again
                    self.activations.release()
            self._report(name, watch)
            self.drop(name)
            trim()
            self._note(name)

    def _note(self, block: str) -> None:
        """The block is done."""
        if self.state is None:
            return
        found = {full: self._found[full] for layer in self.layers[block] if (full := f"{block}.{layer}") in self._found}
        self._standing.done.append(block)
        self._standing.g |= {name: one.g.cpu() for name, one in found.items()}
        self._standing.tokens |= {name: one.tokens for name, one in found.items()}
        self._standing.write(self.state, self._kept)

    def _whole(self) -> None:
        """The model as one block: each batch forwards for the moments, then forwards and backwards."""
        self.load("")
        calls = [Call((), dict(batch)) for batch in self.batches]
        self.say("sensitivity: the whole model, forwards")
        layers = self.layers[""]
        found = gather_fed(self.model, layers, calls, group=self.group, first=self.first, owners=self.owners)
        self.on_forward("", found)
        with gradients_allowed(self.model, ""), _Watch(self.model, self.layers[""]) as watch, torch.enable_grad():
            for number, call in enumerate(calls):
                self.say(f"sensitivity: the whole model, batch {number + 1} of {len(calls)}")
                watch.masks = self._masks(number)
                self._loss(run_block(self.model, call), number).backward()  # type: ignore[no-untyped-call]
                watch.close(self.first + number)
        self._report("", watch)
        self.drop("")

    def _report(self, name: str, watch: _Watch) -> None:
        self._tell(name, watch.found(self.group, self.first))

    def _tell(self, name: str, found: dict[str, Sensitivity]) -> None:
        counts = self._counts(name, found)
        self._last = self._last or round(max(counts.values(), default=0))
        found = {layer: replace(one, share=counts[layer] / self._last) for layer, one in found.items()}
        for layer, one in found.items():
            full = f"{name}.{layer}" if name else layer
            if not bool(torch.isfinite(one.g).all()):
                raise CheckpointError(
                    f"The gradients of {full} are not finite: the model overflows in a backward pass, or its weights "
                    "are damaged. Try other text, or compress it with --sensitivity off."
                )
            self._found[full] = one
        self.on_backward(name, found)

    def _counts(self, name: str, found: Mapping[str, Sensitivity]) -> dict[str, float]:
        """Layer of a block -> tokens that it is to count for."""
        counts: dict[str, float] = {layer: one.tokens for layer, one in found.items()}
        for experts in expert_layers(self.model.get_submodule(name), self.layers[name]):
            each = experts.layers.values()
            mean = sum(max(found[n].tokens if n in found else 0 for n in names) for names in each) / len(each)
            counts |= {layer: mean for names in each for layer in names if layer in found}
        return counts

    def _masks(self, number: int) -> dict[str, Tensor]:
        batch = self.batches[number]
        return {name: batch[name] for name in ("attention_mask", "decoder_attention_mask") if name in batch}

    def _text(self, number: int) -> Tensor | None:
        """Which tokens are text and no padding; None where all are."""
        mask = self.batches[number].get("attention_mask")
        said = self.said[number] if self.said else None
        if said is None:
            return mask
        said = said.to(self.batches[number]["input_ids"].device)
        return said.to(torch.long) if mask is None else said * mask

    def _labelled(self, number: int) -> dict[str, Tensor]:
        """The masks, without places whose next token is no text: nobody asks a model what an image goes on with."""
        masks, text = self._masks(number), self._text(number)
        if text is None or not self.said or self.said[number] is None:
            return masks
        if self._predicts:
            text = torch.cat((text[:, 1:], text[:, -1:]), dim=1)
        return masks | {"attention_mask": text}

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + self.first + number)


class _Watch:
    """Sums the squared gradients of what the linear layers of a block give; a context manager.

    masks: those of the batch that runs.
    """

    def __init__(self, block: nn.Module, layers: Sequence[str]) -> None:
        self._modules = {name: block.get_submodule(name) for name in layers}
        self._sums: dict[str, Tensor] = {}  # of the batch that runs
        self._leaves: list[tuple[int, dict[str, Tensor]]] = []
        self._tokens: dict[str, int] = {}
        self._hooks: list[Any] = []
        self.masks: Mapping[str, Tensor] = {}

    def __enter__(self) -> _Watch:
        self._hooks = [m.register_forward_hook(self._forward(name)) for name, m in self._modules.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _forward(self, name: str) -> Callable[..., Tensor]:
        def backward(grad: Tensor) -> None:
            squares = grad.detach().float().square().reshape(-1, grad.shape[-1]).sum(0).double()
            self._sums[name] = self._sums[name] + squares if name in self._sums else squares

        def forward(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            seen = shown(self.masks, output.shape[:-1])
            count = output.shape[:-1].numel() if seen is None else int(seen.sum())
            self._tokens[name] = self._tokens.get(name, 0) + count
            if not output.requires_grad:  # fed what no other block has changed
                output = output.detach().requires_grad_().clone()
            elif output._is_view():  # its hook would go with its place in the graph once a model writes over it, as LED
                output = output.clone()
            output.register_hook(backward)  # type: ignore[no-untyped-call]
            return output

        return forward

    def close(self, leaf: int) -> None:
        """What comes from here on is of another batch."""
        self._leaves.append((leaf, self._sums))
        self._sums = {}

    def found(self, group: Ranks, first: int) -> dict[str, Sensitivity]:
        """Layer -> what was found on all ranks, in the order in which they were named. first: batch of this rank."""
        mine = {name: len(squares) for _, sums in self._leaves for name, squares in sums.items()}
        widths: dict[str, int] = {}
        tokens: dict[str, int] = {}
        for its_widths, its_tokens in group.agree([mine, self._tokens]):
            widths |= its_widths
            for name, count in its_tokens.items():
                tokens[name] = tokens.get(name, 0) + count
        names = [name for name in self._modules if name in widths]
        if not names:
            return {}
        tree = TreeSum(first)
        for leaf, sums in self._leaves:
            device = next((one.device for one in sums.values()), torch.device("cpu"))
            none = {n: torch.zeros(widths[n], dtype=torch.float64, device=device) for n in names if n not in sums}
            tree.add(leaf, torch.cat([(none | sums)[name] for name in names]))
        parts = torch.split(sum_for_all(group, tree), [widths[name] for name in names])
        return {
            name: Sensitivity((squares / tokens[name]).float(), tokens[name])
            for name, squares in zip(names, parts, strict=True)
            if tokens[name]
        }
