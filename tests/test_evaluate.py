"""Perplexity by its stated protocol."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from losparse_cli.errors import UsageError
from losparse_cli.evaluate import perplexity


class Uniform:
    """A model that gives every one of `size` tokens the same probability."""

    device = torch.device("cpu")

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.size))


class Letters:
    """One token a character."""

    def __call__(self, text: str, **options: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.tensor([[ord(c) % 13 for c in text]]))


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    measured = perplexity(Uniform(13), Letters(), "x" * 95, length=10, windows=4)
    assert measured.value == pytest.approx(13.0)
    assert measured.tokens == 4 * 9
    assert perplexity(Uniform(13), Letters(), "x" * 95, length=10, windows=99).tokens == 9 * 9


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UsageError, match="fewer than one window"):
        perplexity(Uniform(13), Letters(), "short", length=10)
    assert math.isfinite(perplexity(Uniform(13), Letters(), "x" * 10, length=10).value)
