"""How often which code comes in which class, and what a stream of them takes."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from ..shim.streams import Contexts
from ..shim.tables import TOTAL, TOTAL_BITS, WIDEST, Table

EXACT = 16
"""Magnitudes below this are counted each by itself, larger ones by eighths of an octave."""
PER_OCTAVE = 8
BLOCK = 1 << 22  # entries that are counted at a time


def bins_of(codes: Tensor) -> Tensor:
    """Of each code (m, n) the number of its magnitude's bin, uint8."""
    m, n = codes.shape
    of_magnitude = torch.tensor(bin_of(), dtype=torch.uint8)
    found = torch.empty(m, n, dtype=torch.uint8)
    step = max(1, BLOCK // n)
    for begin in range(0, m, step):
        part = slice(begin, begin + step)
        found[part] = of_magnitude[_clamped(codes[part], WIDEST).abs().int()]
    return found


def _clamped(codes: Tensor, most: int) -> Tensor:
    """int16."""
    return (codes.short() if codes.itemsize == 1 else codes.clamp(-most, most)).short().clamp(-most, most)


@cache
def bin_of() -> list[int]:
    return [a if a < EXACT else EXACT + int(PER_OCTAVE * math.log2(a / EXACT)) for a in range(WIDEST + 1)]


def bin_widths() -> Tensor:
    """How many magnitudes each bin has."""
    return torch.bincount(torch.tensor(bin_of()))


def counts_in(bins: Tensor, classes: Tensor) -> Tensor:
    """(rows, 16, bins): how many entries of each row lie in columns of each class and in each bin."""
    m, n = bins.shape
    size = int(bins.max()) + 1
    offsets = classes.int() * size
    step = max(1, BLOCK // max(n, 16 * size))
    found = torch.empty(m, 16 * size)
    for begin in range(0, m, step):
        part = bins[begin : begin + step]
        places = part + offsets + torch.arange(len(part), dtype=torch.int32)[:, None] * (16 * size)
        found[begin : begin + step] = torch.bincount(places.view(-1), minlength=len(part) * 16 * size).view(
            len(part), -1
        )
    return found.view(m, 16, size)


def joint_counts(codes: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, int]:
    """How many codes of -K - 1..K + 1 lie in each class of rows and columns, (16, 16, 2K + 3); and K, at most 1023.

    The first and the last stand for all that are beyond.
    """
    m, n = codes.shape
    low, high = (int(x) for x in torch.aminmax(codes))
    widest = min(max(-low, high), WIDEST)
    size = 2 * widest + 3
    found = torch.zeros(256 * size, dtype=torch.int64)
    step = max(1, BLOCK // n)
    right = columns.int() * size + widest + 1
    for begin in range(0, m, step):
        part = _clamped(codes[begin : begin + step], widest + 1).int()
        places = part + right + (rows[begin : begin + step].int() * (16 * size))[:, None]
        found += torch.bincount(places.view(-1), minlength=len(found))
    return found.view(16, 16, size), widest


def merged(joint: Tensor, rows: int, columns: int) -> Tensor:
    """The counts when classes of rows and columns lose so many of their lowest bits."""
    kept = joint.view(16 >> rows, 1 << rows, 16 >> columns, 1 << columns, -1).sum((1, 3))
    return torch.nn.functional.pad(kept, (0, 0, 0, 16 - kept.shape[1], 0, 16 - kept.shape[0]))


def by_table(joint: Tensor) -> Tensor:
    """(31, values): the counts by the sum of both classes."""
    tables = (torch.arange(16)[:, None] + torch.arange(16)).view(-1)
    return joint.new_zeros(31, joint.shape[-1]).index_add_(0, tables, joint.reshape(256, -1))


def by_class(counts: Tensor, classes: Tensor) -> Tensor:
    """(16, 16, bins): of `counts_in` the sums over the rows of each of these classes."""
    return counts.new_zeros(16, *counts.shape[1:]).index_add_(0, classes.long(), counts)


def best_classes(counts: Tensor, prices: Tensor, most: int = 16) -> Tensor:
    """The class below `most` of each row that makes the fewest bits. counts: of `counts_in`; prices: (31, bins)."""
    of_class = torch.stack([prices[r : r + 16].reshape(-1) for r in range(most)], 1)
    return (counts.view(len(counts), -1) @ of_class).argmin(1).to(torch.uint8)


def stream_bits(joint: Tensor, widest: int, contexts: Contexts, width: int) -> float:
    """Bits of all codes and escapes."""
    counts, K = by_table(joint), widest
    tables = contexts.every_table()[: len(counts)]
    counts = counts[: len(tables)]
    escapes = TOTAL_BITS + 8 * width - torch.log2(torch.tensor([TOTAL - sum(t) for t in tables], dtype=torch.float64))
    f = torch.tensor([_framed(table, K) for table in tables], dtype=torch.float64)
    inner = torch.where(f > 0, TOTAL_BITS - torch.log2(f), escapes[:, None])
    return float((counts[:, 1:-1] * inner).sum() + ((counts[:, 0] + counts[:, -1]) * escapes).sum())


def _framed(table: Table, K: int) -> list[int]:
    """The frequencies of -K..K."""
    beside = K - len(table) // 2
    return [0] * beside + list(table) + [0] * beside if beside >= 0 else list(table[-beside : len(table) + beside])
