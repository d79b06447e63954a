"""Bits that the codes of a layer take at each step, foreseen by rounding a sample; and the step that spends a budget.

In the metric of the loss one step serves all layers (see `integers`), so a budget for all of them is spent by bisection
on the sum of what they take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE = 1 << 16  # entries of a layer that are rounded
CLASSES = 16  # of rows with codes of like size, each with frequencies of its own
COARSEST, FINEST, PER_OCTAVE = 4, -10, 2
"""Octaves around the size of a layer's entries between which steps are tried, and how many in each."""


@dataclass(frozen=True)
class Curve:
    """Bits a code by its step. anchor: log2 of the size of the entries for which steps are meant. bits: at steps of
    2 ** (anchor + FINEST + k / PER_OCTAVE), k = 0, 1, …; falling. density: share of the codes that are other than zero
    at fine steps."""

    anchor: float
    bits: tuple[float, ...]
    density: float = 1.0

    def at(self, log_step: float) -> float:
        """Expected bits a code at a step of 2 ** log_step; beyond the finest one bit more an octave for those that may
        be other than zero."""
        place = (log_step - self.anchor - FINEST) * PER_OCTAVE
        if place <= 0:
            return self.bits[0] - self.density * place / PER_OCTAVE
        last = len(self.bits) - 1
        below = min(int(place), last - 1)
        part = min(place - below, 1.0)
        return self.bits[below] * (1 - part) + self.bits[below + 1] * part

    def spread(self, density: float, mask_bits: float) -> Curve:
        """Of all codes, where this is of the share `density` of them that lie where mask_bits a code say."""
        return Curve(self.anchor, tuple(density * bits + mask_bits for bits in self.bits), density * self.density)


def curve(X: Tensor, density: float = 1.0) -> Curve:
    """X: (m, n), the entries in units that one step serves: W_ij √g_i / R_jj. density: share of them that is not 0."""
    m, n = X.shape
    every = max(1, m * n // SAMPLE)
    sample = X[:, torch.arange(min(every, n) // 2, n, every, device=X.device)] if every < n else X[:, n // 2 :][:, :1]
    size = float(sample.pow(2).mean().div(density).sqrt())
    if size == 0 or not math.isfinite(size):
        return Curve(0.0, (0.0,) * ((COARSEST - FINEST) * PER_OCTAVE + 1), 0.0)
    rows = sample.pow(2).mean(1).argsort().argsort() * CLASSES // m
    steps = [size * 2.0 ** (FINEST + k / PER_OCTAVE) for k in range((COARSEST - FINEST) * PER_OCTAVE + 1)]
    bits = tuple(_entropy((sample / step).round_().int(), rows) for step in steps)
    return Curve(math.log2(size), bits, density)


def _entropy(q: Tensor, classes: Tensor) -> float:
    """Bits a code where each class of rows has its own frequencies; what a sample misses is added (Miller, 1955)."""
    least = int(q.min())
    width = int(q.max()) - least + 1
    counts = torch.bincount(((q - least).long() + classes[:, None] * width).view(-1), minlength=CLASSES * width)
    counts = counts.view(CLASSES, width).double()
    nats = float(torch.special.entr(counts).sum() - torch.special.entr(counts.sum(1)).sum())
    missed = (int((counts > 0).sum()) - int((counts.sum(1) > 0).sum())) / 2
    return (nats + missed) / math.log(2) / q.numel()


def step_within(layers: Sequence[tuple[Curve, int]], bits: float, offset: float = 0.0) -> float:
    """log2 of the step at which codes of layers take `bits` together. layers: curve, and how many codes there are.

    offset: bits that each code takes beside what its curve says. The coarsest step where nothing is left to spend.
    """

    def spent(log_step: float) -> float:
        return sum(count * max(0.0, one.at(log_step) + offset) for one, count in layers)

    anchors = [one.anchor for one, _ in layers]
    low, high = min(anchors) + FINEST - 4, max(anchors) + COARSEST
    if spent(high) > bits:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > bits else (low, middle)
    return high
