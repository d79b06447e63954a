"""Shards planned by bounds, filled in order, headers last."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, write_errors
from .journal import Journal, Unit, crc_of
from .reader import TORCH_DTYPES
from .source import INDEX, WEIGHTS

ENTRY_CHARACTERS = 140  # of a header entry besides its name: dtype, shape and offsets at their longest
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Slot:
    """A planned unit. names: the longest set of tensor names it may write. bound: most bytes of data."""

    names: tuple[str, ...]
    bound: int


@dataclass(frozen=True)
class Shard:
    """A planned weight file. header: bytes reserved for its JSON header, a multiple of 8."""

    file: str
    header: int
    slots: range


def plan_shards(slots: Sequence[Slot], max_bytes: int) -> list[Shard]:
    """Consecutive slots, cut so that no shard's bound exceeds `max_bytes` (but for a single larger slot).

    CheckpointError if two slots would write a tensor of the same name.
    """
    cuts, size = [0], 0
    taken: set[str] = set()
    for number, slot in enumerate(slots):
        twice = taken.intersection(slot.names)
        if twice:
            raise CheckpointError(
                f"The checkpoint holds a tensor {min(twice)}, and the result needs that name for a part of a layer. "
                "Rename or remove it, or leave the layer out with --ignore."
            )
        taken.update(slot.names)
        if size and size + slot.bound > max_bytes:
            cuts.append(number)
            size = 0
        size += slot.bound
    cuts.append(len(slots))
    shards = []
    count = len(cuts) - 1
    for k in range(count):
        numbers = range(cuts[k], cuts[k + 1])
        text = sum(len(json.dumps(name)) + ENTRY_CHARACTERS for n in numbers for name in slots[n].names)
        file = WEIGHTS if count == 1 else f"model-{k + 1:05d}-of-{count:05d}.safetensors"
        shards.append(Shard(file, (text + 64 + 7) // 8 * 8, numbers))
    return shards


class ShardWriter:
    """Appends finished units to their shards and to the journal.

    folder: the working folder. Units must come in order; those that the journal already holds, and whose
    bytes are still what they were, are found in `done`. together: runs of units of which a part counts for nothing.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], journal: Journal, together: Iterable[range] = ()) -> None:
        self._folder, self._shards, self._journal = folder, shards, journal
        self._together = tuple(together)
        self._shard_of = {number: k for k, shard in enumerate(shards) for number in shard.slots}
        self._recover()

    @property
    def done(self) -> int:
        return len(self._journal.units)

    @property
    def nbytes(self) -> int:
        """Of the tensors that are written."""
        return sum(unit.end - unit.begin for unit in self._journal.units)

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        """Shard -> its file, and where its data begins."""
        return tuple((shard.file, self._start(k)) for k, shard in enumerate(self._shards))

    def _recover(self) -> None:
        with write_errors(self._folder):
            whole = 0
            for number, unit in enumerate(self._journal.units):
                path = self._path(unit.shard)
                if unit.number != number or not path.is_file():
                    break
                if crc_of(path, self._start(unit.shard) + unit.begin, self._start(unit.shard) + unit.end) != unit.crc:
                    break
                whole = number + 1
            whole = next((run.start for run in self._together if run.start < whole < run.stop), whole)
            if whole < self.done:
                self._journal.keep(whole)
            for k in range(len(self._shards)):
                end = max((u.end for u in self._journal.units if u.shard == k), default=None)
                if end is not None:
                    os.truncate(self._path(k), self._start(k) + end)
                else:
                    self._path(k).unlink(missing_ok=True)

    def _path(self, shard: int) -> Path:
        return self._folder / self._shards[shard].file

    def _start(self, shard: int) -> int:
        return 8 + self._shards[shard].header

    def read(self, number: int) -> dict[str, Tensor]:
        """The tensors of a finished unit, by name."""
        import torch

        unit = self._journal.units[number]
        found = {}
        with open(self._path(unit.shard), "rb", buffering=0) as file:
            for name, dtype, shape, begin, end in unit.tensors:
                file.seek(self._start(unit.shard) + begin)
                raw = torch.frombuffer(bytearray(file.read(end - begin)), dtype=torch.uint8) if end > begin else None
                kind = TORCH_DTYPES[dtype]
                found[name] = torch.empty(shape, dtype=kind) if raw is None else raw.view(kind).view(shape)
        return found

    def stats(self, number: int) -> dict[str, Any]:
        """What was recorded with a finished unit; {} if nothing was."""
        return self._journal.units[number].stats or {}

    def append(
        self,
        parts: Iterable[tuple[str, str, Sequence[int], Iterable[bytes | memoryview]]],
        stats: dict[str, Any] | None = None,
        seconds: float = 0.0,
    ) -> Unit:
        """Write the next unit. parts: (name, safetensors dtype, shape, pieces of its bytes)."""
        number = self.done
        k = self._shard_of[number]
        last = self._journal.units[-1] if self._journal.units else None
        begin = last.end if last is not None and last.shard == k else 0
        position, crc, tensors = begin, 0, []
        with write_errors(self._folder), open(self._path(k), "r+b" if begin else "wb", buffering=0) as file:
            file.seek(self._start(k) + begin)
            for name, dtype, shape, pieces in parts:
                first = position
                for piece in pieces:
                    _write_all(file, piece)
                    crc = zlib.crc32(piece, crc)
                    position += len(piece)
                tensors.append((name, dtype, list(shape), first, position))
            unit = Unit(number, k, begin, position, crc, tensors, stats, seconds)
            self._journal.add(unit)
        return unit

    def finish(self) -> dict[str, str]:
        """Write all headers and the index; returns the weight map. Safe to repeat after a crash."""
        weight_map: dict[str, str] = {}
        total = 0
        with write_errors(self._folder):
            for k, shard in enumerate(self._shards):
                header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
                for unit in self._journal.units:
                    if unit.shard != k:
                        continue
                    for name, dtype, shape, begin, end in unit.tensors:
                        if name in weight_map:
                            raise AssertionError(f"{name} was written twice")
                        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
                        weight_map[name] = shard.file
                        total += end - begin
                text = json.dumps(header, separators=(",", ":")).encode()
                if len(text) > shard.header:
                    raise AssertionError(f"header of {shard.file}: {len(text)} bytes exceed {shard.header} reserved")
                with open(self._path(k), "r+b" if self._path(k).exists() else "wb") as file:
                    file.write(struct.pack("<Q", shard.header) + text.ljust(shard.header))
                    file.flush()
                    os.fsync(file.fileno())
            if len(self._shards) > 1:
                write_json(self._folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        return weight_map


def tensor_part(name: str, tensor: Tensor) -> tuple[str, str, Sequence[int], list[memoryview]]:
    """One part for `ShardWriter.append`; the tensor is contiguous and on the CPU."""
    import torch

    raw = tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
    return name, DTYPE_NAMES[tensor.dtype], list(tensor.shape), [raw]


def _write_all(file: Any, piece: bytes | memoryview) -> None:
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path, stop: Event | None = None) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces; of its beginning only, once `stop` is set."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while (piece := file.read(8 << 20)) and not (stop is not None and stop.is_set()):
            digest.update(piece)
    return digest.hexdigest()
