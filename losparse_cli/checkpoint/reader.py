"""Headers, then tensors by their offsets.

Files are never memory-mapped: pages of a mapping count as resident memory until the file is closed, so a
large shard would look (to a memory limit, be) as large as itself. The format is the one that the
safetensors documentation specifies: 8 bytes of header length, a JSON header, the data without holes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..errors import CheckpointError

MAX_HEADER = 100_000_000  # the safetensors library's own limit, in bytes
MAX_SHAPE = 64  # characters of a shape as JSON: room for eight dimensions of a million, which the writer reserves

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64,
    "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Safetensors dtype -> bits an element."""

TORCH_DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""The dtypes that can become tensors of torch; all others are only copied."""

FLOATING = ("F16", "BF16", "F32", "F64")

COPIED = "Repair the checkpoint: only layers that --ignore names are copied whatever they hold."


@dataclass(frozen=True)
class Slice:
    """One matrix of a tensor `whole` that holds `count` of them; transposed: it lies there as (in, out)."""

    whole: str
    number: int
    count: int
    transposed: bool


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. dtype as safetensors names it; offset and nbytes in bytes into the file's data.

    part: of an entry that is a part of what lies there, and has a name and a shape, (out, in), of its own.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    part: Slice | None = None

    @property
    def place(self) -> str:
        """What it is called in its file."""
        return self.name if self.part is None else f"{self.part.whole}[{self.part.number}]"

    def matrices(self, names: Sequence[str], *, transposed: bool) -> list[TensorEntry]:
        """An entry for each of the matrices (count, ., .) that it holds, called `names`."""
        count, m, n = self.shape
        nbytes = self.nbytes // max(1, count)
        shape = (n, m) if transposed else (m, n)
        return [
            replace(self, name=name, shape=shape, offset=self.offset + k * nbytes, nbytes=nbytes,
                    part=Slice(self.name, k, count, transposed))
            for k, name in enumerate(names)
        ]  # fmt: skip

    @property
    def elements(self) -> int:
        return self.nbytes * 8 // BITS[self.dtype]


class SafetensorsFile:
    """One weight file with its header checked; CheckpointError says what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, self.data_start = _read_header(path)

    def read(self, entry: TensorEntry) -> Tensor:
        """The tensor, in memory of its own. For the dtypes in TORCH_DTYPES."""
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        view = raw.numpy().data
        with _read_errors(entry), open(self.path, "rb", buffering=0) as file:
            file.seek(self.data_start + entry.offset)
            _fill(file, view, entry)
        return _shaped(raw.view(TORCH_DTYPES[entry.dtype]), entry)

    def chunks(self, entry: TensorEntry, size: int = 16 << 20) -> Iterator[bytes]:
        """The tensor's bytes, `size` at a time."""
        if entry.part is not None and entry.part.transposed:
            yield from _pieces(self.read(entry), size)
            return
        with _read_errors(entry):
            file = open(self.path, "rb")  # noqa: SIM115 - closed below; buffered, for pieces as long as they should be
        with file:
            left = entry.nbytes
            file.seek(self.data_start + entry.offset)
            while left:
                with _read_errors(entry):  # not around the yield: what is raised there is the consumer's
                    piece = file.read(min(size, left))
                if not piece:
                    raise _truncated(entry)
                left -= len(piece)
                yield piece


class PickleFile:
    """A `pytorch_model*.bin`, read with `weights_only=True` and never unpickled otherwise.

    drop_shared: leave out what shares its memory with an earlier tensor, because the model ties it again.
    """

    def __init__(self, path: Path, *, drop_shared: bool = True) -> None:
        self.path = path
        content = _load_pickle(path)
        names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
        self.entries: dict[str, TensorEntry] = {}
        seen: set[tuple[Any, ...]] = set()
        for name, tensor in content.items():
            if tensor.dtype not in names or tensor.layout != torch.strided:
                raise CheckpointError(
                    f"{path} holds {name} as {tensor.dtype}, {tensor.layout}, which cannot be copied from this form. "
                    "Save the model as safetensors with save_pretrained first."
                )
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            if place in seen and drop_shared and tensor.numel():
                continue
            seen.add(place)
            self.entries[name] = TensorEntry(
                name, names[tensor.dtype], tuple(tensor.shape), path, 0, tensor.numel() * tensor.itemsize
            )

    def read(self, entry: TensorEntry) -> Tensor:
        """The tensor, in memory of its own."""
        # Opened anew for each tensor: pages of a mapping that stays open count as resident memory.
        content = _load_pickle(self.path)
        if entry.part is None:
            return content[entry.name].clone(memory_format=torch.contiguous_format)
        return _shaped(content[entry.part.whole][entry.part.number].clone().reshape(-1), entry)

    def chunks(self, entry: TensorEntry, size: int = 16 << 20) -> Iterator[bytes]:
        """The tensor's bytes, `size` at a time."""
        yield from _pieces(self.read(entry), size)


def _shaped(values: Tensor, entry: TensorEntry) -> Tensor:
    """The tensor of an entry from its values in the order of the file."""
    if entry.part is None or not entry.part.transposed:
        return values.view(entry.shape)
    return values.view(entry.shape[::-1]).T.contiguous()


def _pieces(tensor: Tensor, size: int) -> Iterator[bytes]:
    raw = tensor.view(-1).view(torch.uint8).numpy()
    for start in range(0, raw.size, size):
        yield raw[start : start + size].tobytes()


def finite(pieces: Iterable[bytes], entry: TensorEntry, *, infinities: bool = False) -> Iterator[bytes]:
    """The pieces of a tensor as they come, each of whole numbers; raises as `require_finite`."""
    seen = 0
    for piece in pieces:
        if entry.dtype in FLOATING:
            values = torch.frombuffer(bytearray(piece), dtype=TORCH_DTYPES[entry.dtype])
            require_finite(values, entry, COPIED, begin=seen, infinities=infinities)
            seen += values.numel()
        yield piece


def require_finite(
    values: Tensor, entry: TensorEntry, remedy: str, *, begin: int = 0, infinities: bool = False
) -> None:
    """CheckpointError with the remedy at the first NaN, and the first infinity unless those may be there.

    values: floating, of the tensor of `entry`, from its entry number `begin` on.
    """
    wrong = torch.isnan if infinities else _is_not_finite
    if not values.numel() or not any(wrong(end) for end in torch.aminmax(values)):  # NaN is both least and largest
        return
    values = values.reshape(-1)
    at = int(torch.nonzero(wrong(values))[0])
    place = [int(k) for k in torch.unravel_index(torch.tensor(begin + at), entry.shape or (1,))]
    raise CheckpointError(f"{entry.place} in {entry.path} holds {values[at].item()} at {place}. {remedy}")


def _is_not_finite(values: Tensor) -> Tensor:
    return ~torch.isfinite(values)


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """Name -> tensor, mapped from the file; CheckpointError if it holds anything else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises many kinds for a bad or an old file
        raise CheckpointError(
            f"{path} cannot be read safely ({type(error).__name__}): it is corrupt, in torch's format from "
            "before 1.6, or holds more than tensors. Load it in transformers yourself, if you trust it, and save "
            "it as safetensors with save_pretrained."
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in content.items()
    ):
        raise CheckpointError(
            f"{path} does not hold a mapping from names to tensors. Load the model in transformers and save it "
            "with save_pretrained."
        )
    return content


def _fill(file: Any, view: memoryview, entry: TensorEntry) -> None:
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled : filled + (1 << 28)])
        if not count:
            raise _truncated(entry)
        filled += count


@contextmanager
def _read_errors(entry: TensorEntry) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {entry.place} from {entry.path}: {error.strerror or error}. The file was there when losparse "
            "began: put it back, and repeat the command."
        ) from error


def _truncated(entry: TensorEntry) -> CheckpointError:
    return CheckpointError(
        f"{entry.path} ended inside the tensor {entry.place}: the file is truncated or changed while it was "
        "read. Download or copy it again."
    )


def _read_header(path: Path) -> tuple[dict[str, TensorEntry], int]:
    """(tensor name -> entry in file order, start of the data)."""
    again = "Download or copy the file again."
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{path} is no safetensors file, or its beginning is damaged. {again}")
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except PermissionError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}. Its owner can allow it: chmod a+r.") from error
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}. {again}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"The header of {path} is corrupt ({error}). {again}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"The header of {path} is no JSON object. {again}")
    header.pop("__metadata__", None)
    entries = {}
    end = 0
    try:
        for entry in sorted((_entry(name, info, path) for name, info in header.items()), key=_extent):
            if entry.offset != end:
                fault = "overlaps the one before it" if entry.offset < end else "leaves a hole before it"
                raise ValueError(f"the tensor {entry.name} {fault}")
            entries[entry.name] = entry
            end += entry.nbytes
    except ValueError as error:
        raise CheckpointError(f"The header of {path} is corrupt ({error}). {again}") from error
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} has {size:,} bytes but its header describes {8 + length + end:,}: it is truncated or damaged. "
            f"{again}"
        )
    return entries, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"it names {name!r} twice")
        result[name] = value
    return result


def _extent(entry: TensorEntry) -> tuple[int, int]:
    return entry.offset, entry.nbytes


def _entry(name: str, info: Any, path: Path) -> TensorEntry:
    """The entry that a header's line describes; ValueError if there can be no such tensor."""
    fields = info if isinstance(info, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"the tensor {name} has the unknown dtype {str(dtype)[:40]}")
    if not _are_sizes(shape) or len(json.dumps(shape)) > MAX_SHAPE:
        raise ValueError(f"the tensor {name} has the impossible shape {str(shape)[:40]}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"the tensor {name} has the impossible offsets {str(offsets)[:40]}")
    nbytes = -(-math.prod(shape) * BITS[dtype] // 8)
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(f"the tensor {name} needs {nbytes:,} bytes but has {offsets[1] - offsets[0]:,}")
    return TensorEntry(name, dtype, tuple(shape), path, offsets[0], nbytes)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
