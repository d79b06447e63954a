"""Headers are believed only where they describe the file that is there; tensors come back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from toys import raw_safetensors

from losparse_cli.checkpoint.reader import BITS, TORCH_DTYPES, PickleFile, SafetensorsFile, finite
from losparse_cli.errors import CheckpointError


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "odd": torch.arange(3, dtype=torch.uint8),
        "flag": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.entries) == set(tensors)
    for name, tensor in tensors.items():
        entry = file.entries[name]
        found = file.read(entry)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert torch.equal(found, tensor)
        assert b"".join(file.chunks(entry, 3)) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_placed(dtype: str, value: float, tmp_path: Path) -> None:
    tensor = torch.randn(7, 5).to(TORCH_DTYPES[dtype])
    tensor[0, 0] = torch.finfo(tensor.dtype).max
    save_file({"a": tensor, "scalar": tensor[6, 4].clone()}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    entry = file.entries["a"]
    pieces = list(file.chunks(entry, 48))
    assert list(finite(pieces, entry)) == pieces
    tensor[5, 2] = value
    save_file({"a": tensor, "scalar": tensor[5, 2].clone()}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=rf"a in .*x\.safetensors holds {value} at \[5, 2\]\. Repair"):
        list(finite(file.chunks(file.entries["a"], 48), entry))
    with pytest.raises(CheckpointError, match=rf"scalar in .* holds {value}"):
        list(finite(file.chunks(file.entries["scalar"]), file.entries["scalar"]))
    if value == value:
        assert len(list(finite(file.chunks(entry, 48), entry, infinities=True))) == len(pieces)


def test_entries_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    header = {
        "late": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]},
        "empty": {"dtype": "U8", "shape": [0], "data_offsets": [3, 3]},
        "first": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "__metadata__": {"format": "pt"},
    }
    raw_safetensors(tmp_path / "x.safetensors", header, b"abcde")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert list(file.entries) == ["first", "empty", "late"]
    assert b"".join(file.chunks(file.entries["late"])) == b"de"


def test_every_dtype_of_the_format_is_known() -> None:
    """Those that the specification of safetensors 0.8 lists."""
    assert set(BITS) == {
        "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
        "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64",
    }  # fmt: skip
    for name, dtype in TORCH_DTYPES.items():
        assert dtype.itemsize * 8 == BITS[name]


def opened(path: Path) -> tuple[SafetensorsFile | None, str]:
    """The file, or None and what the reader has against it."""
    try:
        return SafetensorsFile(path), ""
    except CheckpointError as error:
        return None, str(error)


@given(data=st.data())
def test_no_damage_to_a_header_goes_further_than_a_checkpoint_error(data: st.DataObject, tmp_path_factory: Any) -> None:
    """Any byte of a small file changed, or any end cut off: refused by name, or still consistent."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    header = {
        f"t{k}": {"dtype": "F16", "shape": [2, k], "data_offsets": [2 * k * (k - 1), 2 * k * (k + 1)]}
        for k in range(1, 4)
    }
    raw_safetensors(path, header, bytes(24))
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    else:
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    path.write_bytes(raw)
    file, complaint = opened(path)
    if file is None:
        assert str(path) in complaint
        return
    assert file.data_start + sum(entry.nbytes for entry in file.entries.values()) == len(raw)
    for entry in file.entries.values():
        assert sum(map(len, file.chunks(entry))) == entry.nbytes


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner), max_leaves=5
)


@pytest.mark.slow
@given(
    st.fixed_dictionaries(
        {"dtype": st.just("F16") | values, "shape": st.just([2]) | values, "data_offsets": st.just([0, 4]) | values}
    )
)
def test_no_header_upsets_the_reader(tmp_path_factory: Any, info: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "odd.safetensors"
    raw_safetensors(path, json.dumps({"a": info}).encode(), bytes(4))
    good = info == {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}
    file, complaint = opened(path)
    if file is None:
        assert not good
        assert str(path) in complaint
        assert "\n" not in complaint
    else:
        assert sum(entry.nbytes for entry in file.entries.values()) == 4


def test_a_file_that_shrinks_under_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100)}, path)
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-4])
    for read in (file.read, lambda entry: list(file.chunks(entry, 64))):
        with pytest.raises(CheckpointError, match=r"x\.safetensors ended inside the tensor a"):
            read(file.entries["a"])
    path.unlink()
    for read in (file.read, lambda entry: list(file.chunks(entry, 64))):
        with pytest.raises(CheckpointError, match=r"Cannot read a from .*x\.safetensors: No such file"):
            read(file.entries["a"])


def test_what_the_consumer_of_chunks_raises_is_its_own(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    chunks = file.chunks(file.entries["a"], 8)
    next(chunks)
    with pytest.raises(OSError, match="disk"):
        chunks.throw(OSError("disk"))  # type: ignore[attr-defined]


# --- pickled files --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=TORCH_DTYPES)
def test_a_pickled_tensor_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    raw = torch.arange(48, dtype=torch.uint8) % 2 if dtype == torch.bool else torch.arange(48, dtype=torch.uint8)
    tensor = raw.view(dtype).view(2, -1)
    torch.save({"a": tensor, "turned": tensor.T, "empty": tensor[:0], "scalar": tensor[0, 0]}, tmp_path / "x.bin")
    file = PickleFile(tmp_path / "x.bin")
    assert b"".join(file.chunks(file.entries["a"], 7)) == raw.numpy().tobytes()
    assert b"".join(file.chunks(file.entries["scalar"])) == raw.numpy().tobytes()[: dtype.itemsize]
    assert list(file.chunks(file.entries["empty"])) == []
    turned = file.read(file.entries["turned"])
    assert turned.is_contiguous()
    assert (
        turned.view(-1).view(torch.uint8).numpy().tobytes()
        == tensor.T.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    )
    assert TORCH_DTYPES[file.entries["a"].dtype] == dtype


def test_shared_memory_is_kept_or_dropped(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    torch.save(
        {"a": weight, "tied": weight, "part": weight[:2], "empty": weight[:0], "empty2": weight[:0]}, tmp_path / "x.bin"
    )
    assert list(PickleFile(tmp_path / "x.bin").entries) == ["a", "part", "empty", "empty2"]
    assert list(PickleFile(tmp_path / "x.bin", drop_shared=False).entries) == ["a", "tied", "part", "empty", "empty2"]


@pytest.mark.parametrize(
    "tensor", [torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.complex128)], ids=["sparse", "complex128"]
)
def test_a_pickled_tensor_of_a_kind_that_cannot_be_copied(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"odd": tensor}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"x\.bin holds odd as .*save_pretrained"):
        PickleFile(tmp_path / "x.bin")
