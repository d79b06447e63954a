"""Codes that a pattern leaves zero, whole rows and columns or all but N of every M, <-> a stream of the others.

What is left is a smaller matrix, and beside it is written which entries they are (docs/format.md). Codes without such a
pattern are a stream by themselves. This file is shipped inside checkpoints and may import nothing but torch.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .streams import Contexts, checksum, sealed
from .streams import decode as decode_stream
from .streams import encode as encode_stream

HEADER = struct.Struct("<BBBBIIII")
FORMAT = 2
"""In place of the format of a stream."""
ROWS, COLUMNS = 1, 2
MOST_IN_GROUP = 16
ONE_DIGIT = 256
"""Most ways to choose N of M that one number says; others take two."""


@dataclass(frozen=True)
class Kept:
    """How codes were written of which some are left out. codes: of those that are kept. rows, columns: whether lines of
    nothing but zeros are left out. group: (N, M), where of every M codes of a row N are kept; places: of the numbers
    that say which."""

    codes: Contexts
    rows: bool = False
    columns: bool = False
    group: tuple[int, int] | None = None
    places: Contexts | None = None


# --- decode ---------------------------------------------------------------------------------------


def decode(blob: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Contexts | Kept]:
    """The codes, (m, n) in the narrowest of int8, int16 and int32, and how they were written.

    blob: uint8, on any device. ValueError says in a few words what is wrong with it.
    """
    if blob.dtype != torch.uint8 or blob.dim() != 1 or not blob.numel() or int(blob[0]) != FORMAT:
        return decode_stream(blob, shape)
    _require(blob.numel() >= HEADER.size, "codes are cut short")
    head = bytes(blob[: HEADER.size].tolist())
    _, lines, keep, group, m, n, size, crc = HEADER.unpack(head)
    _require((m, n) == tuple(shape), f"codes of a layer of {m} x {n}")
    _require(checksum(blob.cpu().contiguous(), HEADER.size) == crc, "codes have another checksum")
    rest = blob[HEADER.size :]
    if group:
        _require(not lines and 0 < keep < group <= MOST_IN_GROUP and n % group == 0, "groups of codes are none")
        _require(size <= rest.numel(), "codes are cut short")
        numbers, places = decode_stream(rest[:size], (m, n // group * _digits(keep, group)))
        mask = _group_mask(numbers, keep, group)
        found, codes = decode_stream(rest[size:], (m, n // group * keep))
        return _spread(found, mask), Kept(codes, group=(keep, group), places=places)
    _require(0 < lines <= ROWS | COLUMNS and not keep and not size, "rows and columns of codes are none")
    rows, rest = _line(rest, m, bool(lines & ROWS))
    columns, rest = _line(rest, n, bool(lines & COLUMNS))
    found, codes = decode_stream(rest, (int(rows.sum()), int(columns.sum())))
    return _spread(found, rows[:, None] & columns), Kept(codes, bool(lines & ROWS), bool(lines & COLUMNS))


def _line(blob: Tensor, size: int, stored: bool) -> tuple[Tensor, Tensor]:
    """Which of `size` rows or columns are kept, bool, and what follows."""
    if not stored:
        return torch.ones(size, dtype=torch.bool, device=blob.device), blob
    length = -(-size // 8)
    _require(length <= blob.numel(), "codes are cut short")
    bits = ((blob[:length, None] >> torch.arange(8, device=blob.device)) & 1).view(-1).bool()
    _require(not bool(bits[size:].any()), "bits are set past the last row or column")
    kept = bits[:size]
    _require(bool(kept.any()), "no row or column of codes is kept")
    return kept, blob[length:]


def _spread(kept: Tensor, mask: Tensor) -> Tensor:
    """The codes, whose `kept` ones lie where `mask` says, in row-major order."""
    return torch.zeros(mask.shape, dtype=kept.dtype, device=kept.device).masked_scatter_(mask, kept)


# --- encode ---------------------------------------------------------------------------------------


def encode(codes: Tensor, how: Contexts | Kept) -> Tensor:
    """The stream, uint8 on the CPU, of codes (m, n) of any whole dtype that fit into 32 bits.

    ValueError if there are others than zero among those that are left out.
    """
    if isinstance(how, Contexts):
        return encode_stream(codes, how)
    codes = codes.cpu()
    if how.group is not None:
        assert how.places is not None, "groups have places"
        kept, numbers = groups(codes, *how.group)
        places = encode_stream(numbers, how.places)
        parts, lines, size = [places], 0, places.numel()
    else:
        kept, rows, columns = lines_of(codes, how.rows, how.columns)
        parts = [_packed(rows)] * how.rows + [_packed(columns)] * how.columns
        lines, size = how.rows * ROWS | how.columns * COLUMNS, 0
    body = torch.cat([*parts, encode_stream(kept, how.codes)])
    fields = (FORMAT, lines, *(how.group or (0, 0)), *codes.shape, size)
    return sealed(HEADER.pack(*fields, 0), body)


def lines_of(codes: Tensor, rows: bool, columns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The codes without rows, and without columns, of nothing but zeros; which rows and which columns they are, bool.
    ValueError if nothing is left."""
    kept_rows = codes.any(1) if rows else torch.ones(len(codes), dtype=torch.bool)
    kept_columns = codes.any(0) if columns else torch.ones(codes.shape[1], dtype=torch.bool)
    _require(bool(kept_rows.any() and kept_columns.any()), "no row or column of codes is kept")
    return codes[kept_rows][:, kept_columns].contiguous(), kept_rows, kept_columns


def groups(codes: Tensor, keep: int, group: int) -> tuple[Tensor, Tensor]:
    """The `keep` codes of every `group` that are not zero, or else the first zeros, in their order; and which they are:
    a number a group, or two, around zero. ValueError where more are not zero."""
    m, n = codes.shape
    bits = codes.ne(0).view(m, n // group, group).int() << torch.arange(group, dtype=torch.int32)
    number = _numbers(keep, group)[bits.sum(2)]
    _require(bool((number >= 0).all()), f"more than {keep} of {group} codes are not zero")
    mask = _masks(keep, group)[number].view(m, n)
    return codes[mask].view(m, n // group * keep), _told(number, keep, group)


def _packed(bits: Tensor) -> Tensor:
    """Eight a byte, the lowest bit first."""
    octets = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    return (octets << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


# --- which of a group -------------------------------------------------------------------------------


def _digits(keep: int, group: int) -> int:
    """Numbers that say which are kept of one group."""
    return 1 if math.comb(group, keep) <= ONE_DIGIT else 2


def _base(keep: int, group: int) -> int:
    """How many values each of these numbers has, the first of two perhaps fewer."""
    choices = math.comb(group, keep)
    return choices if choices <= ONE_DIGIT else math.isqrt(choices - 1) + 1


def _told(number: Tensor, keep: int, group: int) -> Tensor:
    """The choice of each group (m, groups) as numbers around zero, (m, groups * digits)."""
    base = _base(keep, group)
    digits = number[..., None] if _digits(keep, group) == 1 else torch.stack((number // base, number % base), -1)
    return (digits - base // 2).flatten(1)


def _group_mask(told: Tensor, keep: int, group: int) -> Tensor:
    """Where codes were kept, bool, (m, n), from what `_told` made."""
    base, m = _base(keep, group), len(told)
    digits = told.long().view(m, -1, _digits(keep, group)) + base // 2
    _require(bool(((digits >= 0) & (digits < base)).all()), "a group keeps codes in no known places")
    number = digits[..., 0] if digits.shape[-1] == 1 else digits[..., 0] * base + digits[..., 1]
    masks = _masks(keep, group).to(told.device)
    _require(int(number.max()) < len(masks), "a group keeps codes in no known places")
    return masks[number].view(m, -1)


@cache
def _masks(keep: int, group: int) -> Tensor:
    """(choices, group), bool: which are kept; in rising order as whole numbers whose lowest bit is the first."""
    every = torch.arange(1 << group)[:, None] >> torch.arange(group) & 1
    return every[every.sum(1) == keep].bool()


@cache
def _numbers(keep: int, group: int) -> Tensor:
    """(2 ** group,), int64: of codes that are other than zero where these bits say the number of the choice that keeps
    them, and the first zeros beside them; -1 where they are too many."""
    bits = (torch.arange(1 << group)[:, None] >> torch.arange(group) & 1).bool()
    missing = keep - bits.sum(1, keepdim=True)
    kept = bits | (~bits & ((~bits).cumsum(1) <= missing))
    whole = (kept << torch.arange(group)).sum(1)
    choices = (_masks(keep, group) << torch.arange(group)).sum(1)
    return torch.where(missing[:, 0] >= 0, torch.searchsorted(choices, whole), -1)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
