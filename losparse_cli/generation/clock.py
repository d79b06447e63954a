"""When each step of writing was done."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import LogitsProcessor


class Clock(LogitsProcessor):  # type: ignore[misc]
    """A processor that changes no logits and notes when each step's are there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []
        self.started = self._now()

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.times.append(self._now())
        return scores

    @property
    def first(self) -> float:
        """Seconds until the prompt was read."""
        return self.times[0] - self.started

    @property
    def steps(self) -> list[float]:
        """Seconds of each token after that."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    @property
    def pace(self) -> float | None:
        """Tokens a second, of the middle one; None where there was one step alone."""
        return 1 / statistics.median(self.steps) if self.steps else None

    def _now(self) -> float:
        """Seconds, once all that was begun is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
