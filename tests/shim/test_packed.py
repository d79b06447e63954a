"""Codes in few bits: the form in memory against a writer of its own, whichever reads and writes it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from losparse_cli import kernels
from losparse_cli.shim import installed, operator, packed

pytestmark = pytest.mark.usefixtures("installed_kernels")
SIZES = [(1, 1), (8, 32), (13, 70), (3, 33), (192, 64)]


def codes_of(shape: tuple[int, int], bits: int, *, outliers: bool = True, dtype: torch.dtype = torch.int16) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, shape, generator=generator)
    if outliers and codes.numel() > 8:
        codes.view(-1)[:: codes.numel() // 3] = torch.tensor([half, -half - 1, 3000, -32768]).repeat(2)[
            : len(codes.view(-1)[:: codes.numel() // 3])
        ]
    return codes.to(dtype)


def written(codes: Tensor, bits: int) -> Tensor:
    """The index, bit by bit as `packed` describes it."""
    m, n = codes.shape
    half = 1 << (bits - 1)
    lines = -(-n // 32)
    made = torch.zeros(-(-m // 8) * lines * 32 * bits, dtype=torch.int64)
    fitting = codes.long().clamp(-half, half - 1)
    for row, column in itertools.product(range(-(-m // 8) * 8), range(lines * 32)):
        u = int(fitting[row, column]) + half if row < m and column < n else half
        start = (row // 8 * lines + column // 32) * 32 * bits + column % 32
        t, line, low = row % 8, 0, 0
        for part in (8,) if bits == 8 else (4, 2, 1):
            if bits & part:
                rows_in_byte = 8 // part
                piece = u >> low & (1 << part) - 1
                made[start + 32 * (line + t // rows_in_byte)] |= piece << part * (t % rows_in_byte)
                line, low = line + part, low + part
    rest = codes.long() - fitting
    found = made.to(torch.uint8)
    if not rest.any():
        return found
    row, column = rest.nonzero(as_tuple=True)
    starts = torch.tensor([int((row < i).sum()) for i in range(m + 1)])
    return torch.cat([found, *(x.int().view(torch.uint8) for x in (starts, column, rest[row, column]))])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("way", ["reference", "kernels"])
def test_what_is_packed_is_what_was_given(way: str, bits: int) -> None:
    installed.install(None) if way == "reference" else kernels.install()
    for shape, outliers in itertools.product(SIZES, (True, False)):
        codes = codes_of(shape, bits, outliers=outliers)
        index = written(codes, bits)
        assert torch.equal(operator.codes_of(index, shape, f"codes{bits}").int(), codes.int())
        rest = packed.rest_of(index, shape, bits)
        assert index.numel() == packed.packed_bytes(shape, bits, rest)
        rows = torch.randint(0, shape[0], (2, 5))
        assert torch.equal(packed.unpack(index, shape, bits, rows), codes[rows].int())
        made = installed.kernels().packed(codes, bits, rest)
        assert (made is None) == (way == "reference")
        assert made is None or torch.equal(made, index)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_rows_are_the_same_to_the_last_bit(bits: int, dtype: torch.dtype) -> None:
    for shape in SIZES:
        codes = codes_of(shape, bits)
        index, form = written(codes, bits), f"codes{bits}"
        values, starts = torch.rand(shape[0]).to(dtype), torch.randint(0, 256, (shape[1],), dtype=torch.uint8)
        rows = torch.randint(0, shape[0], (3, 4))
        kernels.install()
        found = operator.rows_of_codes(rows, values, index, starts, shape, form)
        installed.install(None)
        expected = operator.rows_of_codes(rows, values, index, starts, shape, form)
        plainly = operator.rows_of_codes(rows, values, codes, starts, shape, "codes")
        assert found.dtype == dtype
        assert torch.equal(found, expected)
        assert torch.equal(found, plainly)


def test_as_few_bits_as_nearly_all_need() -> None:
    """A few outliers lie beside; where they are many, more bits are taken, and whole bytes at last."""
    kernels.install()
    codes = torch.randint(-4, 4, (128, 256), dtype=torch.int32)
    assert operator.held(codes)[1] == "codes3"
    codes[::9, 7] = 1 << 20
    index, form = operator.held(codes)
    assert form == "codes3"
    assert torch.equal(operator.codes_of(index, (128, 256), form), codes)
    codes[:, ::3] = 9
    assert operator.held(codes)[1] == "codes5"
    wide = torch.randint(-3000, 3000, (128, 256), dtype=torch.int16)
    assert operator.held(wide)[1] == "codes"
    installed.install(None)
    assert operator.held(codes)[1] == "codes"  # which plain torch multiplies with sooner


def test_counts_of_bits_are_those_of_a_definition() -> None:
    kernels.install()
    for dtype, most in ((torch.int8, 128), (torch.int16, 3000), (torch.int32, 1 << 30)):
        codes = torch.randint(-most, most, (5, 77), dtype=dtype)
        codes[0, :6] = torch.tensor([0, -1, 1, -2, 127, -128])
        counts = installed.kernels().code_bits(codes)
        if counts is None:
            pytest.skip("needs a C compiler")
        needed = [next(b for b in range(1, 40) if -(1 << b - 1) <= q < 1 << b - 1) for q in codes.view(-1).tolist()]
        assert counts == [sum(b > 8 for b in needed), *(needed.count(b) for b in range(1, 9))]
