"""Frequencies: sums, order, and that they are what they always were."""

from __future__ import annotations

import zlib
from itertools import pairwise

import pytest

from losparse_cli.shim.tables import SCALES, SHAPES, TOTAL, WIDEST, read_tables, table, write_tables


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_tables_of_densities(shape: int) -> None:
    for scale in (*SCALES[::16], SCALES[-1]):
        frequencies = table(scale, shape)
        K = len(frequencies) // 2
        assert sum(frequencies) < TOTAL
        assert min(frequencies) >= 1
        assert K <= WIDEST
        half = frequencies[K:]
        assert all(one >= other - 1 for one, other in pairwise(half))
        assert all(abs(frequencies[K - k] - frequencies[K + k]) <= 1 for k in range(K + 1))


def test_tables_never_change() -> None:
    everything = repr([table(scale, shape) for scale in SCALES[::8] for shape in range(len(SHAPES))])
    assert zlib.crc32(everything.encode()) == 3456910003
    assert table(0, 5) == (1, 24, 248, 990, 1569, 990, 248, 24, 1)


def test_stored_tables_come_back() -> None:
    tables = ((4095,), (0, 4000, 1), tuple(range(1, 64)))
    stored = write_tables(tables)
    assert read_tables(stored) == tables
    for end in range(len(stored)):
        with pytest.raises(ValueError, match="table"):
            read_tables(stored[:end])
    with pytest.raises(ValueError, match="table"):
        read_tables(stored + b"\0")
    for wrong in (
        [], [0], [32, 0], [128], [160, 0], [1, 0xF0, 0xFF, 0xFF], [1, 0x10, 0x08], [1, 0x11], [129, 0x11], [1, 0x10, 1],
        [1, 0x80, *[0x99] * 1000],
    ):  # fmt: skip
        with pytest.raises(ValueError, match="table"):
            read_tables(bytes(wrong))


def test_tables_that_are_the_same_both_ways_are_stored_by_halves() -> None:
    both = ((1, 20, 4000, 20, 1), (7, 0, 7), (4095,))
    stored = write_tables(both)
    assert stored.hex() == "8382ecc7120107ff7f"
    assert read_tables(stored) == both
    other = write_tables((*both[:2], (7, 0, 8)))
    assert other[0] == 3
    assert len(other) > len(stored)
