# mypy: ignore-errors
"""Triton kernels for S as bits; `gpu` calls them.

Capital parameters are known when a kernel is compiled. A program takes R rows of S and goes through them in BLOCKS
steps of OCTETS bytes of bits, each of which it asks for one step ahead.
"""

import triton
import triton.language as tl


@triton.jit
def octets_at(index, row, here, first, n, octets, RAGGED: tl.constexpr, OCTETS: tl.constexpr):
    """(OCTETS, R) of bits, int32, from byte `first` of each row on. row: (R,); here: which of them exist."""
    octet = first + tl.arange(0, OCTETS)
    inside = (octet < octets)[:, None] & here[None, :]
    bits = tl.load(index + row.to(tl.int64)[None, :] * octets + octet[:, None], mask=inside, other=0).to(tl.int32)
    if RAGGED:  # what pads the last byte of a row counts for nothing
        left = tl.minimum(tl.maximum(n - octet * 8, 0), 8)
        bits = bits & ((1 << left) - 1)[:, None]
    return bits


@triton.jit
def spread(bits, begin, values, R: tl.constexpr, OCTETS: tl.constexpr):
    """Entries of Sᵀ where `bits` are set, zeros elsewhere: (8 * OCTETS, R); and where each row's values go on.

    begin: (R,), where they go on so far.
    """
    # Eight bits to eight hexadecimal digits, 0 or 1; times 0x11111111, digit j counts those set among bits 0 to j.
    digits = (bits | (bits << 12)) & 0x000F000F
    digits = (digits | (digits << 6)) & 0x03030303
    digits = (digits | (digits << 3)) & 0x11111111
    running = digits * 0x11111111
    count = (running >> 28) & 15
    before = begin[None, :] + tl.cumsum(count, 0).to(tl.int32) - count
    bit = tl.arange(0, 8)[None, :, None]
    # Triton gives the lanes of a warp the first axis of scattered loads: 32 bytes of one row, whose values are close.
    offset = before[:, None, :] + (((running - digits)[:, None, :] >> (bit * 4)) & 15)
    entries = tl.load(values + offset, mask=(bits[:, None, :] & (1 << bit)) != 0, other=0.0)
    return tl.reshape(entries, (OCTETS * 8, R)), begin + tl.sum(count, 0)


@triton.jit
def and_low_rank(
    out, U, t, bias, row, here, rank, BIAS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """out (R,), and the rows `row` of U t, with their bias."""
    for k in range(RANKS):
        part = k * RANK + tl.arange(0, RANK)
        there = part < rank
        u = tl.load(U + row[None, :] * rank + part[:, None], mask=there[:, None] & here[None, :], other=0.0)
        out += tl.sum(tl.load(t + part, mask=there, other=0.0).to(tl.float32)[:, None] * u.to(tl.float32), 0)
    if BIAS:
        out += tl.load(bias + row, mask=here, other=0.0).to(tl.float32)
    return out


@triton.jit
def and_low_rank_of_some(
    out, U, t, bias, row, here, slot, used, rank, BIAS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """out (SLOTS, R), and t Uᵀ of these rows of U, with their bias."""
    for k in range(RANKS):
        part = k * RANK + tl.arange(0, RANK)
        there = part < rank
        u = tl.load(U + row[None, :] * rank + part[:, None], mask=there[:, None] & here[None, :], other=0.0)
        inner = tl.load(t + slot[:, None] * rank + part[None, :], mask=used & there[None, :], other=0.0)
        if EXACT:
            u, inner = u.to(tl.float32), inner.to(tl.float32)
        out = tl.dot(inner, u, out, input_precision="ieee")
    if BIAS:
        out += tl.load(bias + row, mask=here, other=0.0).to(tl.float32)[None, :]
    return out


@triton.jit
def one(
    x, values, index, starts, U, t, bias, y, m, n, octets, rank, BIAS: tl.constexpr, RAGGED: tl.constexpr,
    R: tl.constexpr, OCTETS: tl.constexpr, BLOCKS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """y for one row of x; t is V x, and goes in RANKS steps of RANK entries."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    here = row < m
    begin = tl.load(starts + row, mask=here, other=0)
    total = tl.zeros((OCTETS * 8, R), tl.float32)
    bits = octets_at(index, row, here, 0, n, octets, RAGGED, OCTETS)
    for block in range(BLOCKS):
        following = octets_at(index, row, here, (block + 1) * OCTETS, n, octets, RAGGED, OCTETS)
        S, begin = spread(bits, begin, values, R, OCTETS)
        column = block * OCTETS * 8 + tl.arange(0, OCTETS * 8)
        total += tl.load(x + column, mask=column < n, other=0.0).to(tl.float32)[:, None] * S.to(tl.float32)
        bits = following
    out = tl.sum(total, 0)
    out = and_low_rank(out, U, t, bias, row, here, rank, BIAS, RANK, RANKS)
    tl.store(y + row, out.to(y.dtype.element_ty), mask=here)


@triton.jit
def some(
    x, values, index, starts, U, t, bias, y, m, n, octets, rank, rows, BIAS: tl.constexpr, RAGGED: tl.constexpr,
    R: tl.constexpr, OCTETS: tl.constexpr, BLOCKS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    SLOTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y for up to SLOTS rows of x, multiplied on tensor cores unless EXACT; t is x Vᵀ."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    here = row < m
    slot = tl.arange(0, SLOTS)
    used = (slot < rows)[:, None]
    begin = tl.load(starts + row, mask=here, other=0)
    out = tl.zeros((SLOTS, R), tl.float32)
    bits = octets_at(index, row, here, 0, n, octets, RAGGED, OCTETS)
    for block in range(BLOCKS):
        following = octets_at(index, row, here, (block + 1) * OCTETS, n, octets, RAGGED, OCTETS)
        S, begin = spread(bits, begin, values, R, OCTETS)
        column = (block * OCTETS * 8 + tl.arange(0, OCTETS * 8))[None, :]
        part_of_x = tl.load(x + slot[:, None] * n + column, mask=used & (column < n), other=0.0)
        if EXACT:
            S, part_of_x = S.to(tl.float32), part_of_x.to(tl.float32)
        out = tl.dot(part_of_x, S, out, input_precision="ieee")
        bits = following
    out = and_low_rank_of_some(out, U, t, bias, row, here, slot, used, rank, BIAS, RANK, RANKS, EXACT)
    tl.store(y + slot[:, None] * m + row[None, :], out.to(y.dtype.element_ty), mask=used & here[None, :])


@triton.jit
def expand(
    values, index, starts, S, start, stop, n, octets, RAGGED: tl.constexpr, R: tl.constexpr, OCTETS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Rows `start` to `stop` of S, dense."""
    row = start + tl.program_id(0) * R + tl.arange(0, R)
    here = row < stop
    begin = tl.load(starts + row, mask=here, other=0)
    to = S + (row - start).to(tl.int64)[None, :] * n
    bits = octets_at(index, row, here, 0, n, octets, RAGGED, OCTETS)
    for block in range(BLOCKS):
        following = octets_at(index, row, here, (block + 1) * OCTETS, n, octets, RAGGED, OCTETS)
        tile, begin = spread(bits, begin, values, R, OCTETS)
        column = (block * OCTETS * 8 + tl.arange(0, OCTETS * 8))[:, None]
        tl.store(to + column, tile, mask=(column < n) & here[None, :])
        bits = following
