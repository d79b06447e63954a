"""A score over rows -> how sure it is, and how sure the difference of two models' scores on the same rows is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error, which is None where there is a single independent unit."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Sampled:
    """A score, and how it varies with the rows.

    by_row: the score is a mean over rows, and draws, (rows,), float64, what it is of each. Otherwise draws are its
    values on RESAMPLES resamples of the rows, drawn with replacement, none of fewer than two rows.
    """

    value: float
    draws: Tensor
    by_row: bool

    def less(self, other: Sampled) -> Sampled:
        """This score less another of the same rows; the rows, or resamples, are paired."""
        return Sampled(self.value - other.value, self.draws - other.draws, self.by_row)

    def estimate(self) -> Estimate:
        """With the standard error; None of a single row, and of a score that is not finite."""
        units = self.draws.numel()
        if units < 2:
            return Estimate(self.value, None)
        error = float(self.draws.std()) / (math.sqrt(units) if self.by_row else 1.0)
        return Estimate(self.value, error if math.isfinite(error) else None)


def over_rows(values: Tensor) -> Sampled:
    """The mean over rows. values: (rows,)."""
    values = values.double()
    return Sampled(float(values.mean()), values, True)


def exponential_of_mean(values: Tensor) -> Sampled:
    """exp of the mean over rows, by the delta method: to first order it is the mean of e^m (1 + v - m)."""
    values = values.double()
    mean = float(values.mean())
    value = math.exp(mean) if not mean >= 700 else math.inf
    return Sampled(value, value * (1 + values - mean), True)


def over_resamples(
    score: Callable[[Tensor], dict[str, float]], rows: int, *, seed: int, count: int = RESAMPLES
) -> dict[str, Sampled]:
    """Scores that belong to no single row, with a bootstrap over rows; without draws if `count` is 0.

    `score` takes indices of rows, (rows,), int64. The same seed gives two models the same resamples.
    """
    values = score(torch.arange(rows))
    generator = torch.Generator().manual_seed(seed)
    drawn = [score(torch.randint(rows, (rows,), generator=generator)) for _ in range(count if rows > 1 else 0)]
    return {
        name: Sampled(value, torch.tensor([one[name] for one in drawn], dtype=torch.float64), False)
        for name, value in values.items()
    }
