"""Where a result goes: a working folder beside it, then one rename, so that it appears whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from ..errors import ResumeError, UsageError, write_errors
from .journal import FILE as JOURNAL
from .journal import Journal

ALLOCATION = "losparse_allocation.json"  # what --allocate error decided; of a run under way
GENERATED = "losparse_generated.safetensors"  # text that the model wrote for its own calibration; of a run under way
STATES = "training"  # folder of the states that a fine-tuning saves; of a run under way


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


def check_resume(resume: str) -> None:
    """UsageError if --resume is none of its three words."""
    if resume not in ("auto", "required", "never"):
        raise UsageError(f"--resume is auto, required or never, not {resume!r}.")


def begin(output: Path, fingerprint: dict[str, Any], resume: str) -> tuple[Path, Journal]:
    """The working folder of `output`, made if it is not there, and its open journal; ResumeError as of Journal."""
    work = working_folder(output)
    if resume == "required" and not work.is_dir():
        raise ResumeError(f"There is nothing to resume at {work}. Leave out --resume required to start anew.")
    work.mkdir(parents=True, exist_ok=True)
    return work, Journal(work, fingerprint, required=resume == "required", discard=resume == "never")


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
    """Remove what a published result no longer needs: text, states, the journal, and the folder that it replaced."""
    with write_errors(output):
        for name in (GENERATED, ALLOCATION):
            (output / name).unlink(missing_ok=True)
        shutil.rmtree(output / STATES, ignore_errors=True)
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
