"""Sizes as people write them."""

from __future__ import annotations

import math
import re

from ..errors import UsageError


def parse_size(text: str | int, option: str = "--max-shard-size") -> int:
    """Bytes of a size such as 5GB (10⁹ each), 500MB or 2GiB (2³⁰), or of their number; UsageError otherwise."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,9})?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    size = float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ") if match else 0
    if size < 1:
        raise UsageError(f"{option} {text!r} is no size; write 5GB, 500MB or 2GiB.")
    return int(size)


def written_size(nbytes: int) -> str:
    """What `parse_size` reads as so many bytes, or as hardly more: four digits and a unit."""
    unit = next(k for k in range(4) if nbytes < 1000 ** (k + 1) or k == 3)
    digits = max(0, 3 - int(math.log10(max(1, nbytes / 1000**unit)))) if unit else 0
    shown = math.ceil(nbytes / 1000**unit * 10**digits) / 10**digits
    return f"{shown:.{digits}f}{('B', 'kB', 'MB', 'GB')[unit]}"
