"""Contexts with which the codes of a layer make the smallest stream (shim/streams.py writes it), and its size."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from ..shim.streams import Contexts, width_of
from ..shim.tables import RAREST, SCALES, SHAPES, TOTAL, TOTAL_BITS, WIDEST, Table

EXACT = 16
"""Magnitudes below this are counted each by itself, larger ones by eighths of an octave."""
PER_OCTAVE = 8
BLOCK = 1 << 22  # entries that are counted at a time
ROUNDS = 1
LANE_BITS = 8192
"""Of code a lane at least: its state costs 24 more."""
MOST_IN_LANE = 8192
STORED_WIDEST = 255
EDGE = 0.005
"""Share of rows or columns beyond either end that classes need not reach."""


def fit_contexts(codes: Tensor) -> Contexts:
    """Contexts for codes (m, n) of any whole dtype: classes, scales and shape by alternation, or stored tables."""
    bins = _bins(codes)
    flipped = bins.T.contiguous()
    rows, columns, base, unit = _first_classes(codes)
    costs = _costs(8 * width_of(codes))
    shape = 0
    for _ in range(ROUNDS):
        of_rows = _counts(bins, columns)
        base, shape = _density(of_rows, rows, costs, base, unit)
        rows = _classes(of_rows, costs, base, unit, shape)
        of_columns = _counts(flipped, rows)
        base, shape = _density(of_columns, columns, costs, base, unit)
        columns = _classes(of_columns, costs, base, unit, shape)
    down = int(rows.min()), int(columns.min())
    base += unit * sum(down)
    rows, columns = rows - down[0], columns - down[1]
    found = Contexts(rows, columns, 1, base, unit, shape)
    joint, widest = _joint(codes, rows, columns)
    bits = _bits(joint, widest, found, width_of(codes))
    smallest = bits + 8 * found.header_bytes()
    for shift in range(5):
        stored = _stored(joint, widest, rows, columns, shift, width_of(codes))
        own = _bits(_merged(joint, shift), widest, stored, width_of(codes))
        if own + 8 * stored.header_bytes() < smallest:
            smallest, bits, found = own + 8 * stored.header_bytes(), own, stored
    m, n = codes.shape
    entries = min(MOST_IN_LANE, LANE_BITS * m * n / max(bits, 1))
    lane_rows = min(m, max(1, math.ceil(entries / n)))
    return Contexts(found.rows, found.columns, lane_rows, found.base, found.unit, found.shape, found.tables)


def stream_bytes(codes: Tensor, contexts: Contexts) -> int:
    """Bytes that `encode` makes of codes (m, n) with these contexts, to a thousandth, without making them."""
    joint, widest = _joint(codes, contexts.rows, contexts.columns)
    bits = _bits(joint, widest, contexts, width_of(codes))
    lanes = -(-codes.shape[0] // contexts.lane_rows)
    return contexts.header_bytes() + round(
        max(0.0, bits - 8 * lanes) / 8
    )  # a state holds 8 bits more than it began with


# --- what is counted ------------------------------------------------------------------------------


def _bins(codes: Tensor) -> Tensor:
    """Of each code the number of its magnitude's bin, uint8."""
    return torch.tensor(_bin_of(), dtype=torch.uint8)[_clamped(codes, WIDEST).abs().int()]


def _clamped(codes: Tensor, most: int) -> Tensor:
    """int16."""
    return (codes.short() if codes.itemsize == 1 else codes.clamp(-most, most)).short().clamp(-most, most)


@cache
def _bin_of() -> list[int]:
    return [a if a < EXACT else EXACT + int(PER_OCTAVE * math.log2(a / EXACT)) for a in range(WIDEST + 1)]


def _counts(bins: Tensor, classes: Tensor) -> Tensor:
    """(rows, 16, bins): how many entries of each row lie in columns of each class and in each bin."""
    m, n = bins.shape
    size = int(bins.max()) + 1
    offsets = classes.int() * size
    step = max(1, BLOCK // n)
    found = []
    for begin in range(0, m, step):
        part = bins[begin : begin + step]
        places = part + offsets + torch.arange(len(part), dtype=torch.int32)[:, None] * (16 * size)
        found.append(torch.bincount(places.view(-1), minlength=len(part) * 16 * size))
    return torch.cat(found).view(m, 16, size).float()


def _joint(codes: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, int]:
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


def _merged(joint: Tensor, shift: int) -> Tensor:
    """The counts when classes lose their lowest bits."""
    size = 16 >> shift
    kept = joint.view(size, 1 << shift, size, 1 << shift, -1).sum((1, 3))
    return torch.nn.functional.pad(kept, (0, 0, 0, 16 - size, 0, 16 - size))


def _by_table(joint: Tensor) -> Tensor:
    """(31, values): the counts by the sum of both classes."""
    found = joint.new_zeros(31, joint.shape[-1])
    for row in range(16):
        found[row : row + 16] += joint[row]
    return found


def _bits(joint: Tensor, widest: int, contexts: Contexts, width: int) -> float:
    """Bits of all codes and escapes."""
    tables, counts = contexts.every_table(), _by_table(joint)
    prices = torch.zeros(counts.shape, dtype=torch.float64)
    for row, frequencies in zip(prices, tables, strict=False):
        f = torch.tensor([*frequencies, TOTAL - sum(frequencies)], dtype=torch.float64)
        cost = TOTAL_BITS - torch.log2(f)
        K = len(frequencies) // 2
        row[:] = cost[-1] + 8 * width
        kept = min(K, widest)
        inner = torch.where(f[:-1] > 0, cost[:-1], row[0])
        row[widest + 1 - kept : widest + 2 + kept] = inner[K - kept : K + kept + 1]
    return float((counts * prices).sum())


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
    bins = torch.tensor(_bin_of())
    summed = torch.zeros(*bits.shape[:2], int(bins[-1]) + 1).index_add_(2, bins, bits)
    return summed / torch.bincount(bins)


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
    size = counts.shape[-1]
    by_class = counts.new_zeros(16, 16, size).index_add_(0, classes.long(), counts)
    by_table = _by_table(by_class)
    best = math.inf, base, 0
    for moved in range(base - 3, base + 4):
        chosen = _chosen(moved, unit)
        bits, shape = torch.einsum("tb,tsb->s", by_table, costs[chosen, :, :size]).min(0)
        best = min(best, (float(bits), moved, int(shape)))
    return best[1], best[2]


def _classes(counts: Tensor, costs: Tensor, base: int, unit: int, shape: int) -> Tensor:
    """The class of each row that makes the fewest bits. counts: (rows, 16, bins)."""
    size = counts.shape[-1]
    prices = costs[_chosen(base, unit), shape, :size]
    of_class = torch.stack([prices[r : r + 16].reshape(-1) for r in range(16)], 1)
    return (counts.view(len(counts), -1) @ of_class).argmin(1).to(torch.uint8)


def _chosen(base: int, unit: int) -> Tensor:
    """Where the scales of 31 tables lie among all."""
    return (base + unit * torch.arange(31) - SCALES[0]).clamp(0, len(SCALES) - 1)


# --- stored tables --------------------------------------------------------------------------------


def _stored(joint: Tensor, widest: int, rows: Tensor, columns: Tensor, shift: int, width: int) -> Contexts:
    """Tables as often as each code came, for classes without their lowest bits."""
    kept = rows >> shift, columns >> shift
    count = int(kept[0].max()) + int(kept[1].max()) + 1
    counts = _by_table(_merged(joint, shift))[:count]
    return Contexts(*kept, 1, tables=tuple(_frequencies(line, widest, width) for line in counts))


def _frequencies(counts: Tensor, widest: int, width: int) -> Table:
    """Of one table; a code that came once goes by the escape."""
    whole = int(counts.sum())
    inner = counts[1:-1].clone()
    inner[inner * (TOTAL_BITS + 8 * width) < 40] = 0
    if widest > STORED_WIDEST:
        inner = inner[widest - STORED_WIDEST : widest + STORED_WIDEST + 1]
    K = len(inner) // 2
    held = torch.nonzero(inner).view(-1)
    kept = int((held - K).abs().max()) if len(held) else 0
    inner = inner[K - kept : K + kept + 1]
    if not whole or not len(held):
        return (TOTAL - 1,)
    escape = min(TOTAL // 2, max(1, round((whole - int(inner.sum())) / whole * TOTAL)))
    f = torch.where(inner > 0, (inner.double() / int(inner.sum()) * (TOTAL - escape)).round().clamp(min=1), 0.0).long()
    over = int(f.sum()) - (TOTAL - escape)
    while over:
        at = int(f.argmax())
        change = min(over, max(1, int(f[at]) // 2)) if over > 0 else over
        f[at] -= change
        over -= change
    return tuple(f.tolist())
