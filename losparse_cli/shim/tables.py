"""Frequencies of whole numbers, in 1/4096: of densities of many widths and shapes, or as they are stored.

Every reader has to find the same frequencies to the last unit, on any machine. So they are computed with Python's
floats by + - * /, square roots and powers of two alone, which IEEE 754 rounds one way only (docs/format.md). This file
is shipped inside checkpoints and may import nothing but the standard library.
"""

from __future__ import annotations

import math
from functools import cache

TOTAL_BITS = 12
TOTAL = 1 << TOTAL_BITS
"""Sum of the frequencies of a table, the escape's included."""
WIDEST = 1023
"""Largest magnitude that has a frequency of its own; others go by the escape."""
RAREST = 8 * TOTAL
"""One over the share of a code that is just worth a frequency of its own."""
SCALES = range(-48, 81)
"""Scales s of a density: its standard deviation is 2^(s / 8)."""
MOST_TABLES = 31


SHAPES = (
    (2, 0.0913), (3, 0.3858), (4, 0.7071), (5, 0.9681), (6, 1.1637), (8, 1.4142), (10, 1.5543), (12, 1.6367),
    (-2, 1.0), (-3, 1.7321), (-4, 2.2361), (-6, 3.0), (-10, 4.1231),
)  # fmt: skip
"""(p, c): exp(-(x / a)^(p / 4)) for p > 0 and (1 + (x / a)^2)^p for p < 0, with a = c times the standard deviation."""

Table = tuple[int, ...]
"""Frequencies of -K..K in 1/4096. What is missing from 4096 is the escape's, and at least 1."""


def within(scale: int) -> int:
    """The scale nearest to this one that has tables."""
    return min(max(scale, SCALES[0]), SCALES[-1])


@cache
def table(scale: int, shape: int) -> Table:
    """Frequencies, all at least 1, of a density of SHAPES."""
    power, width = SHAPES[shape]
    a = width * _two_to_eighths(scale)
    # The middle: 2 ∫ g(x) dx over 0..1/2 with x = v² / 2, which looks closest at the peak.
    middle = 0.0
    for i in range(16):
        v = (i + 0.5) / 16
        middle += _density(v * v / 2 / a, power) * v
    masses = [middle / 8]
    points = 8 if scale < 16 else 2
    total, rest = masses[0], 0.0
    for magnitude in range(1, 2 * WIDEST):
        mass = 0.0
        for i in range(points):
            mass += _density((magnitude - 0.5 + (i + 0.5) / points) / a, power)
        mass /= points
        total += 2 * mass
        if rest == 0 and mass * RAREST >= total and magnitude <= WIDEST:
            masses.append(mass)
        elif mass * (TOTAL << 8) < total:
            break
        else:
            rest += 2 * mass
            points = 1
    return _whole([*masses[:0:-1], *masses, rest], TOTAL)[:-1]


def _whole(weights: list[float], total: int) -> Table:
    """Whole numbers of at least 1 in proportion to the weights, summing to `total`: by largest remainder."""
    fixed = [False] * len(weights)
    while True:
        free, mass = total - sum(fixed), 0.0
        for weight, one in zip(weights, fixed, strict=True):
            mass += 0.0 if one else weight  # sum() rounds otherwise from Python 3.12 on
        share = [1.0 if one else w / mass * free for w, one in zip(weights, fixed, strict=True)]
        small = [one or x < 1 for x, one in zip(share, fixed, strict=True)]
        if small == fixed:
            break
        fixed = small
    whole = [int(x) for x in share]
    order = sorted(range(len(whole)), key=lambda i: (whole[i] - share[i], i))
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return tuple(whole)


def _density(x: float, power: int) -> float:
    """A member of SHAPES at x ≥ 0 for a = 1, not normalized."""
    if power < 0:
        base, found = 1 / (1 + x * x), 1.0
        for _ in range(-power):
            found *= base
        return found
    root = math.sqrt(x)
    y = 1.0
    for _ in range(power // 4):
        y *= x
    if power & 2:
        y *= root
    if power & 1:
        y *= math.sqrt(root)
    return _exp_of_minus(y)


def _exp_of_minus(y: float) -> float:
    """exp(-y) for y ≥ 0; 0 beyond 40."""
    if y > 40:
        return 0.0
    halvings = int(y * 1.4426950408889634 + 0.5)
    r = halvings * 0.6931471805599453 - y
    found = 1.0
    for k in range(12, 0, -1):
        found = 1 + r * found / k
    return math.ldexp(found, -halvings)


def _two_to_eighths(eighths: int) -> float:
    found, root = 1.0, 2.0
    for bit in (4, 2, 1):
        root = math.sqrt(root)
        if eighths & bit:
            found *= root
    return math.ldexp(found, eighths >> 3)


# --- stored tables --------------------------------------------------------------------------------

MIRRORED = 128
"""Added to the number of tables: of each only the frequencies of 0..K are stored, which are those of 0..-K, too."""


def write_tables(tables: tuple[Table, ...]) -> bytes:
    """Their number in a byte, then of each K and its frequencies, as numbers of 3 bits a half of a byte."""
    mirrored = all(frequencies == frequencies[::-1] for frequencies in tables)
    halves: list[int] = []
    for frequencies in tables:
        K = len(frequencies) // 2
        for value in (K, *frequencies[K if mirrored else 0 :]):
            while value > 7:
                halves.append(value & 7 | 8)
                value >>= 3
            halves.append(value)
    halves += [0] * (len(halves) % 2)
    pairs = zip(halves[::2], halves[1::2], strict=True)
    return bytes([len(tables) + MIRRORED * mirrored, *(low | high << 4 for low, high in pairs)])


def read_tables(stored: bytes) -> tuple[Table, ...]:
    """ValueError if these bytes are not what `write_tables` makes of some tables."""
    halves = iter([half for byte in stored[1:] for half in (byte & 15, byte >> 4)])

    def number() -> int:
        value, shift = 0, 0
        for half in halves:
            value |= (half & 7) << shift
            shift += 3
            if half < 8:
                return value
            if shift > TOTAL_BITS:
                break
        raise ValueError("a stored table is damaged")

    count = stored[0] % MIRRORED if stored else 0
    if not 0 < count <= MOST_TABLES:
        raise ValueError(f"{count} stored tables")
    found = []
    for _ in range(count):
        K = number()
        if K > WIDEST:
            raise ValueError("a stored table is damaged")
        mirrored = stored[0] >= MIRRORED
        frequencies = tuple(number() for _ in range(K + 1 if mirrored else 2 * K + 1))
        found.append((*frequencies[:0:-1], *frequencies) if mirrored else frequencies)
        if sum(found[-1]) >= TOTAL:
            raise ValueError("a stored table is damaged")
    if write_tables(tuple(found)) != stored:
        raise ValueError("a stored table is damaged")
    return tuple(found)
