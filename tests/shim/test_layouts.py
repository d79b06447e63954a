"""Every layout, against a reader written from docs/format.md alone and against damage of every kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from losparse_cli.shim.codec import decode, encode, pack_bits, smallest, unpack_bits
from losparse_cli.shim.layouts import (
    INDEX_TENSORS,
    LayerSpec,
    bound_index_bytes,
    candidates,
    column_dtype,
    expected_index_bytes,
    group_rows,
    n_of_m,
)

UNSTRUCTURED = ("bitmask", "csr", "gaps4", "gaps8")
LAYOUTS = tuple(layout for layout in INDEX_TENSORS if layout != "codes")  # those that say where entries lie
PATTERNS = ("1:2", "2:4", "4:8", "3:5", "1:1", "1:16", "7:16", "2:3")


def supports(layout: str) -> st.SearchStrategy[tuple[str, Tensor]]:
    """(pattern, support) that `layout` can hold: any density, empty rows, one row, one column, odd widths."""
    seeds = st.integers(0, 2**31)
    sizes = st.one_of(st.integers(1, 12), st.integers(13, 90))
    if layout == "n:m":

        def chosen(shape: tuple[int, int], pattern: str, seed: int) -> tuple[str, Tensor]:
            keep, group = n_of_m(pattern)
            order = torch.rand(shape[0], shape[1], group, generator=torch.Generator().manual_seed(seed)).argsort(-1)
            return pattern, (order < keep).view(shape[0], -1)

        return st.builds(chosen, st.tuples(sizes, sizes), st.sampled_from(PATTERNS), seeds)

    def drawn(shape: tuple[int, int], density: float, empty_rows: float, seed: int) -> tuple[str, Tensor]:
        random = torch.Generator().manual_seed(seed)
        if layout in ("rows", "columns"):
            line = torch.rand(shape[0 if layout == "rows" else 1], generator=random) < density
            mask = line[:, None] if layout == "rows" else line[None, :]
            return layout, mask.expand(shape).contiguous()
        full = torch.rand(shape[0], 1, generator=random) >= empty_rows
        return "unstructured", (torch.rand(shape, generator=random) < density) & full

    # Wide rows leave gaps that need several escapes; many rows fill more than one group of 8192 entries.
    shapes = st.one_of(st.tuples(sizes, sizes), st.tuples(st.integers(1, 40), st.integers(200, 1500)))
    densities = st.one_of(st.sampled_from([0.0, 0.001, 0.01, 0.5, 1.0]), st.floats(0, 1))
    return st.builds(drawn, shapes, densities, st.sampled_from([0.0, 0.0, 0.5, 0.9]), seeds)


def spec_of(layout: str, pattern: str, support: Tensor, rank: int = 0) -> LayerSpec:
    m, n = support.shape
    rows = group_rows(n) if layout.startswith("gaps") else 0
    spec = LayerSpec((m, n), rank, int(support.sum()), pattern, layout, rows)
    stream = encode(spec, support).get("S_gaps")
    return spec if stream is None else replace(spec, index_bytes=stream.numel())


def read(spec: LayerSpec, index: dict[str, Tensor]) -> list[int]:
    """The positions of S's entries, row-major, by the letter of the format and an entry at a time."""
    m, n = spec.shape
    t = {name: tensor.tolist() for name, tensor in index.items()}

    def bit(stream: list[int], k: int) -> int:
        return stream[k // 8] >> k % 8 & 1

    if spec.layout == "bitmask":
        return [i * n + j for i in range(m) for j in range(n) if bit(t["S_mask"][i], j)]
    if spec.layout == "rows":
        return [i * n + j for i in t["S_rows"] for j in range(n)]
    if spec.layout == "columns":
        return [i * n + j for i in range(m) for j in t["S_columns"]]
    if spec.layout == "csr":
        return [i * n + j for i in range(m) for j in t["S_columns"][t["S_offsets"][i] : t["S_offsets"][i + 1]]]
    if spec.layout == "n:m":
        keep, group = (int(part) for part in spec.pattern.split(":"))
        width = max(1, (group - 1).bit_length())
        places = [sum(bit(t["S_index"], k * width + b) << b for b in range(width)) for k in range(spec.nnz)]
        return [k // keep * group + place for k, place in enumerate(places)]
    four = spec.layout == "gaps4"
    found = []
    for number, (value, start) in enumerate(t["S_offsets"][:-1]):
        last_value, end = t["S_offsets"][number + 1]
        units = [u for byte in t["S_gaps"][start:end] for u in ((byte & 15, byte >> 4) if four else (byte,))]
        position = number * spec.group_rows * n
        values = 0
        for unit in units:
            position += unit
            if unit != (15 if four else 255):
                found.append(position)
                position += 1
                values += 1
        assert values == last_value - value
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_by_the_letter_of_the_format(layout: str) -> None:
    @given(supports(layout))
    def check(drawn: tuple[str, Tensor]) -> None:
        pattern, support = drawn
        spec = spec_of(layout, pattern, support, rank=1)
        index = encode(spec, support)
        assert torch.equal(decode(spec, index), support)
        assert read(spec, index) == torch.nonzero(support.view(-1)).view(-1).tolist()
        # The tensors are what the spec says, byte for byte, and can be written as they are.
        shapes = spec.tensor_shapes(torch.float16)
        assert tuple(index) == INDEX_TENSORS[layout] == tuple(name for name in shapes if name.startswith("S_"))
        assert all((tuple(t.shape), t.dtype) == shapes[name] and t.is_contiguous() for name, t in index.items())
        stored = sum(t.numel() * t.itemsize for t in index.values())
        assert spec.nbytes(torch.float16) == stored + 2 * (spec.nnz + sum(spec.shape))
        assert stored <= bound_index_bytes(layout, pattern, spec.shape, spec.nnz)
        assert LayerSpec.from_dict(spec.to_dict()) == spec

    check()


@given(st.sampled_from(LAYOUTS).flatmap(supports))
@example(("unstructured", torch.zeros(3, 5, dtype=torch.bool)))
@example(("2:4", torch.zeros(3, 8, dtype=torch.bool)))
def test_smallest_is_the_smallest(drawn: tuple[str, Tensor]) -> None:
    pattern, support = drawn
    spec, index = smallest(support, 2, pattern)
    assert torch.equal(decode(spec, index), support)
    assert (spec.shape, spec.rank, spec.nnz, spec.pattern) == (tuple(support.shape), 2, int(support.sum()), pattern)
    choices = candidates(pattern, spec.shape, spec.nnz)
    sizes = {layout: spec_of(layout, pattern, support, rank=2).nbytes(torch.bfloat16) for layout in choices}
    assert spec.nbytes(torch.bfloat16) == min(sizes.values())
    # What a plan promises holds for every layout, so it holds for the smallest.
    bounds = {layout: bound_index_bytes(layout, pattern, spec.shape, spec.nnz) for layout in choices}
    assert sum(t.numel() * t.itemsize for t in index.values()) <= min(bounds.values())


@pytest.mark.parametrize("layout", ["gaps4", "gaps8"])
def test_bounds_hold_at_the_worst_support(layout: str) -> None:
    # Entries only at the ends of the groups: every skipped entry costs escapes.
    for m, n in ((1, 20_000), (9, 8192), (40, 1000), (64, 129), (3, 7)):
        entries = group_rows(n) * n
        flat = torch.arange(m * n)
        support = ((flat % entries == entries - 1) | (flat == m * n - 1)).view(m, n)
        spec = spec_of(layout, "unstructured", support)
        index = encode(spec, support)
        assert read(spec, index) == torch.nonzero(support.view(-1)).view(-1).tolist()
        stored = sum(t.numel() * t.itemsize for t in index.values())
        assert stored <= bound_index_bytes(layout, "unstructured", (m, n), spec.nnz)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("layout", UNSTRUCTURED)
def test_expected_bytes_are_near_the_real_ones(layout: str, density: float) -> None:
    support = torch.rand(400, 600, generator=torch.Generator().manual_seed(0)) < density
    spec = spec_of(layout, "unstructured", support)
    stored = spec.nbytes(torch.uint8) - spec.nnz
    assert expected_index_bytes(layout, "unstructured", spec.shape, spec.nnz) == pytest.approx(stored, rel=0.01)


@pytest.mark.parametrize("layout", UNSTRUCTURED)
def test_rows_wider_than_sixteen_bits(layout: str) -> None:
    support = torch.rand(3, 70_001, generator=torch.Generator().manual_seed(0)) < 0.003
    support[1] = False
    support[2, -1] = True
    spec = spec_of(layout, "unstructured", support)
    assert torch.equal(decode(spec, encode(spec, support)), support)


def test_column_dtype_holds_the_last_column() -> None:
    for n in (1, 65_536, 65_537, 1 << 20):
        assert int(torch.tensor(n - 1).to(column_dtype(n)).long()) == n - 1
    assert column_dtype(65_536) == torch.uint16


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**31))
def test_bits_are_packed_lowest_first_and_padded_with_zeros(m: int, n: int, seed: int) -> None:
    bits = torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(bits)
    assert packed.shape == (m, -(-n // 8))
    expected = [
        [sum(1 << b for b in range(8) if k + b < n and row[k + b]) for k in range(0, n, 8)] for row in bits.tolist()
    ]
    assert packed.tolist() == expected
    assert torch.equal(unpack_bits(packed, n), bits)


# --- damage -----------------------------------------------------------------------------------------


def sample(layout: str) -> tuple[LayerSpec, dict[str, Tensor]]:
    """A middling support in `layout`: 20 x 37, or 20 x 36 for 2:4."""
    random = torch.Generator().manual_seed(1)
    if layout == "n:m":
        pattern, support = "2:4", (torch.rand(20, 9, 4, generator=random).argsort(-1) < 2).view(20, 36)
    elif layout in ("rows", "columns"):
        line = (
            torch.rand(20, 1, generator=random) < 0.4 if layout == "rows" else torch.rand(1, 37, generator=random) < 0.4
        )
        pattern, support = layout, line.expand(20, 37).contiguous()
    else:
        pattern, support = "unstructured", torch.rand(20, 37, generator=random) < 0.05
    spec = spec_of(layout, pattern, support)
    if layout.startswith("gaps"):  # several groups
        spec = replace(spec, group_rows=6)
        spec = replace(spec, index_bytes=encode(spec, support)["S_gaps"].numel())
    return spec, encode(spec, support)


def set_at(*place: int, value: int) -> Any:
    def change(tensor: Tensor) -> Tensor:
        tensor[place] = value
        return tensor

    return change


def swap(i: int, j: int) -> Any:
    def change(tensor: Tensor) -> Tensor:
        tensor[[i, j]] = tensor[[j, i]]
        return tensor

    return change


DAMAGE: list[tuple[str, str, Any]] = [
    ("bitmask", "S_mask", lambda t: t | (torch.arange(5) == 4) * 0x80),  # past the last column
    ("bitmask", "S_mask", lambda t: t ^ 1),  # too many or too few
    ("bitmask", "S_mask", lambda t: t * 0),
    ("csr", "S_columns", set_at(0, value=37)),
    ("csr", "S_columns", set_at(-1, value=65_535)),
    ("csr", "S_columns", lambda t: t * 0),  # twice the same
    ("csr", "S_offsets", set_at(0, value=1)),
    ("csr", "S_offsets", set_at(0, value=-1)),
    ("csr", "S_offsets", set_at(-1, value=99)),
    ("csr", "S_offsets", set_at(5, value=2**31 - 1)),
    ("csr", "S_offsets", set_at(5, value=-(2**31))),
    ("csr", "S_offsets", lambda t: t * 0),
    ("rows", "S_rows", set_at(0, value=-1)),
    ("rows", "S_rows", set_at(-1, value=20)),
    ("rows", "S_rows", swap(0, 1)),
    ("rows", "S_rows", lambda t: t * 0),
    ("columns", "S_columns", set_at(0, value=-1)),
    ("columns", "S_columns", set_at(-1, value=37)),
    ("columns", "S_columns", swap(1, 2)),
    ("columns", "S_columns", lambda t: t * 0),
    ("n:m", "S_index", lambda t: t * 0),  # twice the same place in a group
    ("n:m", "S_index", lambda t: t ^ 0xFF),  # falling inside a group
]
DAMAGE += [("gaps4", "S_gaps", lambda t: t * 0)]  # fewer escapes: too many values
DAMAGE += [
    damage
    for layout in ("gaps4", "gaps8")
    for damage in [
        (layout, "S_gaps", lambda t: t * 0 + 255),  # nothing but escapes
        (layout, "S_gaps", set_at(0, value=255)),
        (layout, "S_offsets", set_at(0, 0, value=1)),
        (layout, "S_offsets", set_at(0, 1, value=-1)),
        (layout, "S_offsets", set_at(1, 0, value=-1)),
        (layout, "S_offsets", set_at(1, 1, value=10**6)),
        (layout, "S_offsets", set_at(1, 1, value=0)),
        (layout, "S_offsets", set_at(-1, 0, value=7)),
        (layout, "S_offsets", set_at(-1, 1, value=7)),
        (layout, "S_offsets", set_at(1, 0, value=0)),
    ]
]


@pytest.mark.parametrize(("layout", "name", "change"), DAMAGE)
def test_decode_refuses_damaged_entries(layout: str, name: str, change: Any) -> None:
    spec, index = sample(layout)
    decode(spec, index)
    before = index[name].clone()
    index[name] = change(index[name].clone().long()).to(index[name].dtype)
    assert not torch.equal(index[name].long(), before.long())
    with pytest.raises(ValueError, match=r"S_|index of S"):
        decode(spec, index)


@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout in LAYOUTS for name in INDEX_TENSORS[layout]])
def test_decode_refuses_another_shape_or_dtype_and_a_missing_tensor(layout: str, name: str) -> None:
    spec, index = sample(layout)
    wrong = [index[name][:-1], torch.cat((index[name], index[name][-1:])), index[name][None], index[name].flatten()[:0]]
    wrong += [index[name].long(), index[name].float()]
    for tensor in wrong:
        with pytest.raises(ValueError, match=name):
            decode(spec, index | {name: tensor})
    with pytest.raises(ValueError, match=name):
        decode(spec, {k: t for k, t in index.items() if k != name})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_refuses_another_count(layout: str) -> None:
    spec, index = sample(layout)
    step = {"rows": 37, "columns": 20}.get(layout, 1)
    for nnz in (spec.nnz - step, spec.nnz + step, 0):
        with pytest.raises(ValueError, match=r"S_|nnz"):
            decode(replace(spec, nnz=nnz), index)


def test_a_gap_may_not_reach_into_the_next_group() -> None:
    # One entry a group of 4 x 4; the first group's gap is made to end past its 16 entries.
    spec = LayerSpec((8, 4), 0, 2, "unstructured", "gaps8", 4, 2)
    offsets = torch.tensor([[0, 0], [1, 1], [2, 2]], dtype=torch.int32)
    good = {"S_gaps": torch.tensor([15, 0], dtype=torch.uint8), "S_offsets": offsets}
    assert torch.nonzero(decode(spec, good).view(-1)).view(-1).tolist() == [15, 16]
    for gaps in ([16, 0], [15, 16]):
        with pytest.raises(ValueError, match="runs past"):
            decode(spec, good | {"S_gaps": torch.tensor(gaps, dtype=torch.uint8)})


def test_a_position_may_not_reach_into_the_next_group_of_n_of_m() -> None:
    spec = LayerSpec((1, 6), 0, 2, "1:3", "n:m")
    assert decode(spec, {"S_index": torch.tensor([0b0110], dtype=torch.uint8)}).tolist() == [[0, 0, 1, 0, 1, 0]]
    with pytest.raises(ValueError, match="leaves its group"):
        decode(spec, {"S_index": torch.tensor([0b0111], dtype=torch.uint8)})


def test_offsets_of_empty_groups_are_checked_too() -> None:
    spec = LayerSpec((8, 4), 0, 1, "unstructured", "gaps8", 4, 1)
    gaps = torch.tensor([3], dtype=torch.uint8)
    for start, fine in ((1, True), (9, False), (-1, False), (0, False)):
        offsets = torch.tensor([[0, 0], [1, start], [1, 1]], dtype=torch.int32)
        if fine:
            assert int(torch.nonzero(decode(spec, {"S_gaps": gaps, "S_offsets": offsets}).view(-1))) == 3
        else:
            with pytest.raises(ValueError, match="S_"):
                decode(spec, {"S_gaps": gaps, "S_offsets": offsets})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_byte_changed_is_refused_or_still_a_support(layout: str) -> None:
    spec, index = sample(layout)

    @given(st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(INDEX_TENSORS[layout]))
        raw = index[name].clone().contiguous()
        view = raw.view(torch.uint8).view(-1)
        for _ in range(data.draw(st.integers(1, 3))):
            view[data.draw(st.integers(0, view.numel() - 1))] = data.draw(st.integers(0, 255))
        try:
            support = decode(spec, index | {name: raw})
        except ValueError:
            return
        assert support.dtype == torch.bool
        assert support.shape == spec.shape
        assert int(support.sum()) == spec.nnz

    check()


# --- what config.json records -----------------------------------------------------------------------

ENTRY = {"shape": [20, 36], "rank": 3, "nnz": 72, "pattern": "unstructured", "layout": "bitmask"}


def test_spec_round_trips_through_json_without_its_defaults() -> None:
    plain = LayerSpec.from_dict(ENTRY)
    assert plain.to_dict() == ENTRY
    full = LayerSpec((20, 36), 3, 72, "unstructured", "gaps4", 4, 40, True, "encoder.layer.0")
    assert LayerSpec.from_dict(full.to_dict()) == full
    assert LayerSpec.from_dict({**full.to_dict(), "from the future": 1}) == full


@pytest.mark.parametrize(
    "entry", [None, [], "bitmask", 7, {}, *({k: v for k, v in ENTRY.items() if k != gone} for gone in ENTRY)]
)
def test_spec_refuses_what_is_incomplete(entry: Any) -> None:
    with pytest.raises(ValueError, match="incomplete"):
        LayerSpec.from_dict(entry)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [20]}, {"shape": [20, 36, 1]}, {"shape": 20}, {"shape": ["20", "36"]}, {"shape": [20.0, 36]},
        {"shape": [0, 36]}, {"shape": [20, -36]}, {"shape": "ab"}, {"shape": [True, 36]},
        {"rank": -1}, {"rank": 21}, {"rank": 2.5}, {"rank": "3"}, {"rank": None}, {"rank": True},
        {"nnz": -1}, {"nnz": 721}, {"nnz": 1.5}, {"nnz": "72"},
        {"layout": "coo"}, {"layout": ["bitmask"]}, {"layout": None}, {"pattern": 4}, {"pattern": None},
        {"layout": "gaps4"}, {"layout": "gaps8", "group_rows": -4},
        {"layout": "gaps4", "group_rows": 4, "index_bytes": -1},
        {"layout": "rows", "nnz": 71}, {"layout": "columns", "nnz": 71},
        {"layout": "n:m"}, {"layout": "n:m", "pattern": "2:4", "nnz": 359}, {"layout": "n:m", "pattern": "2:7"},
        {"layout": "n:m", "pattern": "5:4", "nnz": 720}, {"layout": "n:m", "pattern": "0:4", "nnz": 0},
        {"transposed": "no"}, {"transposed": 1}, {"tensor": 3}, {"group_rows": 1.5}, {"index_bytes": "4"},
    ],
    ids=str,
)  # fmt: skip
def test_spec_refuses_nonsense(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"entry|layout"):
        LayerSpec.from_dict(ENTRY | change)
