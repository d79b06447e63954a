"""A model cut in two before its output head, whose scores over a vocabulary are too many to hold all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UsageError
from .reading import output_embeddings


def require_head(model: Any) -> nn.Module:
    """The output head over a vocabulary; UsageError for a model without one."""
    head = output_embeddings(model)
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise UsageError(
            f"{type(model).__name__} has no head over a vocabulary whose predictions could be matched. Train it on a "
            "task with losparse finetune."
        )
    return head


class Head:
    """The output head of a language model, called apart from what comes before it.

    inputs: of the model, by which it is found out what its code does between the head and the logits that it returns,
    such as a cap on them. module: None where the model has no such head, or does with it what cannot be done apart.
    """

    module: nn.Module | None

    def __init__(self, model: Any, inputs: Mapping[str, Tensor]) -> None:
        self._model = model
        self.module = output_embeddings(model)
        self._inputs = {name: ids[:1, :2] for name, ids in inputs.items()}
        self._between: Any = None  # what the model's body returned, where there is something after the head
        if self.module is not None and not self._found_out():
            self.module = None

    def _found_out(self) -> bool:
        """Whether the head can be called apart."""
        weight = getattr(self.module, "weight", None)
        if not isinstance(weight, Tensor):
            return False
        heard: list[tuple[Any, ...]] = []
        marker: list[Tensor] = []
        bodies: list[Any] = []

        def answer(*args: Any, **kwargs: Any) -> Tensor:
            heard.append((*args, *kwargs.values()))
            states = heard[-1][0]
            marker.append(torch.randn(*states.shape[:-1], weight.shape[0], device=states.device, dtype=states.dtype))
            return marker[-1]

        body = getattr(self._model, "base_model", self._model)
        hook = body.register_forward_hook(lambda module, args, output: bodies.append(output))
        try:
            with torch.no_grad(), self._replaced(answer):
                returned = self._model(**self._inputs)
        finally:
            hook.remove()
        logits = getattr(returned, "logits", None)
        if len(heard) != 1 or len(heard[0]) != 1 or heard[0][0].dim() != 3 or not isinstance(logits, Tensor):
            return False
        if torch.equal(logits, marker[0]):
            return True
        if body is self._model or len(bodies) != 1:
            return False
        self._between = bodies[0]
        with torch.no_grad():
            return torch.equal(self.after(marker[0]), logits)

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        assert self.module is not None
        self.module.forward = forward
        try:
            yield
        finally:
            vars(self.module).pop("forward", None)

    def states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the head is fed for these inputs of the model: (batch, tokens, hidden), with gradients."""
        found: list[Tensor] = []

        def hear(states: Tensor) -> Tensor:
            found.append(states)
            return states[..., :1]  # in the place of logits, which are not needed

        with self._replaced(hear):
            self._model(**inputs)
        return found[0]

    def logits(self, states: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, vocabulary), as the model returns them."""
        assert self.module is not None
        return self.after(self.module(states[None]))[0]

    def logits_of_another(self, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same by the head of another model of the same class."""
        return self.after(F.linear(states, weight, bias)[None])[0]

    def after(self, logits: Tensor) -> Tensor:
        """What the model's code makes of the head's output: (1, rows, vocabulary)."""
        if self._between is None:
            return logits
        body = self._model.base_model
        body.forward = lambda *args, **kwargs: self._between
        try:
            with self._replaced(lambda *args, **kwargs: logits):
                found: Tensor = self._model(**self._inputs).logits
        finally:
            vars(body).pop("forward", None)
        return found
