"""Where a backward pass stands, in a file: what was found, and gradients that the blocks before have yet to hear."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import write_whole
from ..models.backward import floating
from ..models.blocks import Call

KEY = "standing"


@dataclass
class Standing:
    """A backward pass over blocks, some of which are done.

    done: blocks, from the last one of the model on. g: layer -> (out_features,) of what was found. tokens: of each of
    them, how many were seen. texts: (nats, tokens) of the text's own loss, part by part. gradients: (block, batch,
    place among what the block returned) -> the gradient of it so far.
    """

    done: list[str] = field(default_factory=list)
    g: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    texts: list[tuple[float, int]] = field(default_factory=list)
    gradients: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Standing | None:
        """As `write` left it; None, and the file is gone, if it is torn."""
        try:
            with safe_open(path, "pt") as file:
                told = json.loads((file.metadata() or {})[KEY])
                g = {name: file.get_tensor(f"g:{name}") for name in told["tokens"]}
                gradients = {
                    (block, batch, place): file.get_tensor(f"gradient:{number}")
                    for number, (block, batch, place) in enumerate(told["gradients"])
                }
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, TypeError, ValueError):
            path.unlink()
            return None
        texts = [(float(nats), int(tokens)) for nats, tokens in told["texts"]]
        return cls(told["done"], g, told["tokens"], texts, gradients)

    def write(self, path: Path, kept: Mapping[str, Sequence[Call]]) -> None:
        """To `path`, whole or not at all, with the gradients of what the blocks of `kept` returned.

        OutputError if it cannot be written.
        """
        found = [(place, leaf.grad) for place, leaf in _leaves(kept) if leaf.grad is not None]
        told = {"done": self.done, "tokens": self.tokens, "texts": self.texts, "gradients": [p for p, _ in found]}
        tensors = {f"g:{name}": g.contiguous() for name, g in self.g.items()}
        tensors |= {f"gradient:{number}": grad.contiguous() for number, (_, grad) in enumerate(found)}
        write_whole(path, lambda part: save_file(tensors, part, {KEY: json.dumps(told)}))

    def restore(self, kept: Mapping[str, Sequence[Call]], keep: Callable[[Tensor], Tensor]) -> None:
        """Hand the gradients to what the blocks of `kept` returned now; `keep` keeps them."""
        for place, leaf in _leaves(kept):
            grad = self.gradients.pop(place, None)
            if grad is not None:
                leaf.grad = keep(grad.to(leaf.device))


def _leaves(kept: Mapping[str, Sequence[Call]]) -> Iterator[tuple[tuple[str, int, int], Tensor]]:
    """Everything that a block returned and that a gradient may arrive at, once, with its place."""
    seen: set[int] = set()
    for block, calls in kept.items():
        for batch, call in enumerate(calls):
            for place, leaf in enumerate(floating((call.output, *call.written))):
                if leaf.is_leaf and leaf.requires_grad and id(leaf) not in seen:
                    seen.add(id(leaf))
                    yield (block, batch, place), leaf
