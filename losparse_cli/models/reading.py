"""What a model reads and says: its embeddings, its vocabulary, and whether text alone will do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import LosparseError, UsageError, reason_of

TEXT_MODELS = "Give a language model or a text encoder."
"""The remedy where a model that reads something else was given."""


def input_embeddings(model: Any) -> nn.Module | None:
    """What turns the model's input into vectors, of a vision model what reads its patches; None if it names nothing."""
    return _named(model, "get_input_embeddings")


def output_embeddings(model: Any) -> nn.Module | None:
    """The output head over the vocabulary; None if the model has none, or names none."""
    return _named(model, "get_output_embeddings")


def _named(model: Any, getter: str) -> nn.Module | None:
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # transformers raises where a class names none
        return None
    return found if isinstance(found, nn.Module) else None


def vocabulary(model: Any) -> int | None:
    """How many tokens the model knows, None if it does not say."""
    count = getattr(input_embeddings(model), "num_embeddings", None)
    if count is None:
        count = getattr(model.config.get_text_config(), "vocab_size", None)
    return count if isinstance(count, int) else None


def require_text(model: Any, name: str, remedy: str) -> None:
    """UsageError, ending in `remedy`, if what the model reads first is something else than tokens."""
    if model.main_input_name != "input_ids":
        raise UsageError(f"{name} reads {model.main_input_name}, not text. {remedy}")


@contextmanager
def cannot_be_run(name: str, remedy: str, batches: Iterable[Mapping[str, Any]] = ()) -> Iterator[None]:
    """Turns whatever a model's own code raises on these `batches` into a UsageError.

    Of nothing but text, () or ids alone, it says so: what is lacking may be an image.
    """
    beside = {key for batch in batches for key in batch if "pixel" in key or "image" in key}
    what = "the rows" if beside else "text alone"
    with code_errors(lambda reason: f"{name} cannot be run on {what} ({reason}). {remedy}"):
        yield


@contextmanager
def code_errors(said: Callable[[str], str]) -> Iterator[None]:
    """Turns whatever a model's own code raises into a UsageError, with what is `said` of the reason.

    Errors of ours and want of memory stay what they are.
    """
    try:
        yield
    except (LosparseError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        raise UsageError(said(reason_of(error))) from error
