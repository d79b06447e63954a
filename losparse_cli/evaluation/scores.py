"""What a model predicts for a window, how two predictions differ, and how sure a mean over windows is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tasks.paired import Estimate
from .windows import Line, Window

ROWS = 64  # predictions that are compared at once: a vocabulary may have 262,144 tokens


@dataclass(frozen=True)
class Scores:
    """Predictions for the scored tokens of a window.

    rows: log-probabilities in nats, (tokens, vocabulary), float32, or float16 if they come from a file.
    likelihood: log-probability of the token that came, (tokens,), float32. best: likeliest token, (tokens,), int64.
    """

    rows: Tensor
    likelihood: Tensor
    best: Tensor

    def save(self, path: Path) -> None:
        """Keep in a file, rows as float16; what perplexity and agreement are made of stays exact."""
        with path.open("wb") as file:
            torch.save((self.rows.half().cpu(), self.likelihood.cpu(), self.best.cpu()), file)

    @classmethod
    def read(cls, path: Path, device: torch.device) -> Scores:
        """What `save` kept, on `device`."""
        return cls(*torch.load(path, map_location=device, weights_only=True))


@dataclass(frozen=True)
class Vector:
    """Mean of the last hidden states over the tokens of a line. mean: (hidden,), float64 on the CPU."""

    mean: Tensor
    tokens: int

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            torch.save((self.mean, self.tokens), file)

    @classmethod
    def read(cls, path: Path, device: torch.device) -> Vector:
        return cls(*torch.load(path, weights_only=True))


@dataclass(frozen=True)
class Sums:
    """Sums over the scored tokens of one unit; what was not measured is 0.

    loss, dense_loss: negative log-likelihood in nats. kl: KL(dense || ours) in nats. agree: tokens with the same
    likeliest one. cosine: of the two models' vectors of a line, of which there is one.
    """

    tokens: int
    loss: float = 0.0
    dense_loss: float = 0.0
    kl: float = 0.0
    agree: int = 0
    cosine: float = 0.0


def score(model: Any, window: Window) -> Scores:
    """What the model predicts for the scored tokens of the window, in float32 on the model's device."""
    ids = window.ids.to(model.device).unsqueeze(0)
    with torch.inference_mode():
        if window.source is None:
            logits = model(input_ids=ids, use_cache=False).logits[0, window.first - 1 : -1]
        else:
            source = window.source.to(model.device).unsqueeze(0)
            logits = model(input_ids=source, labels=ids, use_cache=False).logits[0, window.first :]
        rows = logits.float().log_softmax(-1)
        targets = ids[0, window.first :, None]
        return Scores(rows, rows.gather(1, targets)[:, 0], rows.argmax(-1))


def embed(model: Any, line: Line) -> Vector:
    """The vector of a line, pooled over what the attention mask lets through."""
    inputs = {name: tensor.to(model.device) for name, tensor in line.inputs.items()}
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    with torch.inference_mode():
        states = encoder(**inputs).last_hidden_state[0].double()
        mask = inputs["attention_mask"][0, :, None].double()
        return Vector(((states * mask).sum(0) / mask.sum()).cpu(), line.scored)


def compare(ours: Scores | Vector, dense: Scores | Vector | None) -> Sums:
    """The sums of one unit; without a dense model, of its loss alone."""
    if isinstance(ours, Vector):
        assert isinstance(dense, Vector)
        return Sums(ours.tokens, cosine=float(torch.cosine_similarity(ours.mean, dense.mean, dim=0)))
    assert not isinstance(dense, Vector)
    tokens, loss = ours.best.numel(), -float(ours.likelihood.double().sum())
    if dense is None:
        return Sums(tokens, loss)
    kl = 0.0
    with torch.inference_mode():
        for start in range(0, tokens, ROWS):
            # Rows from a file no longer sum to one: without this, their rounding would enter KL to first order.
            log_p = dense.rows[start : start + ROWS].float().log_softmax(-1)
            p = log_p.exp()
            gap = (log_p - ours.rows[start : start + ROWS]).masked_fill(p == 0, 0.0)
            kl += float((p * gap).sum(-1).clamp(min=0).double().sum())  # rounding may go below
        agree = int((ours.best == dense.best).sum())
    return Sums(tokens, loss, -float(dense.likelihood.double().sum()), kl, agree)


def mean(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Σ sums / Σ counts, and its standard error with every pair an independent unit.

    That of a ratio of means: sqrt(K/(K-1) Σ (s_k - m n_k)²) / Σ n_k for K units. Tokens of one window depend on one
    another, so that counting each of them as independent would make the error look smaller than it is.
    """
    total, units = sum(counts), len(sums)
    value = sum(sums) / total
    if units < 2:
        return Estimate(value, None)
    squares = sum((s - value * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return Estimate(value, math.sqrt(units / (units - 1) * squares) / total)


def exponential(log: Estimate) -> Estimate:
    """exp of an estimate; its standard error to first order (delta method)."""
    value = math.exp(log.value) if not log.value >= 700 else math.inf
    return Estimate(value, None if log.error is None else value * log.error)
