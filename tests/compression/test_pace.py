"""Layers' times without text, from parts of the largest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest
import toys

from losparse_cli.budget.plan import LayerPlan
from losparse_cli.compress import plan
from losparse_cli.compression import pace
from losparse_cli.compression.plan import Job

NOISE = (0.5, 1.0, 2.0, 1.5, 0.75)


def noisy(seconds: Callable[[LayerPlan], float]) -> Callable[[Job, LayerPlan], float]:
    noise: Iterator[float] = cycle(NOISE)
    return lambda job, part: seconds(part) * next(noise)


def test_the_noise_of_layers_that_have_no_smaller_parts_is_not_multiplied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = plan(toys.llama(tmp_path / "model"), tmp_path / "out", rank=4, sparsity=0.8)
    assert len(job.plan.layers) == 28
    monkeypatch.setattr(pace, "_seconds", noisy(lambda part: 0.01))
    least, about, most = pace.seconds_alone(job)
    assert 0.5 * 0.28 <= least <= about <= most <= 2 * 0.28


def test_larger_layers_lie_on_the_line_of_two_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toys.llama(tmp_path / "model", layers=1, hidden=256, intermediate=512)
    job = plan(model, tmp_path / "out", rank=4, sparsity=0.8)
    monkeypatch.setattr(pace, "_seconds", lambda job, part: 0.01 + 1e-6 * part.layer.weights)
    expected = sum(0.01 + 1e-6 * p.layer.weights for p in job.plan.layers)
    assert pace.seconds_alone(job) == pytest.approx((expected,) * 3)
