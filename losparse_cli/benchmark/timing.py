"""A clock that waits for the device, and the memory's own speed to compare with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

COPY_BYTES = 1 << 28


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes once."""
    if device.type == "cuda":
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end))
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


def interleaved(
    works: Sequence[Sequence[Callable[[], object]]], rounds: int, device: torch.device
) -> tuple[float, ...]:
    """Median milliseconds of each group's members, the groups taken in turn so that a busy machine slows all alike."""
    for group in works:
        group[0]()
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for group, found in zip(works, times, strict=True):
            found += [milliseconds(work, device) for work in group]
    return tuple(statistics.median(found) for found in times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written in a second by a copy far larger than any cache; the best of five."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * COPY_BYTES / min(milliseconds(lambda: target.copy_(source), device) for _ in range(5)) * 1e3
