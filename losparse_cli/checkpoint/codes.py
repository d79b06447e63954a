"""Contexts with which the codes of a layer make the smallest stream (shim/streams.py writes it), and its size."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from ..shim.streams import Contexts, width_of
from ..shim.tables import RAREST, SCALES, SHAPES, TOTAL, WIDEST
from .counts import (
    BLOCK,
    best_classes,
    bin_of,
    bin_widths,
    bins_of,
    by_class,
    by_table,
    counts_in,
    joint_counts,
    stream_bits,
)  # fmt: skip
from .frequencies import with_own_tables

ROUNDS = 1
LANE_BITS = 8192
"""Of code a lane at least: its state costs 24 more."""
MOST_IN_LANE = 8192
EDGE = 0.005
"""Share of rows or columns beyond either end that classes need not reach."""


def fit_contexts(codes: Tensor) -> Contexts:
    """Contexts for codes (m, n) of any whole dtype: classes, scales and shape by alternation, or stored tables."""
    bins = bins_of(codes)
    flipped = bins.T.contiguous()
    rows, columns, base, unit = _first_classes(codes)
    costs = _costs(8 * width_of(codes))
    shape = 0
    for _ in range(ROUNDS):
        of_rows = counts_in(bins, columns)
        base, shape = _density(of_rows, rows, costs, base, unit)
        rows = _classes(of_rows, costs, base, unit, shape)
        of_columns = counts_in(flipped, rows)
        base, shape = _density(of_columns, columns, costs, base, unit)
        columns = _classes(of_columns, costs, base, unit, shape)
    down = int(rows.min()), int(columns.min())
    base += unit * sum(down)
    rows, columns = rows - down[0], columns - down[1]
    found = Contexts(rows, columns, 1, base, unit, shape)
    joint, widest = joint_counts(codes, rows, columns)
    bits = stream_bits(joint, widest, found, width_of(codes)) + 8 * found.header_bytes()
    bits, found = with_own_tables(codes, bins, flipped, (bits, found))
    m, n = codes.shape
    entries = min(MOST_IN_LANE, LANE_BITS * m * n / max(bits - 8 * found.header_bytes(), 1))
    return replace(found, lane_rows=min(m, max(1, math.ceil(entries / n))))


def stream_bytes(codes: Tensor, contexts: Contexts) -> int:
    """Bytes that `encode` makes of codes (m, n) with these contexts, to a thousandth, without making them."""
    joint, widest = joint_counts(codes, contexts.rows, contexts.columns)
    bits = stream_bits(joint, widest, contexts, width_of(codes))
    lanes = -(-codes.shape[0] // contexts.lane_rows)
    return contexts.header_bytes() + round(
        max(0.0, bits - 8 * lanes) / 8
    )  # a state holds 8 bits more than it began with


# --- classes and densities ------------------------------------------------------------------------


@cache
def _masses() -> Tensor:
    """(129, 13, 1025), float32: of each scale and shape the probability of each magnitude (and its negative), and the
    escape's.

    Nearly the tables of shim.tables, without their care for the last bit.
    """
    scales = torch.tensor(SCALES)[:, None] / 8
    magnitudes = torch.arange(WIDEST + 1)
    v = (torch.arange(16) + 0.5) / 16
    nodes = torch.stack([(magnitudes - 0.5 + (i + 0.5) / 4).abs() for i in range(4)])
    found = []
    for power, width in SHAPES:
        octaves = math.log2(width) + scales

        def density(x: Tensor, power: int = power, octaves: Tensor = octaves) -> Tensor:
            y = torch.exp2((torch.log2(x) - octaves) * (power / 4 if power > 0 else 2.0))
            return torch.exp(-y) if power > 0 else torch.exp2(torch.log2(1 + y) * power)

        masses = torch.stack([density(node) for node in nodes]).mean(0)
        masses[:, 0] = (density(v * v / 2) * v).sum(1) / 8
        total = masses.cumsum(1) * 2 - masses[:, :1]
        kept = masses * RAREST >= total
        masses = masses / total[:, -1:]
        escape = (1 - total.gather(1, kept.sum(1, keepdim=True) - 1) / total[:, -1:]).clamp(min=1 / TOTAL)
        for _ in range(2):  # small ones are raised to 1/4096 at the cost of the others
            masses = torch.where(kept, masses.clamp(min=1 / TOTAL), 0.0)
            masses = masses * (1 - escape) / (masses[:, :1] + 2 * masses[:, 1:].sum(1, keepdim=True))
        found.append(torch.cat((torch.where(kept, masses.clamp(min=1 / TOTAL), 0.0), escape), 1))
    return torch.stack(found, 1)


@cache
def _costs(escape_bits: int) -> Tensor:
    """Bits of a code by scale, shape and bin: (129, 13, bins), float32."""
    masses, escape = _masses()[..., :-1], _masses()[..., -1:]
    bits = -torch.log2(torch.where(masses > 0, masses, escape)) + (masses == 0) * escape_bits
    bins = torch.tensor(bin_of())
    summed = torch.zeros(*bits.shape[:2], int(bins[-1]) + 1).index_add_(2, bins, bits)
    return summed / bin_widths()


@cache
def _means() -> Tensor:
    """Mean magnitude at each scale, of Gaussian codes."""
    masses = _masses()[:, [power for power, _ in SHAPES].index(8), :-1]
    masses = torch.where(masses > 1.5 / TOTAL, masses, 0.0)
    return 2 * (masses * torch.arange(WIDEST + 1)).sum(1)


def _first_classes(codes: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Classes of rows and columns by their mean magnitude; base and unit."""
    m, n = codes.shape
    row_sums, column_sums = torch.zeros(m, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    step = max(1, BLOCK // n)
    for begin in range(0, m, step):
        part = codes[begin : begin + step].float().abs()
        row_sums[begin : begin + step] = part.sum(1)
        column_sums += part.sum(0)
    of_rows, of_columns = _scales(row_sums / n), _scales(column_sums / m)
    middle = float(_scales(row_sums.sum(0, keepdim=True) / (m * n)))
    ends = [_ends(x, 15 * 8) for x in (of_rows, of_columns)]
    unit = min(8, max(1, *(math.ceil((high - low) / 15) for low, high in ends)))
    (rows, low), (columns, left) = (
        (((x - low) / unit).round().clamp(0, 15).to(torch.uint8), low)
        for x, (low, _) in zip((of_rows, of_columns), ends, strict=True)
    )
    return rows, columns, min(max(round(low + left - middle), -100), 100), unit


def _ends(scales: Tensor, most: int) -> tuple[float, float]:
    ordered = scales.sort().values
    aside = int(EDGE * len(ordered))
    low, high = float(ordered[aside]), float(ordered[len(ordered) - 1 - aside])
    return max(low, high - most), high


def _scales(means: Tensor) -> Tensor:
    """The scale whose mean magnitude this is, between the whole ones too."""
    known = torch.log2(_means().clamp(min=1e-9))
    wanted = torch.log2(means.clamp(min=1e-9)).clamp(known[0], known[-1])
    right = torch.searchsorted(known, wanted).clamp(1, len(known) - 1)
    below, above = known[right - 1], known[right]
    return SCALES[0] + right - 1 + ((wanted - below) / (above - below).clamp(min=1e-9)).clamp(0, 1)


def _density(counts: Tensor, classes: Tensor, costs: Tensor, base: int, unit: int) -> tuple[int, int]:
    """The base near this one and the shape that make the fewest bits. counts: of rows with these classes."""
    size, held = counts.shape[-1], by_table(by_class(counts, classes))
    best = math.inf, base, 0
    for moved in range(base - 3, base + 4):
        chosen = _chosen(moved, unit)
        bits, shape = torch.einsum("tb,tsb->s", held, costs[chosen, :, :size]).min(0)
        best = min(best, (float(bits), moved, int(shape)))
    return best[1], best[2]


def _classes(counts: Tensor, costs: Tensor, base: int, unit: int, shape: int) -> Tensor:
    """The class of each row that makes the fewest bits. counts: (rows, 16, bins)."""
    return best_classes(counts, costs[_chosen(base, unit), shape, : counts.shape[-1]])


def _chosen(base: int, unit: int) -> Tensor:
    """Where the scales of 31 tables lie among all."""
    return (base + unit * torch.arange(31) - SCALES[0]).clamp(0, len(SCALES) - 1)
