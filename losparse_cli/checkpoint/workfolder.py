"""Where a result grows until it is whole: beside the output; then one rename, so that it is there whole or not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from safetensors import SafetensorError

from ..errors import CheckpointError, LosparseError, ResumeError, SourceError, UsageError, write_errors, write_whole
from .fingerprint import digest
from .finish import read_report
from .journal import FILE as JOURNAL
from .journal import Journal, fingerprint_in, require_ours, require_same
from .output import UNDER_WAY, check_output, working_folder
from .part import read_part

T = TypeVar("T")


class WorkFolder:
    """The life of a result at `output`, whose run is told from others by its `fingerprint`; a context manager.

    It is begun, or gone on with where an earlier run was killed, and then filled and published whole. Where the run
    ends because of its input, nothing is left: neither would the same command come further, nor does a corrected one
    go on with it. After anything else (a kill, ctrl-C, a full disk) what is finished is kept, if anything is.

    path: where to write. journal: what is done; open within. finished: `output` is of this very run, and whole, so that
    there is nothing to do, and neither path nor journal may be used. resume: auto, required or never. reads: the
    folders that are read. owner: of several processes one writes, and publishes; the others have no journal. Entering
    raises UsageError, OutputError and ResumeError as `check_output` and Journal.
    """

    journal: Journal

    def __init__(
        self,
        output: Path,
        fingerprint: dict[str, Any],
        *,
        resume: str = "auto",
        overwrite: bool = False,
        reads: Iterable[Path] = (),
        owner: bool = True,
    ) -> None:
        check_resume(resume)
        self.output, self.path = output, working_folder(output)
        self.finished = False
        self._fingerprint, self._resume, self._overwrite, self._reads = fingerprint, resume, overwrite, tuple(reads)
        self._owner = owner
        self._made: list[Path] = []  # folders that were not there before, the innermost first

    def check(self) -> None:
        """Raise what keeps this run from being begun, or gone on with; nothing is touched."""
        with write_errors(self.output):
            self.finished = not self._overwrite and _is_of(self.output, self._fingerprint)
            if self.finished:
                return
            check_output(self.output, overwrite=self._overwrite, reads=self._reads)
            require_ours(self.path)
            found = fingerprint_in(self.path)
            if self._resume == "required" and found is None:
                raise ResumeError(
                    f"There is nothing to resume at {self.path}. Leave out --resume required to start anew."
                )
            if found is not None and self._resume != "never":
                require_same(self.path, found, self._fingerprint)

    def __enter__(self) -> WorkFolder:
        self.check()
        with write_errors(self.output):
            if self.finished and self._owner:
                clear_away(self.output)
            if self.finished or not self._owner:
                return self
            self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self.journal = Journal(
                self.path,
                self._fingerprint,
                required=self._resume == "required",
                discard=self._resume == "never",
            )
        return self

    def recall(self, name: str, read: Callable[[Path], T]) -> T | None:
        """What was decided before the first unit, as a run that was killed kept it in the file `name`; or None, to be
        decided again. Then nothing that was done counts, for it was done by another decision.

        read: an error of what is torn, or of what it holds, means that it is none.
        """
        path = self.path / name
        if path.is_file():
            try:
                return read(path)
            except (CheckpointError, SafetensorError, OSError, KeyError, TypeError, ValueError):
                path.unlink()
        with write_errors(self.path):
            self.journal.keep(0)
        return None

    def keep(self, name: str, write: Callable[[Path], object]) -> None:
        """Keep what was decided in the file `name`, whole or not at all."""
        write_whole(self.path / name, write)

    def decided(
        self, name: str, read: Callable[[Path], T], make: Callable[[], T], write: Callable[[T, Path], object]
    ) -> T:
        """What `recall` finds, or what is made now, and kept."""
        found = self.recall(name, read)
        if found is None:
            found = made = make()
            self.keep(name, lambda path: write(made, path))
        return found

    def publish(self) -> None:
        """Move what was written to `output`; a folder that stood there is replaced whole.

        The journal goes last. Killed before that, the same command finds everything done and publishes again; and
        until the rename its lock keeps a second process from taking the folder for its own.
        """
        with write_errors(self.output):
            for path in self.path.rglob("*"):
                if path.is_file():
                    _fsync(path)
            _fsync(self.path)
            old = _replaced(self.output)
            if self.output.is_dir():
                if old.exists():
                    shutil.rmtree(old)
                self.output.rename(old)
            self.path.rename(self.output)
            _fsync(self.output.parent)
            clear_away(self.output)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.finished or not self._owner:
            return
        if error is not None and (_is_of_the_input(error) or self._is_empty()):
            shutil.rmtree(self.path, ignore_errors=True)
            for folder in self._made[1:]:
                if any(folder.iterdir()):
                    break
                folder.rmdir()
        self.journal.close()

    def _is_empty(self) -> bool:
        """Whether there is nothing to go on with: no unit is done, and no file lies beside the journal."""
        beside = (path for path in self.path.rglob("*") if path != self.path / JOURNAL)
        return not self.journal.units and not any(path.is_file() for path in beside)


def check_resume(resume: str) -> None:
    """UsageError if --resume is none of its three words."""
    if resume not in ("auto", "required", "never"):
        raise UsageError(f"--resume is auto, required or never, not {resume!r}.")


def clear_away(output: Path) -> None:
    """Remove what a published result no longer needs: text, states, the journal, and the folder that it replaced."""
    with write_errors(output):
        for path in (output / name for name in UNDER_WAY):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        (output / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(_replaced(output), ignore_errors=True)  # another process may be at it, too


def _is_of(output: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether the folder is the result of this very run, and whole: repeated, or killed after its last step."""
    left = fingerprint_in(output)
    if left is not None:  # published, and then killed: only clearing away was left
        return digest(left) == digest(fingerprint)
    try:
        part = read_part(output)
        if part is not None:
            mark, sizes = part.fingerprint, part.files
        else:
            report = read_report(output)
            if report is None:
                return False
            mark, sizes = report.fingerprint, {name: file["size"] for name, file in report.files.items()}
        whole = all((output / name).stat().st_size == size for name, size in sizes.items())
    except (LosparseError, OSError, KeyError):
        return False  # not ours, or damaged: then it is in the way, like any other folder
    return whole and mark == digest(fingerprint)


def _is_of_the_input(error: BaseException) -> bool:
    """Whether a run that ended so would end so again; a file that could not be read may be there the next time."""
    known = isinstance(error, UsageError | SourceError | CheckpointError)
    return known and not isinstance(error.__cause__, OSError)


def _replaced(output: Path) -> Path:
    return output.with_name(output.name + ".replaced-by-losparse")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
