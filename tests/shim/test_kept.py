"""Codes without what a pattern leaves zero: every pattern comes back, and damage is always found."""

from __future__ import annotations

import math
import random
import zlib
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from losparse_cli import kernels
from losparse_cli.checkpoint.codes import fit_contexts
from losparse_cli.shim import kept
from losparse_cli.shim.kept import HEADER, Kept, decode, encode, groups, lines_of

GROUPS = [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (5, 11), (8, 16), (15, 16), (1, 16)]


def gaussian(shape: tuple[int, int], seed: int = 0, scale: float = 3.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).round().int()


def in_groups(shape: tuple[int, int], keep: int, group: int, seed: int = 0) -> Tensor:
    codes = gaussian(shape, seed)
    order = torch.rand(shape[0], shape[1] // group, group, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return codes * (order.argsort(-1) < keep).view(shape)


def of_groups(codes: Tensor, keep: int, group: int) -> Kept:
    values, numbers = groups(codes, keep, group)
    return Kept(fit_contexts(values), group=(keep, group), places=fit_contexts(numbers))


def of_lines(codes: Tensor, rows: bool, columns: bool) -> Kept:
    return Kept(fit_contexts(lines_of(codes, rows, columns)[0]), rows, columns)


@pytest.mark.parametrize(("keep", "group"), GROUPS)
def test_groups_come_back(keep: int, group: int) -> None:
    codes = in_groups((13, 6 * group), keep, group)
    how = of_groups(codes, keep, group)
    blob = encode(codes, how)
    found, read = decode(blob, tuple(codes.shape))
    assert torch.equal(found.int(), codes)
    assert isinstance(read, Kept)
    assert read.group == (keep, group)
    assert torch.equal(encode(found, read), blob)


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(0, 3), st.integers(0, 2**31))
def test_rows_and_columns_come_back(shape: tuple[int, int], lines: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    codes = gaussian(shape, seed, 2.0 + 300 * (seed % 7 == 0))
    codes *= (torch.rand(shape[0], 1, generator=chance) < 0.6) * (torch.rand(1, shape[1], generator=chance) < 0.6)
    if not bool(codes.any()):
        with pytest.raises(ValueError, match="no row or column"):
            lines_of(codes, True, True)
        return
    rows, columns = bool(lines & 1), bool(lines & 2)
    how: Any = of_lines(codes, rows, columns) if lines else fit_contexts(codes)
    blob = encode(codes, how)
    found, read = decode(blob, shape)
    assert torch.equal(found.int(), codes)
    assert torch.equal(encode(found, read), blob)


@pytest.mark.parametrize(("keep", "group"), GROUPS)
def test_every_choice_has_a_number(keep: int, group: int) -> None:
    masks, numbers = kept._masks(keep, group), kept._numbers(keep, group)
    assert len(masks) == math.comb(group, keep)
    weights = 1 << torch.arange(group)
    assert numbers[(masks * weights).sum(1)].tolist() == list(range(len(masks)))
    for few in (0, 1, keep):  # what is missing are the first zeros
        where = next(iter(combinations(range(group - 1, -1, -1), few)), ())
        full = {*where, *[k for k in range(group) if k not in where][: keep - few]}
        assert set(masks[numbers[sum(1 << k for k in where)]].nonzero().view(-1).tolist()) == full
    assert int(numbers[-1]) == -1
    told = kept._told(torch.arange(len(masks)).view(1, -1), keep, group)
    assert torch.equal(kept._group_mask(told, keep, group).view(-1, group), masks)


def test_more_than_a_group_keeps_is_refused() -> None:
    codes = torch.tensor([[1, 2, 3, 0]])
    with pytest.raises(ValueError, match="more than 2 of 4 codes are not zero"):
        groups(codes, 2, 4)


def test_the_places_of_2_of_4_cost_their_entropy() -> None:
    codes = in_groups((256, 512), 2, 4)
    blob = encode(codes, of_groups(codes, 2, 4))
    size = HEADER.unpack(bytes(blob[: HEADER.size].tolist()))[6]
    assert 8 * size < 1.005 * 256 * 128 * math.log2(6)
    assert blob.numel() < 0.98 * encode(codes, fit_contexts(codes)).numel()


# --- damage ---------------------------------------------------------------------------------------


def sealed(blob: bytes) -> bytes:
    """The same with a checksum that fits."""
    if len(blob) < HEADER.size:
        return blob
    crc = zlib.crc32(blob[: HEADER.size - 4] + blob[HEADER.size :])
    return blob[: HEADER.size - 4] + crc.to_bytes(4, "little") + blob[HEADER.size :]


def samples() -> list[tuple[Tensor, bytes]]:
    two, big = in_groups((7, 12), 2, 4), in_groups((3, 32), 8, 16)
    lines = gaussian((11, 9)) * (torch.arange(11)[:, None] % 3 > 0) * (torch.arange(9) % 2 > 0)
    made = [
        (two, of_groups(two, 2, 4)),
        (big, of_groups(big, 8, 16)),
        *((lines, of_lines(lines, rows, columns)) for rows, columns in ((True, False), (False, True), (True, True))),
    ]
    return [(codes, bytes(encode(codes, how).tolist())) for codes, how in made]


def test_each_byte_counts() -> None:
    for codes, blob in samples():
        for at in range(len(blob)):
            changed = bytearray(blob)
            changed[at] ^= 1 << at % 8
            with pytest.raises(ValueError, match=r"codes|row|group"):
                decode(torch.tensor(list(changed), dtype=torch.uint8), tuple(codes.shape))
        for end in range(len(blob)):
            with pytest.raises(ValueError, match=r"."):
                decode(torch.tensor(list(sealed(blob[:end])), dtype=torch.uint8), tuple(codes.shape))
        with pytest.raises(ValueError, match="codes of a layer of"):
            decode(torch.tensor(list(blob), dtype=torch.uint8), (codes.shape[1], codes.shape[0]))


@pytest.mark.parametrize("native", [False, True])
def test_damage_under_a_checksum_that_fits_is_found(native: bool) -> None:
    if native:
        kernels.install()
    chance, known = random.Random(3), samples()
    for _ in range(400):
        codes, blob = chance.choice(known)
        changed = bytearray(blob)
        for _ in range(chance.choice((1, 1, 2, 4))):
            at = chance.randrange(min(len(changed), HEADER.size + 12) if chance.random() < 0.6 else len(changed))
            changed[at] = chance.choice((0, 1, 2, 255, changed[at] ^ 1 << chance.randrange(8)))
        try:
            found, how = decode(torch.tensor(list(sealed(bytes(changed))), dtype=torch.uint8), tuple(codes.shape))
        except ValueError:
            continue
        assert found.shape == codes.shape
        assert torch.equal(decode(encode(found, how), tuple(codes.shape))[0], found)


def test_a_stream_may_lie_anywhere_in_memory() -> None:
    for codes, blob in samples():
        for skip in (1, 2, 3):
            line = torch.tensor([0] * skip + list(blob), dtype=torch.uint8)[skip:]
            assert torch.equal(decode(line, tuple(codes.shape))[0].int(), codes)
