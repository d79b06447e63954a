"""Headers, then tensors by their offsets.

Files are never memory-mapped: pages of a mapping count as resident memory until the file is closed, so a
large shard would look (to a memory limit, be) as large as itself. The format is the one that the
safetensors documentation specifies: 8 bytes of header length, a JSON header, the data without holes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

MAX_HEADER = 100_000_000  # the safetensors library's own limit, in bytes

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64,
    "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Safetensors dtype -> bits an element."""

TORCH_DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "U8": torch.uint8, "U16": torch.uint16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
"""The dtypes that are computed with; all others are only copied."""

FLOATING = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. dtype as safetensors names it; offset and nbytes in bytes into the file's data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


class SafetensorsFile:
    """One weight file with its header checked; CheckpointError says what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata, self.entries, self.data_start = _read_header(path)

    def read(self, entry: TensorEntry) -> Tensor:
        """The tensor, in memory of its own. For the dtypes in TORCH_DTYPES."""
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        view = memoryview(raw.numpy())
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.data_start + entry.offset)
                _fill(file, view, entry)
        except OSError as error:
            raise CheckpointError(f"Cannot read {entry.name} from {self.path}: {error.strerror}.") from error
        return raw.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)

    def chunks(self, entry: TensorEntry, size: int = 16 << 20) -> Iterator[bytes]:
        """The tensor's bytes, `size` at a time."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.data_start + entry.offset)
            left = entry.nbytes
            while left:
                piece = file.read(min(size, left))
                if not piece:
                    raise _truncated(entry)
                left -= len(piece)
                yield piece


class PickleFile:
    """A `pytorch_model*.bin`, read with `weights_only=True` and never unpickled otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch.load raises many kinds for a bad or an old file
            raise CheckpointError(
                f"{path} cannot be read safely ({type(error).__name__}): it is corrupt, in torch's format from "
                "before 1.6, or holds more than tensors. Load it in transformers yourself, if you trust it, and save it "
                "as safetensors with save_pretrained."
            ) from error
        if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
            raise CheckpointError(f"{path} does not hold a mapping from names to tensors.")
        names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
        self._tensors: dict[str, Tensor] = {}
        self.entries: dict[str, TensorEntry] = {}
        seen: set[tuple[Any, ...]] = set()
        for name, tensor in content.items():
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            if place in seen and tensor.numel():
                continue  # a tied weight, stored once; transformers ties it again at load
            seen.add(place)
            if tensor.dtype not in names:
                raise CheckpointError(
                    f"{path} holds {name} as {tensor.dtype}, which cannot be copied from this form. Save the model as "
                    "safetensors with save_pretrained first."
                )
            self._tensors[name] = tensor
            self.entries[name] = TensorEntry(
                name, names[tensor.dtype], tuple(tensor.shape), path, 0, tensor.numel() * tensor.itemsize
            )

    def read(self, entry: TensorEntry) -> Tensor:
        """The tensor, in memory of its own."""
        return self._tensors[entry.name].clone(memory_format=torch.contiguous_format)

    def chunks(self, entry: TensorEntry, size: int = 16 << 20) -> Iterator[bytes]:
        """The tensor's bytes, `size` at a time."""
        raw = self._tensors[entry.name].contiguous().view(-1).view(torch.uint8).numpy()
        for start in range(0, entry.nbytes, size):
            yield raw[start : start + size].tobytes()


def _fill(file: Any, view: memoryview, entry: TensorEntry) -> None:
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled : filled + (1 << 28)])
        if not count:
            raise _truncated(entry)
        filled += count


def _truncated(entry: TensorEntry) -> CheckpointError:
    return CheckpointError(
        f"{entry.path} ended inside the tensor {entry.name}: the file is truncated or changed while it was "
        "read. Download or copy it again."
    )


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorEntry], int]:
    """(metadata, tensor name -> entry in file order, start of the data)."""
    again = "Download or copy the file again."
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{path} is no safetensors file, or its beginning is damaged. {again}")
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"The header of {path} is corrupt ({error}). {again}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"The header of {path} is no JSON object. {again}")
    metadata = header.pop("__metadata__", None) or {}
    entries = {}
    end = 0
    for name, info in sorted(header.items(), key=lambda item: _offsets(item[1])):
        entry = _entry(name, info, path)
        if entry is None or entry.offset != end:
            raise CheckpointError(f"The header of {path} describes the tensor {name} impossibly: {info}. {again}")
        entries[name] = entry
        end += entry.nbytes
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} has {size:,} bytes but its header describes {8 + length + end:,}: it is truncated or damaged. {again}"
        )
    return metadata, entries, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _offsets(info: Any) -> tuple[int, int]:
    try:
        begin, end = info["data_offsets"]
        return int(begin), int(end)
    except (KeyError, TypeError, ValueError):
        return -1, -1


def _entry(name: str, info: Any, path: Path) -> TensorEntry | None:
    begin, end = _offsets(info)
    try:
        dtype, shape = info["dtype"], tuple(info["shape"])
    except (KeyError, TypeError):
        return None
    if dtype not in BITS or not all(isinstance(s, int) and s >= 0 for s in shape) or begin < 0:
        return None
    elements = 1
    for s in shape:
        elements *= s
    if end - begin != -(-elements * BITS[dtype] // 8):
        return None
    return TensorEntry(name, dtype, shape, path, begin, end - begin)
