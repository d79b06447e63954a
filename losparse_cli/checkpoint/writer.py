"""Shards planned by bounds, filled in order, headers last; a folder that appears whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, OutputError, UsageError
from .journal import FILE as JOURNAL
from .journal import Journal, Unit, crc_of
from .reader import TORCH_DTYPES
from .source import INDEX, WEIGHTS

ALLOCATION = "losparse_allocation.json"  # what --allocate error decided; of a run under way
GENERATED = "losparse_generated.safetensors"  # text that the model wrote for its own calibration; of a run under way
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
    def folder(self) -> Path:
        return self._folder

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


# --- the output folder ----------------------------------------------------------------------------


@contextmanager
def write_errors(place: Path) -> Iterator[None]:
    """Turns an OSError while writing under `place` into an OutputError with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"The disk is full: {place} could not be written further. Free some space and repeat the command; "
                "it goes on where it stopped."
            ) from error
        if error.errno == errno.EFBIG:
            raise OutputError(
                f"{place} lies on a file system, or under a limit, that takes no file so large. Lower "
                "--max-shard-size, or choose another place with --output."
            ) from error
        reason = error.strerror or str(error)
        raise OutputError(
            f"Cannot write {error.filename or place}: {reason}. Choose another place with --output."
        ) from error


def output_path(output: str | Path) -> Path:
    """Absolute path of a result, `~` expanded; unlike Path.expanduser, an unknown ~user is left as it is."""
    return Path(os.path.abspath(os.path.expanduser(output)))


def working_folder(output: Path) -> Path:
    """Where the result grows until it is whole: beside the output, so that a rename moves it."""
    return output.with_name(output.name + ".partial")


def check_output(output: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """UsageError if the result may not go to `output`.

    It may not lie in the folder `source` that is read, nor hold it. A folder that is there must be empty, or
    be a checkpoint that may be overwritten.
    """
    with write_errors(output):
        place = Path(os.path.realpath(output))
        read = Path(os.path.realpath(source)) if source is not None else None
        if read is not None and (place == read or read in place.parents):
            raise UsageError(f"--output {output} lies inside the folder that is read. Choose a place outside it.")
        if read is not None and place in read.parents:
            raise UsageError(f"--output {output} holds the folder that is read. Choose another place.")
        if output.is_symlink():
            raise UsageError(f"{output} is a link. Choose another --output, or name the folder it leads to.")
        if output.exists() and not output.is_dir():
            raise UsageError(f"{output} exists and is no folder. Choose another --output.")
        if output.is_dir() and any(output.iterdir()):
            if not overwrite:
                raise UsageError(f"{output} exists already. Add --overwrite to replace it, or choose another --output.")
            if not (output / "config.json").is_file() or (output / ".git").exists():
                raise UsageError(
                    f"{output} holds no checkpoint, so --overwrite leaves it alone. Choose another --output."
                )


def publish(work: Path, output: Path) -> None:
    """Move the finished working folder to `output`; a folder that stood there is replaced whole.

    The journal goes last. Killed before that, the same command finds everything done and publishes again; and
    until the rename its lock keeps a second process from taking the folder for its own.
    """
    with write_errors(output):
        for path in work.rglob("*"):
            if path.is_file():
                _fsync(path)
        _fsync(work)
        old = _replaced(output)
        if output.is_dir():
            if old.exists():
                shutil.rmtree(old)
            output.rename(old)
        work.rename(output)
        _fsync(output.parent)
        clear_away(output)


def clear_away(output: Path) -> None:
    """Remove what a published result no longer needs: text, the journal, and the folder that it replaced."""
    with write_errors(output):
        for name in (GENERATED, ALLOCATION):
            (output / name).unlink(missing_ok=True)
        (output / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(_replaced(output), ignore_errors=True)  # another process may be at it, too


def _replaced(output: Path) -> Path:
    return output.with_name(output.name + ".replaced-by-losparse")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_size(text: str, option: str = "--max-shard-size") -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB; UsageError otherwise."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,9})?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    size = float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ") if match else 0
    if size < 1:
        raise UsageError(f"{option} {text!r} is no size; write 5GB, 500MB or 2GiB.")
    return int(size)
