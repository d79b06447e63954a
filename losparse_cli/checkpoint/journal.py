"""What is done already: lets a killed run go on where it was, and refuses to go on with another.

A journal is a file of JSON lines: first the fingerprint of the run, then one line for each finished unit
(a layer or a copied tensor). A line is written after its bytes, and holds their CRC-32; whatever a crash
left half-written fails that check and is done again.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ResumeError

FILE = "losparse_journal.jsonl"


@dataclass(frozen=True)
class Unit:
    """One finished unit: where its bytes lie in the output, and what was measured.

    tensors: (name, safetensors dtype, shape, begin, end), offsets into the shard's data. stats: the
    layer's line of the report, or None for a copied tensor. seconds: time to compute it.
    """

    number: int
    shard: int
    begin: int
    end: int
    crc: int
    tensors: list[tuple[str, str, list[int], int, int]]
    stats: dict[str, Any] | None = None
    seconds: float = field(default=0.0)


class Journal:
    """An open journal, locked against a second process; `units` are those found finished, in order."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any], *, required: bool = False) -> None:
        path = folder / FILE
        existed = path.is_file() and path.stat().st_size > 0
        if required and not existed:
            raise ResumeError(f"There is nothing to resume at {folder}. Leave out --resume required to start anew.")
        self._file = open(path, "a+b")  # noqa: SIM115 - held open, with its lock, until close()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ResumeError(
                f"Another losparse is writing {folder}. Wait for it to end, or choose another --output."
            ) from error
        self.units: list[Unit] = []
        lines, length = _whole_lines(path)
        if lines:
            self._check(folder, lines[0], fingerprint)
            self.units = [Unit(**line) for line in lines[1:]]
        self._file.truncate(length)
        if not lines:
            self._append(fingerprint)

    def _check(self, folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
        different = sorted(k for k in {*found, *expected} if found.get(k) != expected.get(k))
        if different:
            raise ResumeError(
                f"{folder} holds a partial result of a different run (different: {', '.join(different)}). Repeat "
                "the command that began it, or discard it with --resume never."
            )

    def keep(self, count: int) -> None:
        """Forget all units but the first `count`: what follows did not reach the disk whole."""
        self._file.seek(0)
        length = sum(len(self._file.readline()) for _ in range(count + 1))
        self._file.truncate(length)
        self.units = self.units[:count]

    def add(self, unit: Unit) -> None:
        self._append(asdict(unit))
        self.units.append(unit)

    def _append(self, line: dict[str, Any]) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The complete JSON lines of the file and their length in bytes; a torn last line is left out."""
    lines, length = [], 0
    with open(path, "rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                break
            try:
                lines.append(json.loads(raw))
            except ValueError:
                break
            length += len(raw)
    return lines, length


def crc_of(path: Path, begin: int, end: int) -> int | None:
    """CRC-32 of a byte range, read 16 MiB at a time; None if the file is shorter."""
    crc, left = 0, end - begin
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        while left:
            piece = file.read(min(left, 16 << 20))
            if not piece:
                return None
            crc = zlib.crc32(piece, crc)
            left -= len(piece)
    return crc
