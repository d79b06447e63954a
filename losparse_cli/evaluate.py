"""Perplexity of a causal language model, by a stated protocol."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .errors import UsageError


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood a token, in nats; tokens counts predictions."""

    value: float
    tokens: int
    length: int


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    length: int = 512,
    windows: int = 8,
    on_window: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity on the first `windows` disjoint windows of `length` tokens of `text`.

    Every window starts without context, and its first token is not predicted; no token is added. UsageError
    if the text is shorter than one window.
    """
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    count = min(windows, ids.numel() // length)
    if count == 0:
        raise UsageError(f"The text has {ids.numel()} tokens, fewer than one window of {length}. Give a longer text.")
    total = 0.0
    for k in range(count):
        window = ids[k * length : (k + 1) * length].unsqueeze(0).to(model.device)
        with torch.inference_mode():
            logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
        if on_window is not None:
            on_window(k + 1, count)
    predicted = count * (length - 1)
    return Perplexity(math.exp(total / predicted) if total / predicted < 700 else math.inf, predicted, length)
