"""Codes and their stream: every shape comes back, C and torch agree to the bit, damage is always found."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from losparse_cli import kernels
from losparse_cli.kernels import native
from losparse_cli.shim import installed, streams
from losparse_cli.shim.streams import HEADER, Contexts, decode, encode
from losparse_cli.shim.tables import SHAPES

WAYS = ("torch", *(("C",) if native.library() is not None else ()))


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    yield
    kernels.install()


@contextmanager
def way(name: str) -> Iterator[None]:
    kernels.install()
    if name == "torch":
        installed.install(None)
    yield


def contexts_of(
    shape: tuple[int, int],
    seed: int,
    *,
    lane_rows: int = 1,
    base: int = -10,
    unit: int = 2,
    kind: int = 5,
    top: int = 15,
) -> Contexts:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randint(0, top + 1, (size,), generator=generator, dtype=torch.uint8) for size in shape)
    return Contexts(rows, columns, lane_rows, base, unit, kind)


def codes_of(contexts: Contexts, seed: int) -> Tensor:
    """Gaussian codes of the scales that the contexts name."""
    scales = contexts.base + contexts.unit * (contexts.rows[:, None].float() + contexts.columns.float())
    normal = torch.randn(scales.shape, generator=torch.Generator().manual_seed(seed))
    return (normal * torch.exp2(scales / 8)).round().int()


def same(one: Contexts, other: Contexts) -> bool:
    plain = replace(one, rows=other.rows, columns=other.columns) == other
    return plain and torch.equal(one.rows, other.rows) and torch.equal(one.columns, other.columns)


def check(codes: Tensor, contexts: Contexts) -> Tensor:
    """The stream, after every way to make and to read it was tried."""
    made = []
    for name in WAYS:
        with way(name):
            blob = encode(codes, contexts)
            found, read = decode(blob, tuple(codes.shape))
            assert found.dtype == next(
                t for t in (torch.int8, torch.int16, torch.int32) if torch.equal(codes.to(t), codes)
            )
            assert torch.equal(found, codes.to(found.dtype))
            assert same(read, contexts)
            assert torch.equal(encode(found, read), blob)
            made.append(blob)
    assert all(torch.equal(blob, made[0]) for blob in made)
    return made[0]


@pytest.mark.usefixtures("instructions")
def test_every_instruction_set_writes_and_reads_the_same() -> None:
    """Rows that share lanes, more lanes than are read at once, and codes that escape."""
    for seed, (shape, lane_rows) in enumerate((((70, 333), 1), ((9, 40), 4), ((1, 7), 1))):
        contexts = contexts_of(shape, seed, lane_rows=lane_rows)
        codes = codes_of(contexts, seed)
        codes.view(-1)[5::97] = 70000
        check(codes, contexts)


@given(
    st.tuples(st.integers(1, 90), st.integers(1, 40)),
    st.integers(1, 9),
    st.integers(-48, 20),
    st.integers(1, 2),
    st.integers(0, len(SHAPES) - 1),
    st.integers(0, 15),
    st.integers(0, 2**31),
)
def test_any_shape_comes_back(
    shape: tuple[int, int], lane_rows: int, base: int, unit: int, kind: int, top: int, seed: int
) -> None:
    contexts = contexts_of(shape, seed, lane_rows=lane_rows, base=base, unit=unit, kind=kind, top=top)
    codes = codes_of(contexts, seed)
    if seed % 3 == 0:
        codes.view(-1)[seed % codes.numel()] = seed % 100_003 - 50_000
    check(codes, contexts)


@pytest.mark.parametrize("value", [0, 1, -128, 127, 128, -32768, 32768, 2**31 - 1, -(2**31)])
def test_a_layer_of_one_value(value: int) -> None:
    for shape in ((1, 1), (3, 50), (70, 2)):
        codes = torch.full(shape, value, dtype=torch.int32)
        check(codes, contexts_of(shape, 0, top=0))
        if abs(value) < 1023:
            frequencies = [0] * (2 * abs(value) + 1)
            frequencies[value + abs(value)] = 4095
            check(codes, replace(contexts_of(shape, 0, top=0), base=0, unit=0, shape=0, tables=(tuple(frequencies),)))


def test_stored_tables_with_holes() -> None:
    contexts = replace(
        contexts_of((40, 33), 1, top=1, lane_rows=3), base=0, unit=0, shape=0,
        tables=((10, 0, 4000, 0, 10), (4095,), (1000, 0, 0, 0, 2000, 0, 1)),
    )  # fmt: skip
    codes = torch.randint(-4, 5, (40, 33), generator=torch.Generator().manual_seed(2))
    check(codes, contexts)


def test_a_stream_may_lie_anywhere_in_memory() -> None:
    contexts = contexts_of((9, 70), 3)
    codes = codes_of(contexts, 3)
    blob = encode(codes, contexts)
    for name in WAYS:
        with way(name):
            for skip in (1, 2, 3):
                moved = torch.cat((torch.zeros(skip, dtype=torch.uint8), blob))[skip:]
                assert torch.equal(decode(moved, (9, 70))[0].int(), codes)


# --- damage ---------------------------------------------------------------------------------------


def sealed(blob: bytes) -> bytes:
    """The same with a checksum that fits."""
    if len(blob) < HEADER.size:
        return blob
    crc = zlib.crc32(blob[: HEADER.size - 4] + blob[HEADER.size :])
    return blob[: HEADER.size - 4] + crc.to_bytes(4, "little") + blob[HEADER.size :]


def samples() -> list[tuple[Tensor, bytes]]:
    found = []
    for shape, rows, top in (((5, 7), 2, 3), ((40, 3), 1, 15), ((1, 64), 1, 0), ((67, 33), 1, 7)):
        contexts = contexts_of(shape, 4, lane_rows=rows, top=top)
        codes = codes_of(contexts, 4)
        codes[0, 0] = 700
        found.append((codes, bytes(encode(codes, contexts).tolist())))
        tables = tuple((1, 90 + t, 3000, 90, 1) for t in range(2 * top + 1))
        stored = replace(contexts, base=0, unit=0, shape=0, tables=tables)
        found.append((codes, bytes(encode(codes, stored).tolist())))
    return found


def mutated(blob: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes lost, added or moved, numbers that lie; half of them under a checksum that fits."""
    changed = bytearray(blob)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        kind = rng.randrange(6)
        head = rng.random() < 0.5
        at = rng.randrange(min(len(changed), HEADER.size + 40) if head else len(changed)) if changed else 0
        if kind <= 1 and changed:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2 and changed:
            changed[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif kind == 3:
            del changed[rng.randrange(len(changed) + 1) :]
        elif kind == 4:
            changed += bytes(rng.randrange(256) for _ in range(rng.randrange(1, 70)))
        else:
            wide = rng.choice((2, 4))
            changed[at : at + wide] = rng.choice((0, 1, 255, (1 << 8 * wide) - 1, 1 << 8 * wide - 1)).to_bytes(
                wide, "little"
            )
    return sealed(bytes(changed)) if rng.random() < 0.5 else bytes(changed)


def fuzz(name: str, count: int, seed: int) -> int:
    """How many of `count` mutations were streams after all."""
    rng, valid, known = random.Random(seed), 0, samples()
    with way(name):
        for _ in range(count):
            codes, blob = rng.choice(known)
            damaged = mutated(blob, rng)
            if damaged == blob:
                continue
            line = torch.tensor(list(damaged), dtype=torch.uint8)
            try:
                found, contexts = decode(line, tuple(codes.shape))
            except ValueError:
                continue
            assert sealed(damaged) == damaged
            assert found.shape == codes.shape
            again, _ = decode(encode(found, contexts), tuple(codes.shape))
            assert torch.equal(again, found)
            valid += 1
    return valid


@pytest.mark.parametrize("name", WAYS)
def test_damage_is_found(name: str) -> None:
    fuzz(name, 200, 5)


@pytest.mark.parametrize("name", WAYS)
def test_each_byte_counts(name: str) -> None:
    codes, blob = samples()[0]
    with way(name):
        for at in range(len(blob)):
            changed = bytearray(blob)
            changed[at] ^= 1 << at % 8
            with pytest.raises(ValueError, match="codes"):
                decode(torch.tensor(list(changed), dtype=torch.uint8), tuple(codes.shape))
        for end in range(len(blob)):
            with pytest.raises(ValueError, match=r"."):
                decode(torch.tensor(list(sealed(blob[:end])), dtype=torch.uint8), tuple(codes.shape))
        with pytest.raises(ValueError, match="layer of 5 x 7"):
            decode(torch.tensor(list(blob), dtype=torch.uint8), (7, 5))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("m", "lane_rows"), [(500, 2), (256, 1), (129, 4)])
def test_chunks_make_the_stream_of_the_whole(
    m: int, lane_rows: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = contexts_of((m, 7), 3, lane_rows=lane_rows, base=0)
    contexts = replace(contexts, rows=contexts.rows.sort().values)  # the last chunks alone have the widest tables
    codes = codes_of(contexts, 4)
    with way(name):
        whole = encode(codes, contexts)
        monkeypatch.setattr(streams, "AT_ONCE", 1)
        assert torch.equal(encode(codes, contexts), whole)
    assert torch.equal(decode(whole, tuple(codes.shape))[0].int(), codes)
