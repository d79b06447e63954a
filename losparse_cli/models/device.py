"""Where models run, and how much memory is free there."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import ResourceError, UsageError
from ..parallel.launch import local_place

MOST_THREADS = 1024
MEMINFO = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")


def find_device(name: str | torch.device) -> torch.device:
    """The device that auto, cpu, cuda or cuda:N names, of several for each process of a machine the next one.

    UsageError if there is none such.
    """
    name = str(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    number, together = local_place()
    if name == "cuda" and together > 1 and torch.cuda.device_count() > 1:  # each process takes its own
        return torch.device("cuda", number % torch.cuda.device_count())
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device is auto, cpu, cuda or cuda:N, not {name!r}.")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here. Use --device cpu."
        )
    return device


def available(device: torch.device) -> int:
    """Bytes that can be allocated on the device without pushing anything out."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = _available_in_host()
    limit, used = (_number(CONTROL_GROUP / name) for name in ("memory.max", "memory.current"))
    return free if limit is None else min(free, max(0, limit - (used or 0)))


def _available_in_host() -> int:
    if MEMINFO.is_file():
        found = re.search(r"^MemAvailable:\s+(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    # Where the system does not say what is free, half of what there is.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _number(path: Path) -> int | None:
    """A control group's limit or use; None where there is no such file, or no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def peak_memory() -> int:
    """Most bytes that this process has had resident at once; 0 where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.is_file() else None
    return int(found[1]) * 1024 if found else 0


def release(device: torch.device) -> None:
    """Give back what a model held that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def chosen_precision(asked: str, device: torch.device) -> str:
    """What forward and backward passes compute in: where it is fast, auto is bfloat16."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    fast = device.type == "cpu" and _has_bfloat16()
    return "bfloat16" if fast else "float32"


def chosen_dtype(asked: str, device: torch.device) -> torch.dtype:
    """The same as a dtype."""
    found: torch.dtype = getattr(torch, chosen_precision(asked, device))
    return found


def _has_bfloat16() -> bool:
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(known is not None and known())


@contextmanager
def threads_of_torch(count: int | None) -> Iterator[None]:
    """So many, and as many as before afterwards; None: as they are. UsageError for more than any machine has."""
    if count is not None and count > MOST_THREADS:
        raise UsageError(f"--threads is at most {MOST_THREADS}, not {count}.")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Turns what torch raises for want of memory into a ResourceError that ends in `remedy`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise ResourceError(f"Memory ran out. {remedy}") from error
