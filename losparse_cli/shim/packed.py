"""Codes as layers compute with them: in as few bits as nearly all of them need, and the others beside.

The form `codes4` holds them in 4 bits each, -8 to 7; there is one for 2 to 8 bits. Its index is one line of bytes:

- Strips of 8 rows, one after another, each of lines of 32 columns; rows and columns that are missing are zeros. A line
  takes 32 bytes a bit: byte l belongs to column l of the line. u = q + 2^(bits - 1) is cut into 4 bits, where there
  are so many, then 2, then 1, the lowest first. Of the 4 bits, two rows share a byte, the even one in its lower half;
  of the 2 bits four rows, of the 1 bit all eight, the first row lowest. With 8 bits a byte is a code, row after row.
- The rest, if any code does not fit: where it begins for each row and ends, int32 (m + 1); its columns, int32; and what
  is to be added to the codes that the strips hold for them, -2^(bits - 1) or 2^(bits - 1) - 1, int32.

This file is shipped inside checkpoints and may import nothing but torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRIP, LINE = 8, 32
FEWEST, MOST = 2, 8
MOST_REST = 0.01
"""Of all codes; more of them would cost more time than the bits they save."""
PARTS = (4, 2, 1)
ENTRIES = 1 << 22  # that plain torch holds at a time


def form_of(bits: int) -> str:
    """The name of the form; of 0 bits that of codes as they are."""
    return f"codes{bits}" if bits else "codes"


def bits_of(form: str) -> int:
    """Of each code in this form, 0 where it is no form of packed codes."""
    return int(form[5:]) if form.startswith("codes") and form[5:].isdigit() else 0


def packed_bytes(shape: tuple[int, int], bits: int, rest: int) -> int:
    """Bytes of the index, of which `rest` codes do not fit."""
    m, n = shape
    return -(-m // STRIP) * -(-n // LINE) * LINE * bits + (4 * (m + 1) + 8 * rest if rest else 0)


def rest_of(index: Tensor, shape: tuple[int, int], bits: int) -> int:
    """How many codes do not fit."""
    beside = index.numel() - packed_bytes(shape, bits, 0)
    return (beside - 4 * (shape[0] + 1)) // 8 if beside else 0


def best_bits(shape: tuple[int, int], counts: list[int], width: int) -> int:
    """In how many bits codes take the fewest bytes; 0 where they stay as they are, `width` bytes each.

    counts: at b how many codes need b bits, 1 to 8; at 0 those that need more. Packed codes multiply several times
    sooner, which is worth a third more bytes: so much do lines that are not full take in a narrow matrix.
    """
    m, n = shape
    best, fewest = 0, 4 * width * m * n // 3 + 1
    for bits in range(FEWEST, MOST + 1):
        rest = unfit(counts, bits)
        size = packed_bytes(shape, bits, rest)
        # A layer as it is would cost its model the decoder that runs a token in one call: then more may be beside.
        most = MOST_REST * (1 if bits < MOST else 5)
        if rest <= most * m * n and size < fewest:
            best, fewest = bits, size
    return best


def unfit(counts: list[int], bits: int) -> int:
    """How many codes need more bits, by such counts."""
    return counts[0] + sum(counts[bits + 1 :])


def unpack(index: Tensor, shape: tuple[int, int], bits: int, rows: Tensor | None = None) -> Tensor:
    """The codes, int32: all, (m, n), or those of the rows numbered in `rows`, in its sizes and n more."""
    m, n = shape
    wanted = torch.arange(m, device=index.device) if rows is None else rows.reshape(-1)
    lines, strips = -(-n // LINE), -(-m // STRIP)
    packed = index[: packed_bytes(shape, bits, 0)].view(strips, lines, bits, LINE)
    count = rest_of(index, shape, bits)
    found = torch.empty(len(wanted), n, dtype=torch.int32, device=index.device)
    for begin in range(0, len(wanted), step := max(1, ENTRIES // (lines * LINE * STRIP))):
        some = wanted[begin : begin + step]
        u = _of_planes(packed[some // STRIP], some % STRIP, bits)
        found[begin : begin + step] = u.reshape(len(some), lines * LINE)[:, :n]
    found -= 1 << (bits - 1)
    if count:
        starts, columns, values = torch.split(
            index[packed_bytes(shape, bits, 0) :].view(torch.int32), [m + 1, count, count]
        )
        sizes = (starts[1:] - starts[:-1])[wanted].long()
        owner = torch.repeat_interleave(torch.arange(len(wanted), device=index.device), sizes)
        before = (sizes.cumsum(0) - sizes)[owner]
        at = starts[wanted].long()[owner] + torch.arange(len(owner), device=index.device) - before
        found.index_put_((owner, columns[at].long()), values[at], accumulate=True)
    return found.view(*(shape if rows is None else (*rows.shape, n)))


def _of_planes(planes: Tensor, row: Tensor, bits: int) -> Tensor:
    """Lines of a strip for each row wanted (rows, lines, bits, 32), and which of its eight -> u, (rows, lines, 32)."""
    each = torch.arange(len(row), device=row.device)
    if bits == MOST:
        return planes[each, :, row].int()
    u = torch.zeros(len(row), planes.shape[1], LINE, dtype=torch.int32, device=planes.device)
    at = low = 0
    for part in PARTS:
        if bits & part:
            together = MOST // part
            shift = (part * (row % together)).int()[:, None, None]
            u |= (planes[each, :, at + row // together].int() >> shift & (1 << part) - 1) << low
            at, low = at + part, low + part
    return u
