"""What torchrun, accelerate or a cluster says of the processes that it starts."""

from __future__ import annotations

import os


def launched() -> int:
    """Processes of this run; 1 where nobody started several."""
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def own_rank() -> int:
    """Number of this process among them, from zero."""
    return _number("RANK", 0) if launched() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes and speaks; also of one alone."""
    return own_rank() == 0


def local_place() -> tuple[int, int]:
    """Number of this process among those of its machine, and how many they are."""
    if launched() == 1:
        return 0, 1
    size = _number("LOCAL_WORLD_SIZE", 1)
    return _number("LOCAL_RANK", 0), max(size, _number("LOCAL_RANK", 0) + 1)


def _number(name: str, other: int) -> int:
    found = os.environ.get(name, "")
    return int(found) if found.isdecimal() else other
