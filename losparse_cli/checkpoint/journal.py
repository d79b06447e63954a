"""What is done already: lets a killed run go on where it was, and refuses to go on with another.

A journal is a file of JSON lines: first the fingerprint of the run, then one line for each finished unit
(a layer or a copied tensor). A line is written after its bytes, and holds their CRC-32; whatever a crash
left half-written fails that check and is done again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import OutputError, ResumeError, flag

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
    """An open journal, locked against a second process; `units` are those found finished, in order.

    required: ResumeError if there is nothing to go on with. discard: forget what is there, files too.
    """

    def __init__(
        self, folder: Path, fingerprint: dict[str, Any], *, required: bool = False, discard: bool = False
    ) -> None:
        path = folder / FILE
        require_ours(folder)
        # Held open, with its lock, until close(); unbuffered, so that a full disk is noticed line by line.
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            _lock(self._file, path)
            self._ends: list[int] = []  # where each line ends, in bytes
            self.units: list[Unit] = []
            found = None if discard else self._read(path)
            if discard:
                _empty(folder)
            if found is None and required:
                raise ResumeError(f"There is nothing to resume at {folder}. Leave out --resume required to start anew.")
            if found is not None:
                require_same(folder, found, fingerprint)
            self._file.truncate(self._ends[-1] if self._ends else 0)
            if found is None:
                self._append(fingerprint)
        except BaseException:
            self._file.close()
            raise

    def _read(self, path: Path) -> dict[str, Any] | None:
        """The fingerprint, None if there is none; units up to the first line that is torn or damaged."""
        fingerprint = None
        with open(path, "rb") as file:
            for raw in file:
                try:
                    line = json.loads(raw)
                    if fingerprint is None:
                        fingerprint = dict(line)
                    else:
                        self.units.append(Unit(**line))
                except (ValueError, TypeError):
                    break
                if not raw.endswith(b"\n"):
                    break
                self._ends.append(file.tell())
        whole = len(self._ends)
        self.units = self.units[: max(0, whole - 1)]
        return fingerprint if whole else None

    def keep(self, count: int) -> None:
        """Forget all units but the first `count`: what follows did not reach the disk whole."""
        self._ends = self._ends[: count + 1]
        self._file.truncate(self._ends[-1])
        self.units = self.units[:count]

    def add(self, unit: Unit) -> None:
        self._append(asdict(unit))
        self.units.append(unit)

    def _append(self, line: dict[str, Any]) -> None:
        raw = memoryview(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        while raw:
            raw = raw[self._file.write(raw) :]
        self._ends.append(self._file.seek(0, os.SEEK_END))

    def close(self) -> None:
        self._file.close()


def fingerprint_in(folder: Path) -> dict[str, Any] | None:
    """The fingerprint of the run whose journal lies in `folder`; None if there is none that can be read."""
    try:
        with open(folder / FILE, "rb") as file:
            found = json.loads(file.readline())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _lock(file: Any, path: Path) -> None:
    """Take the lock for as long as `file` is open; ResumeError if another process has it, or just had it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ResumeError(
            f"Another losparse is writing {path.parent}. Wait for it to end, or choose another --output."
        ) from error
    except OSError:
        return  # a file system without locks: two runs at once are then the user's to avoid
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        raise ResumeError(f"Another losparse has just finished {path.parent}. Repeat the command to see its result.")


def _empty(folder: Path) -> None:
    """Remove everything in `folder` but the journal."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != FILE:
            path.unlink()


def require_ours(folder: Path) -> None:
    """OutputError if `folder` is there and holds something, but no journal, or is no folder; OSError as lstat."""
    try:
        folder.lstat()
    except FileNotFoundError:
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / FILE).exists()):
        raise OutputError(f"{folder} is there, and losparse did not make it. Move it, or choose another --output.")


def require_same(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """ResumeError that names every setting in which the fingerprint `found` in `folder` is not `expected`."""
    different = differences(found, expected)
    if different:
        raise ResumeError(
            f"{folder} holds a partial result of a different run (different: {', '.join(different)}). Repeat the "
            "command that began it, delete that folder, or add --resume never."
        )


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Settings in which two fingerprints differ, as a person gave them: such as `--bits 3, now 4`."""
    lines = _differences(found, json.loads(json.dumps(expected)))  # tuples are lists in a journal
    options = OF_REFINE if expected.get("start") else {}
    different = list(dict.fromkeys(_said(line, options) for line in lines))
    # Sizes follow from what was asked for, and say nothing where that differs.
    return [line for line in different if line != "plan"] or different


GROUPS = {
    "recipe": "",
    "calibration": "calibration-",
    "refinement": "refine-",
    "towards": "refine-",
    "task": "",
    "training": "",
}
"""Part of a fingerprint -> what the options of its settings begin with."""
OPTIONS = {
    "part": "--part",
    "calibration": "--calibration",
    "calibration.source": "--calibration",
    "calibration.batch": "calibration: batch",
    "refinement": "--refine",
    "towards": "--refine",
    "towards.train": "refine: train",
    "towards.seed": "refine: seed",
    "training.pruning.every": "--prune-every",
    "training.pruning.initial_warmup": "--initial-warmup-steps",
    "training.pruning.final_warmup": "--final-warmup-steps",
}
"""Settings whose options have other names, or that only a recipe holds."""
OF_REFINE = {
    "refinement": "--objective",
    "towards": "--objective",
    "towards.train": "--train",
    "towards.precision": "--precision",
}
"""The same where `losparse refine` has options of its own."""


def _said(line: str, options: dict[str, str]) -> str:
    """A line of `_differences` with the option that was given otherwise in place of the setting's name."""
    name, space, values = line.partition(" ")
    group, _, rest = name.removeprefix("training.pruning.").rpartition(".")
    known = options.get(name) or OPTIONS.get(name)
    if known is None and name.startswith("recipe.layers."):
        known = name.removeprefix("recipe.")
    if known is None and (group in GROUPS or name.startswith("training.pruning.")):
        known = flag(GROUPS.get(group, "") + rest)
    return f"{known or name}{space}{values}"


SHORT = 40  # characters of a value that is shown


def _differences(found: Any, expected: Any, name: str = "") -> list[str]:
    """Such as `recipe.rank 4, now 8`; the name alone where a value is long, or says nothing to a person."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = sorted({*found, *expected})
        return [line for k in keys for line in _differences(found.get(k), expected.get(k), f"{name}.{k}".strip("."))]
    if found == expected:
        return []
    shown = [json.dumps(value) for value in (found, expected)]
    states = any(isinstance(value, list) and any(isinstance(x, int) for x in value) for value in (found, expected))
    if states or any(len(text) > SHORT for text in shown):  # sizes and times of files, say
        return [name]
    return [f"{name} {shown[0]}, now {shown[1]}"]


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
