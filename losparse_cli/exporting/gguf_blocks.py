"""Whole numbers as blocks of GGUF: of 32 columns with a factor in 16-bit floats, in 4 bits (Q4_0) or 8 (Q8_0)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from ..linalg.integers import limits
from ..shim.layouts import over_runs

BLOCK = 32
WIDTHS = {"Q4_0": 4, "Q8_0": 8}
"""Format -> bits of a number, as a two's complement."""
ROUNDING = 2.0**-11
"""Of a number, by which a 16-bit float is off at most where it has all its digits."""
ENTRIES = 1 << 22  # that are looked at together


def narrowest(rows: Tensor, codes: Tensor, runs: Tensor | None = None) -> tuple[str, bool] | None:
    """The narrowest of WIDTHS that holds rows (out,) times codes (out, in), and whether it does so exactly.

    Else some factor, as training leaves it, is rounded to 16 bits. None if no format holds them.

    runs: (out, in / 32), whole numbers that codes are multiples of, which then go to the factors of blocks.
    """
    if codes.shape[1] % BLOCK or (runs is not None and runs.shape[1] * BLOCK != codes.shape[1]):
        return None
    needed, exact = 0, True
    for factors, numbers in _blocks(rows, codes, runs):
        moved = (factors.half().float() - factors).abs()
        if not bool((moved <= factors.abs() * ROUNDING).all()):
            return None
        exact = exact and not bool(moved.any())
        needed = max(needed, -int(numbers.amin()), int(numbers.amax()) + 1)
    return next(((kind, exact) for kind, width in WIDTHS.items() if needed <= 1 << width - 1), None)


def packed(rows: Tensor, codes: Tensor, runs: Tensor | None, kind: str) -> np.ndarray:
    """(out, bytes), uint8: a block's factor and then its numbers, for what `narrowest` says fits."""
    parts = []
    for factors, numbers in _blocks(rows, codes, runs):
        least, most = limits(WIDTHS[kind])
        assert least <= int(numbers.amin()), kind
        assert int(numbers.amax()) <= most, kind
        stored = numbers.numpy().astype(np.int8)
        if kind == "Q4_0":  # those of the block's first half in the low bits
            moved = (stored + 8).astype(np.uint8)
            stored = moved[..., : BLOCK // 2] | moved[..., BLOCK // 2 :] << 4
        scale = factors.half().numpy().view(np.uint8).reshape(*factors.shape, 2)
        parts.append(np.concatenate((scale, stored.view(np.uint8)), axis=-1).reshape(len(factors), -1))
    return np.concatenate(parts)


def _blocks(rows: Tensor, codes: Tensor, runs: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Factors (some, in / 32), float32, and numbers (some, in / 32, 32), of some rows at a time."""
    n = codes.shape[1]
    step = max(1, ENTRIES // n)
    for begin in range(0, len(codes), step):
        part = slice(begin, begin + step)
        a, q = rows[part].float()[:, None].expand(-1, n // BLOCK), codes[part]
        if runs is not None:
            a, q = a * runs[part], over_runs(q, runs[part])
        yield a.contiguous(), q.view(-1, n // BLOCK, BLOCK)
