# mypy: ignore-errors
"""Triton kernels for packed codes (shim/packed.py); `gpu_codes` calls them.

Capital parameters are known when a kernel is compiled. A program takes R rows of S and goes through them LINES lines of
32 columns at a time. `rest` is what lies beside the strips, int32: where it begins for each row and ends, (m + 1),
COUNT columns, COUNT numbers to be added to the codes there. `factors` are those that `scale` numbers, one a column.
"""

import triton
import triton.language as tl

from .gpu_triton import and_low_rank, and_low_rank_of_some


@triton.jit
def codes_at(index, row, here, first, lines, LINES: tl.constexpr, BITS: tl.constexpr):
    """(32 * LINES, R), int32, from line `first` of each row on. row: (R,); here: which of them exist.

    What lies in no line is the lowest code: whatever it is multiplied by has to be zero.
    """
    column = tl.arange(0, 32 * LINES)
    line = first + column // 32
    inside = (line < lines)[:, None] & here[None, :]
    at = (row // 8).to(tl.int64)[None, :] * lines + line[:, None]
    at = index + at * (32 * BITS) + (column % 32)[:, None]
    row = row % 8
    if BITS == 8:
        u = tl.load(at + (row * 32)[None, :], mask=inside, other=0).to(tl.int32)
    else:
        u = tl.zeros((32 * LINES, row.shape[0]), tl.int32)
        if BITS & 4:
            four = tl.load(at + (row // 2 * 32)[None, :], mask=inside, other=0).to(tl.int32)
            u = four >> (row % 2 * 4)[None, :] & 15
        if BITS & 2:
            two = tl.load(at + ((BITS & 4) * 32 + row // 4 * 32)[None, :], mask=inside, other=0).to(tl.int32)
            u |= (two >> (row % 4 * 2)[None, :] & 3) << (BITS & 4)
        if BITS & 1:
            one = tl.load(at + (BITS & 6) * 32, mask=inside, other=0).to(tl.int32)
            u |= (one >> row[None, :] & 1) << (BITS & 6)
    return u - (1 << (BITS - 1))


@triton.jit
def factors_of(factors, scale, column, there):
    """Of columns, float32; `there`: which of them exist."""
    return tl.load(factors + tl.load(scale + column, mask=there, other=0).to(tl.int32))


@triton.jit
def beside(rest, row, here, m, count):
    """Where the rest of each row begins and ends, (R,); how many entries the longest has; its columns and numbers."""
    begin = tl.load(rest + row, mask=here, other=0)
    end = tl.load(rest + row + 1, mask=here, other=0)
    return begin, end, tl.max(end - begin), rest + m + 1, rest + m + 1 + count


@triton.jit
def one(
    x, values, index, scale, factors, rest, U, t, bias, y, m, n, lines, rank, count, BIAS: tl.constexpr,
    BITS: tl.constexpr, REST: tl.constexpr, R: tl.constexpr, LINES: tl.constexpr, BLOCKS: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """y for one row of x; t is V x, and goes in RANKS steps of RANK entries."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    here = row < m
    total = tl.zeros((32 * LINES, R), tl.float32)
    for block in range(BLOCKS):
        column = block * LINES * 32 + tl.arange(0, LINES * 32)
        q = codes_at(index, row, here, block * LINES, lines, LINES, BITS)
        c = factors_of(factors, scale, column, column < n)
        part = tl.load(x + column, mask=column < n, other=0.0).to(tl.float32) * c
        total += part[:, None] * q.to(tl.float32)
    out = tl.sum(total, 0)
    if REST:
        begin, end, most, columns, numbers = beside(rest, row, here, m, count)
        for k in range(0, most, 32):
            entry = begin[None, :] + k + tl.arange(0, 32)[:, None]
            there = entry < end[None, :]
            column = tl.load(columns + entry, mask=there, other=0)
            c = factors_of(factors, scale, column, there)
            more = tl.load(numbers + entry, mask=there, other=0).to(tl.float32) * c
            out += tl.sum(tl.load(x + column, mask=there, other=0.0).to(tl.float32) * more, 0)
    out *= tl.load(values + row, mask=here, other=0.0).to(tl.float32)
    out = and_low_rank(out, U, t, bias, row, here, rank, BIAS, RANK, RANKS)
    tl.store(y + row, out.to(y.dtype.element_ty), mask=here)


@triton.jit
def some(
    x, values, index, scale, factors, rest, U, t, bias, y, m, n, lines, rank, count, rows, BIAS: tl.constexpr,
    BITS: tl.constexpr, REST: tl.constexpr, R: tl.constexpr, LINES: tl.constexpr, BLOCKS: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, SLOTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y for up to SLOTS rows of x, multiplied on tensor cores unless EXACT; t is x Vᵀ."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    here = row < m
    slot = tl.arange(0, SLOTS)
    used = (slot < rows)[:, None]
    out = tl.zeros((SLOTS, R), tl.float32)
    for block in range(BLOCKS):
        column = block * LINES * 32 + tl.arange(0, LINES * 32)
        q = codes_at(index, row, here, block * LINES, lines, LINES, BITS)
        c = factors_of(factors, scale, column, column < n)
        S = q.to(tl.float32) * c[:, None]
        part = tl.load(x + slot[:, None] * n + column[None, :], mask=used & (column < n)[None, :], other=0.0)
        if EXACT:
            part = part.to(tl.float32)
        out = tl.dot(part, S.to(part.dtype), out, input_precision="ieee")
    if REST:
        begin, end, most, columns, numbers = beside(rest, row, here, m, count)
        for k in range(0, most, 16):
            entry = begin[None, :] + k + tl.arange(0, 16)[:, None]
            there = entry < end[None, :]
            column = tl.load(columns + entry, mask=there, other=0)
            c = factors_of(factors, scale, column, there)
            more = tl.load(numbers + entry, mask=there, other=0).to(tl.float32) * c
            fed = tl.load(
                x + slot[:, None, None] * n + column[None, :, :], mask=used[:, :, None] & there[None, :, :], other=0.0
            )
            out += tl.sum(fed.to(tl.float32) * more[None, :, :], 1)
    out *= tl.load(values + row, mask=here, other=0.0).to(tl.float32)[None, :]
    out = and_low_rank_of_some(out, U, t, bias, row, here, slot, used, rank, BIAS, RANK, RANKS, EXACT)
    tl.store(y + slot[:, None] * m + row[None, :], out.to(y.dtype.element_ty), mask=used & here[None, :])


@triton.jit
def rows_of(
    wanted, values, index, scale, factors, rest, S, start, stop, m, n, lines, count, LISTED: tl.constexpr,
    BITS: tl.constexpr, REST: tl.constexpr, R: tl.constexpr, LINES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Rows of S, dense: those that `wanted` numbers where they are LISTED, from `start` to `stop` otherwise."""
    place = tl.program_id(0) * R + tl.arange(0, R)
    if LISTED:
        here = place < stop
        row = tl.load(wanted + place, mask=here, other=0)
    else:
        row = start + place
        here = row < stop
    a = tl.load(values + row, mask=here, other=0.0).to(tl.float32)[None, :]
    to = S + place.to(tl.int64)[None, :] * n
    for block in range(BLOCKS):
        column = block * LINES * 32 + tl.arange(0, LINES * 32)
        q = codes_at(index, row, here, block * LINES, lines, LINES, BITS)
        c = factors_of(factors, scale, column, column < n)
        tile = q.to(tl.float32) * c[:, None] * a
        tl.store(to + column[:, None], tile.to(S.dtype.element_ty), mask=(column < n)[:, None] & here[None, :])
    if REST:
        tl.debug_barrier()  # what is written over here other threads have written
        begin, end, most, columns, numbers = beside(rest, row, here, m, count)
        for k in range(0, most, 32):
            entry = begin[None, :] + k + tl.arange(0, 32)[:, None]
            there = entry < end[None, :]
            column = tl.load(columns + entry, mask=there, other=0)
            c = factors_of(factors, scale, column, there)
            number = tl.load(numbers + entry, mask=there, other=0)
            # The strips hold the code that comes nearest to it.
            q = number + tl.where(number > 0, (1 << (BITS - 1)) - 1, -(1 << (BITS - 1)))
            tl.store(to + column, (q.to(tl.float32) * c * a).to(S.dtype.element_ty), mask=there)
