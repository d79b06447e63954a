"""Whole numbers of a layer, the codes q (m, n), <-> one tensor of bytes: `S_codes` (docs/format.md).

Asymmetric numeral systems in the range form (Duda, arXiv:1311.2540), many states at once (Giesen, arXiv:1402.3392): a
lane is some whole rows with a state of its own, a chunk is 32 lanes that share a stream of 16-bit words. How often
which number comes is said by a table for each sum of a row's and a column's class. This file is shipped inside
checkpoints and may import nothing but torch.
"""

from __future__ import annotations

import ctypes
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .installed import kernels
from .tables import MOST_TABLES, SHAPES, TOTAL, TOTAL_BITS, Table, read_tables, table, within, write_tables

HEADER = struct.Struct("<BBbBBBHIIIII")
FORMAT = 1
STORED = 255
"""In place of a shape: the tables are stored."""
LANES = 32
"""In a chunk."""
LOWEST = 1 << 16
"""Of a state; each begins here where it is written, and ends here where it is read."""
MOST_IN_LANE = 1 << 16
"""Entries, unless a row alone has more."""
WIDTHS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
ESCAPED = -(1 << 15)
BATCH = 1 << 24  # entries that plain torch holds at a time
AT_ONCE = 1 << 24  # entries that are encoded at a time
BLOCK_ROWS = 256
LOOKS = 64  # steps between two looks at whether the words are used up


@dataclass(frozen=True)
class Contexts:
    """What the frequencies of each entry are: those of table t, the sum of its row's and its column's class.

    rows: (m,), columns: (n,), uint8 classes of 0..15. Table t has scale base + unit * t, or the nearest there is, and
    the shape of that number in SHAPES, or it is tables[t], where there are any; base, unit and shape are 0 then.
    lane_rows: rows of a lane.
    """

    rows: Tensor
    columns: Tensor
    lane_rows: int
    base: int = 0
    unit: int = 0
    shape: int = 0
    tables: tuple[Table, ...] = ()

    def every_table(self) -> tuple[Table, ...]:
        """As many as there are sums of classes."""
        if self.tables:
            return self.tables
        count = int(self.rows.max()) + int(self.columns.max()) + 1
        return tuple(table(within(self.base + self.unit * t), self.shape) for t in range(count))

    def header_bytes(self) -> int:
        """Bytes of a stream that do not depend on the codes: all but words and escapes."""
        lanes = -(-self.rows.numel() // self.lane_rows)
        classes = sum(-(-_bits(x) * x.numel() // 8) for x in (self.rows, self.columns))
        tables = len(write_tables(self.tables)) if self.tables else 0
        return HEADER.size + classes + tables + 4 * -(-lanes // LANES) + 4 * lanes


@dataclass(frozen=True)
class Parts:
    """A stream taken apart: counts (chunks,) int32 of words; states (lanes,) int32, as bits; words: uint8,
    two bytes each, which are not copied from where they lie; escapes: int32; width: bytes of a code."""

    counts: Tensor
    states: Tensor
    words: Tensor
    escapes: Tensor
    width: int


# --- decode ---------------------------------------------------------------------------------------


def decode(blob: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Contexts]:
    """The codes, (m, n) in the narrowest of int8, int16 and int32, and how they were written.

    blob: uint8, on any device. ValueError says in a few words what is wrong with it.
    """
    contexts, parts = _taken_apart(blob, shape)
    codes = kernels().codes(contexts, parts)
    return (_decode(contexts, parts) if codes is None else codes), contexts


def _taken_apart(blob: Tensor, shape: tuple[int, int]) -> tuple[Contexts, Parts]:
    _require(blob.dtype == torch.uint8 and blob.dim() == 1, "codes are not a line of bytes")
    _require(blob.numel() >= HEADER.size, "codes are cut short")
    whole = blob.cpu().contiguous()
    head = bytes(whole[: HEADER.size].tolist())
    version, kind, base, unit, bits, widths, lane_rows, m, n, escapes, table_bytes, crc = HEADER.unpack(head)
    _require(version == FORMAT, f"codes of format {version}")
    _require((m, n) == tuple(shape), f"codes of a layer of {m} x {n}")
    _require(checksum(whole, HEADER.size) == crc, "codes have another checksum")
    row_bits, column_bits, width, escape_width = bits & 15, bits >> 4, widths & 15, widths >> 4
    _require(row_bits <= 4 and column_bits <= 4, "classes have too many bits")
    _require(width in WIDTHS and escape_width in WIDTHS, "widths of codes are none")
    _require(lane_rows >= 1 and (lane_rows == 1 or lane_rows * n <= MOST_IN_LANE), "lanes are too long")
    lanes = -(-m // lane_rows)
    chunks = -(-lanes // LANES)
    sizes = [HEADER.size, -(-m * row_bits // 8), -(-n * column_bits // 8), table_bytes, 4 * chunks, 4 * lanes]
    _require(sum(sizes) <= blob.numel(), "codes are cut short")
    _, row_part, column_part, table_part, count_part, state_part, rest = torch.split(
        whole, [*sizes, blob.numel() - sum(sizes)]
    )
    rows, columns = _unpack(row_part, row_bits, m), _unpack(column_part, column_bits, n)
    last = int(rows.max()) + int(columns.max())
    if kind == STORED:
        _require(base == unit == 0, "stored tables have a scale")
        tables = read_tables(bytes(table_part.tolist()))
        _require(last < len(tables), "a class has no table")
        contexts = Contexts(rows, columns, lane_rows, tables=tables)
    else:
        _require(kind < len(SHAPES) and table_bytes == 0, "tables have no known shape")
        _require(1 <= unit <= 8, "the unit of scales is out of range")
        contexts = Contexts(rows, columns, lane_rows, base, unit, kind)
    counts = count_part.clone().view(torch.int32)
    words = int((counts.long() & 0xFFFFFFFF).sum())
    _require(2 * words + escapes * escape_width == rest.numel(), "counts of words and escapes do not add up")
    parts = Parts(
        counts,
        state_part.clone().view(torch.int32),
        rest[: 2 * words],
        rest[2 * words :].clone().view(WIDTHS[escape_width]).int(),
        width,
    )
    return contexts, _moved(parts, blob.device)


def _moved(parts: Parts, device: torch.device) -> Parts:
    counts, states, words, escapes = (x.to(device) for x in (parts.counts, parts.states, parts.words, parts.escapes))
    return Parts(counts, states, words, escapes, parts.width)


def _decode(contexts: Contexts, parts: Parts) -> Tensor:
    """In plain torch: a step reads an entry of every lane."""
    m, n, device = contexts.rows.numel(), contexts.columns.numel(), parts.words.device
    lookup = _decoding(contexts.every_table()).to(device)
    lookups = [lookup[k * TOTAL :] for k in range(16)]
    classes, entries = contexts.columns.tolist(), contexts.lane_rows * n
    counts = parts.counts.long() & 0xFFFFFFFF
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    words = torch.nn.functional.pad(
        parts.words.clone().view(torch.int16).long() & 0xFFFF, (1, LOOKS * LANES)
    )  # numbered from 1
    codes = torch.empty(m, n, dtype=torch.int16, device=device)
    for first, last in _batches(contexts):
        rows = _row_offsets(contexts, first, last).to(device).unbind()
        x = torch.full((LANES * (last - first),), LOWEST, dtype=torch.int64, device=device)
        states = parts.states[LANES * first : LANES * last].long() & 0xFFFFFFFF
        _require(bool((states >= LOWEST).all()), "a state is too small")
        x[: len(states)] = states
        read, stop = starts[first:last, None], starts[first + 1 : last + 1, None]
        found = torch.empty(entries, len(x), dtype=torch.int16, device=device)
        place, e, f, ahead = (torch.empty_like(x) for _ in range(4))
        low = torch.empty_like(x, dtype=torch.bool)
        low_by_chunk = low.view(-1, LANES)
        ranks = [(r, r.view(-1), r[:, -1:]) for r in (torch.empty_like(x).view(-1, LANES) for _ in range(2))]
        for step, line in enumerate(found):
            row, column = divmod(step, n)
            torch.bitwise_and(x, TOTAL - 1, out=place)
            place += rows[row]
            torch.index_select(lookups[classes[column]], 0, place, out=e)
            line.copy_(e)  # its lowest 16 bits
            torch.bitwise_right_shift(e, 16, out=f)
            f &= 0x1FFF
            x >>= TOTAL_BITS
            x *= f
            x += e.bitwise_right_shift_(32)
            torch.lt(x, LOWEST, out=low)
            rank, rank_of_lane, after = ranks[step % 2]
            torch.cumsum(low_by_chunk, 1, out=rank)
            rank += read
            read = after
            torch.index_select(words, 0, rank_of_lane, out=ahead)
            ahead |= torch.bitwise_left_shift(x, 16, out=f)
            x = torch.where(low, ahead, x)
            if step % LOOKS == LOOKS - 1:
                _require(bool((read <= stop).all()), "words are used up too early")
        _require(bool((read == stop).all()), "words are not used up exactly")
        _require(bool((x == LOWEST).all()), "a state does not end where it began")
        begin = LANES * first * contexts.lane_rows
        part = codes[begin : LANES * last * contexts.lane_rows]
        part.copy_(found.T.reshape(-1, n)[: len(part)])
    return _with_escapes(codes, parts)


def _with_escapes(codes: Tensor, parts: Parts) -> Tensor:
    escaped = codes == ESCAPED
    found = int(torch.count_nonzero(escaped))
    _require(found == parts.escapes.numel(), f"{found} escapes, and {parts.escapes.numel()} are stored")
    if found:
        codes = codes.int().masked_scatter(escaped, parts.escapes)
    _require(width_of(codes) == parts.width, "codes have another width than is said")
    return codes.to(WIDTHS[parts.width])


def _decoding(tables: tuple[Table, ...]) -> Tensor:
    """Of each table and each place of 4096: its start's distance << 32, frequency << 16 and the code's 16 bits.

    Lanes without rows look beyond the tables, where every state stays as it is.
    """
    found = []
    for frequencies in tables:
        K = len(frequencies) // 2
        counts = torch.tensor([*frequencies, TOTAL - sum(frequencies)])
        codes = torch.cat((torch.arange(-K, K + 1), torch.tensor([ESCAPED]))) & 0xFFFF
        distance = torch.arange(TOTAL) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        found.append(torch.repeat_interleave(counts << 16 | codes, counts) | distance << 32)
    still = torch.arange(TOTAL) << 32 | TOTAL << 16
    return torch.cat((*found, *[still] * (MOST_TABLES + 16 - len(found))))


def _batches(contexts: Contexts) -> Iterator[tuple[int, int]]:
    """Runs of chunks, (first, last), that plain torch holds at a time."""
    lanes = -(-contexts.rows.numel() // contexts.lane_rows)
    chunks = -(-lanes // LANES)
    step = max(1, BATCH // (LANES * contexts.lane_rows * contexts.columns.numel()))
    for first in range(0, chunks, step):
        yield first, min(first + step, chunks)


def _row_offsets(contexts: Contexts, first: int, last: int) -> Tensor:
    """Where the tables of each lane's rows start by its class alone: (lane_rows, lanes)."""
    per_lane = contexts.lane_rows
    rows = contexts.rows[LANES * first * per_lane : LANES * last * per_lane].long()
    missing = LANES * (last - first) * per_lane - rows.numel()
    rows = torch.nn.functional.pad(rows, (0, missing), value=MOST_TABLES)
    return (rows.view(-1, per_lane).T * TOTAL).contiguous()


# --- encode ---------------------------------------------------------------------------------------


def encode(codes: Tensor, contexts: Contexts) -> Tensor:
    """The stream, uint8 on the CPU, of codes (m, n) of any whole dtype that fit into 32 bits."""
    codes = codes.cpu()
    m, n = codes.shape
    chunk = LANES * contexts.lane_rows  # rows; chunks know nothing of each other
    step = chunk * max(1, AT_ONCE // (chunk * n))
    found = []
    for begin in range(0, m, step):
        part = codes[begin : begin + step].int().contiguous()
        of_part = replace(contexts, rows=contexts.rows[begin : begin + step])
        found.append(kernels().coded(part, of_part) or _encode(part, of_part))
    return _put_together(contexts, _joined(found))


def _joined(parts: Sequence[Parts]) -> Parts:
    """Of chunks that follow each other."""
    if len(parts) == 1:
        return parts[0]
    counts, states, words, escapes = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("counts", "states", "words", "escapes")
    )
    return Parts(counts, states, words, escapes, max(part.width for part in parts))


def _put_together(contexts: Contexts, parts: Parts) -> Tensor:
    m, n = contexts.rows.numel(), contexts.columns.numel()
    escape_width = width_of(parts.escapes)
    stored = write_tables(contexts.tables) if contexts.tables else b""
    body = torch.cat(
        [
            *(_pack(x, _bits(x)) for x in (contexts.rows, contexts.columns)),
            torch.tensor(list(stored), dtype=torch.uint8),
            parts.counts.view(torch.uint8),
            parts.states.view(torch.uint8),
            parts.words,
            parts.escapes.to(WIDTHS[escape_width]).view(torch.uint8),
        ]
    )
    fields = (
        FORMAT,
        STORED if contexts.tables else contexts.shape,
        contexts.base,
        contexts.unit,
        _bits(contexts.rows) | _bits(contexts.columns) << 4,
        parts.width | escape_width << 4,
        contexts.lane_rows,
        m,
        n,
        parts.escapes.numel(),
        len(stored),
    )
    return sealed(HEADER.pack(*fields, 0), body)


def _encode(codes: Tensor, contexts: Contexts) -> Parts:
    """In plain torch: the steps of `_decode`, backwards."""
    n, entries = contexts.columns.numel(), contexts.lane_rows * contexts.columns.numel()
    lookup, widest = _encoding(contexts.every_table())
    size = 2 * widest + 2
    places = _places(codes, widest)
    counts: list[Tensor] = []
    found: list[Tensor] = []
    words: list[Tensor] = []
    for first, last in _batches(contexts):
        begin, end = (LANES * contexts.lane_rows * k for k in (first, last))
        part = places[begin:end]
        part = torch.nn.functional.pad(part, (0, 0, 0, end - begin - len(part)))
        columns = part.reshape(-1, entries).T.contiguous()
        rows = _row_offsets(contexts, first, last) // TOTAL * size
        classes = contexts.columns.tolist()
        x = torch.full((LANES * (last - first),), LOWEST, dtype=torch.int64)
        word = torch.empty(entries, len(x), dtype=torch.int16)
        written = torch.empty(entries, len(x), dtype=torch.bool)
        for step in range(entries - 1, -1, -1):
            e = lookup[classes[step % n] * size :].index_select(0, columns[step] + rows[step // n])
            f = e & 0x1FFF
            full = x >= f << 20
            written[step] = full
            word[step].copy_(x)
            x = torch.where(full, x >> 16, x)
            x += torch.div(x, f, rounding_mode="floor") * (TOTAL - f)
            x += e >> 16
        by_chunk = written.view(entries, -1, LANES).transpose(0, 1)
        counts.append(by_chunk.sum((1, 2)))
        words.append(word.view(entries, -1, LANES).transpose(0, 1)[by_chunk])
        found.append(x)
    lanes = -(-codes.shape[0] // contexts.lane_rows)
    states = torch.cat(found)[:lanes].int()
    return Parts(
        torch.cat(counts).int(), states, torch.cat(words).view(torch.uint8), _escapes(codes, contexts), width_of(codes)
    )


def _escapes(codes: Tensor, contexts: Contexts) -> Tensor:
    """The codes (m, n; int32) that have no frequency in their tables, in row-major order."""
    tables = contexts.every_table()
    lookup, widest = _encoding(tables)
    size, found = 2 * widest + 2, []
    for begin in range(0, len(codes), BLOCK_ROWS):
        part, rows = (x[begin : begin + BLOCK_ROWS] for x in (codes, contexts.rows.long()))
        start = (rows[:, None] + contexts.columns.long()) * size
        found.append(part[lookup[start + _places(part, widest)] == lookup[start + size - 1]])
    return torch.cat(found)


def _places(codes: Tensor, widest: int) -> Tensor:
    """Of each code, int64: where its mark lies among those of a table."""
    return torch.where((codes < -widest) | (codes > widest), 2 * widest + 1, codes.long() + widest)


def _encoding(tables: tuple[Table, ...]) -> tuple[Tensor, int]:
    """Of each table and each code of -K..K and the escape, K the largest of all: start << 16 | frequency; and K. As in
    `_decoding`, every state stays as it is beyond the tables."""
    widest = max(len(frequencies) // 2 for frequencies in tables)
    found = torch.full((MOST_TABLES + 16, 2 * widest + 2), TOTAL)
    for row, frequencies in zip(found, tables, strict=False):
        K = len(frequencies) // 2
        counts = torch.tensor([*frequencies, TOTAL - sum(frequencies)])
        packed = (counts.cumsum(0) - counts) << 16 | counts
        row[:] = packed[-1]
        row[widest - K : widest + K + 1] = torch.where(counts[:-1] > 0, packed[:-1], packed[-1])
    return found.view(-1), widest


# --- shared ---------------------------------------------------------------------------------------


def width_of(codes: Tensor) -> int:
    """Bytes of the narrowest dtype that holds these."""
    low, high = (int(x) for x in torch.aminmax(codes)) if codes.numel() else (0, 0)
    return 1 if low >= -128 and high < 128 else 2 if low >= -(1 << 15) and high < 1 << 15 else 4


def _bits(classes: Tensor) -> int:
    return int(classes.max()).bit_length()


def _pack(classes: Tensor, bits: int) -> Tensor:
    """`bits` bits of each, lowest first, one after another."""
    line = ((classes.cpu()[:, None] >> torch.arange(bits)) & 1).view(-1).to(torch.uint8)
    octets = torch.nn.functional.pad(line, (0, -line.numel() % 8)).view(-1, 8)
    return (octets << torch.arange(8)).sum(1).to(torch.uint8)


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    line = ((packed[:, None] >> torch.arange(8)) & 1).view(-1)
    _require(not bool(line[count * bits :].any()), "bits are set past the last class")
    classes = (line[: count * bits].view(count, bits) << torch.arange(bits)).sum(1).to(torch.uint8)
    _require(not bits or int(classes.max()).bit_length() == bits, "classes have more bits than they need")
    return classes


def sealed(header: bytes, body: Tensor) -> Tensor:
    """Both as one line of bytes, with their checksum in the last four of the header."""
    blob = torch.cat((torch.tensor(list(header), dtype=torch.uint8), body))
    crc = struct.pack("<I", checksum(blob, len(header)))
    blob[len(header) - 4 : len(header)] = torch.tensor(list(crc), dtype=torch.uint8)
    return blob


def checksum(blob: Tensor, header: int) -> int:
    """CRC-32 of all bytes, contiguous and on the CPU, but the last four of the header, of so many, which hold it."""
    size = blob.numel() - header
    found = zlib.crc32(bytes(blob[: header - 4].tolist()))
    if not size:
        return found
    memory: Any = (ctypes.c_ubyte * size).from_address(blob.data_ptr() + header)
    return zlib.crc32(memory, found)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
