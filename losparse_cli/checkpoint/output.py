"""Where a result goes, and what keeps it from going there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError, UsageError, write_errors

ALLOCATION = "losparse_allocation.json"  # what --allocate error decided
GENERATED = "losparse_generated.safetensors"  # text that the model wrote for its own calibration
SENSITIVITY = "losparse_sensitivity.safetensors"  # what the loss minds, and bits by the step
BACKWARD = "losparse_backward.safetensors"  # how far the pass is that finds what the loss minds
TRAINING = "training"  # folder of what training needs to go on: states, teacher, the compressed start
PARTS = "parts"  # folder of what several processes have done, before it is joined
PART = "losparse_part.json"  # what a part of a run says of itself
UNDER_WAY = (ALLOCATION, GENERATED, SENSITIVITY, BACKWARD, TRAINING, PARTS)
"""What is of a run under way, and no part of its result."""


def output_path(output: str | Path) -> Path:
    """Absolute path of a result, `~` expanded; unlike Path.expanduser, an unknown ~user is left as it is."""
    return Path(os.path.abspath(os.path.expanduser(output)))


def working_folder(output: Path) -> Path:
    """Where the result grows until it is whole: beside the output, so that a rename moves it."""
    return output.with_name(output.name + ".partial")


def check_output(output: Path, *, overwrite: bool, reads: Iterable[Path] = ()) -> None:
    """UsageError if the result may not go to `output`, OutputError if it cannot.

    It may not lie in one of the folders that the run `reads`, nor hold one. A folder that is there must be empty, or
    be a checkpoint that may be overwritten.
    """
    with write_errors(output):
        place = Path(os.path.realpath(output))
        for read in (Path(os.path.realpath(folder)) for folder in reads):
            if place == read or read in place.parents:
                raise UsageError(f"--output {output} lies inside the folder that is read. Choose a place outside it.")
            if place in read.parents:
                raise UsageError(f"--output {output} holds the folder that is read. Choose another place.")
        above = next(folder for folder in output.parents if folder.exists())
        if not above.is_dir():
            raise OutputError(f"{above} is a file, so nothing can lie below it. Choose another place with --output.")
        if not os.access(above, os.W_OK):
            raise OutputError(f"Nothing can be written in {above}. Choose another place with --output.")
        if output.is_symlink():
            raise UsageError(f"{output} is a link. Choose another --output, or name the folder it leads to.")
        if output.exists() and not output.is_dir():
            raise UsageError(f"{output} exists and is no folder. Choose another --output.")
        if output.is_dir() and any(output.iterdir()):
            if not overwrite:
                raise UsageError(f"{output} exists already. Add --overwrite to replace it, or choose another --output.")
            ours = (output / "config.json").is_file() or (output / PART).is_file()
            if not ours or (output / ".git").exists():
                raise UsageError(
                    f"{output} holds no checkpoint, so --overwrite leaves it alone. Choose another --output."
                )


@contextmanager
def whole_file(output: Path, *, overwrite: bool, reads: Iterable[Path] = ()) -> Iterator[Path]:
    """Where to write one file, which becomes `output` when all of it is there, and goes where that fails.

    UsageError and OutputError as `check_output`.
    """
    with write_errors(output):
        if output.is_dir():
            raise UsageError(f"{output} is a folder. Name a file in it with --output.")
        if output.exists() and not overwrite:
            raise UsageError(f"{output} exists already. Add --overwrite to replace it, or choose another --output.")
        check_output(output.with_name(f"{output.name}.partial"), overwrite=False, reads=reads)
        output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial")
    try:
        yield partial
        if partial.exists():
            with write_errors(output):
                os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)


def free_bytes(place: Path) -> int:
    """On the disk of `place`, or of the nearest folder above it that is there."""
    return shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.exists())).free


def check_space(place: Path, need: int) -> None:
    """OutputError if `place`, or the nearest folder above it that is there, has less than `need` bytes free."""
    free = free_bytes(place)
    if need > free:
        raise OutputError(
            f"{place.parent} has {free:,} bytes free, and the run needs about {need:,} more. Free some space, or "
            "choose another disk with --output."
        )
