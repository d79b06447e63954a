"""The states that a run saves while it trains, from which a killed one goes on."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import write_errors

LAST_FILE = "trainer_state.json"
"""Of a state that Trainer saves, the file that it writes last."""
_TORCH_WRITES = ("PytorchStreamWriter", "inline_container.cc", "iostream error")


def last_state(folder: Path) -> tuple[int, Path] | None:
    """(step, folder) of the last state that was saved whole; None if there is none."""
    found = [
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit() and _is_whole(path / LAST_FILE)
    ]
    return max(found, default=None)


def _is_whole(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """`write_errors` that also knows how safetensors and torch.save say that the system did not let them write.

    torch.save fails again where it closes its archive, and that is what it tells.
    """
    from safetensors import SafetensorError

    with write_errors(place):
        try:
            yield
        except (SafetensorError, RuntimeError) as error:
            found = re.search(r"\(os error (\d+)\)", str(error))
            if found is None and not any(word in str(error) for word in _TORCH_WRITES):
                raise
            number = errno.ENOSPC if found is None else int(found[1])
            raise OSError(number, os.strerror(number), str(place)) from error
