"""Everything that losparse raises on purpose; each message ends with what to do next.

LosparseError                      exit code 1
├── UsageError                     exit code 2: the request contradicts itself or the model
│   ├── RecipeError                a recipe file, or a pattern in it
│   └── UnfitError                 a layer that the recipe leaves nothing of
├── SourceError                    the model to read: not found, gated, no network, unknown class
├── CheckpointError                a file that is there and wrong: header, index, shape, value
│   └── FormatVersionError         written by a newer losparse
├── OutputError                    the place to write: exists, read-only, full
│   └── ResumeError                a journal of another run, or none where one is required
├── ResourceError                  memory that is not there, and what to lower
├── RankError                      one of several processes ended, or does not come
├── TrainingError                  a loss or a weight that is no number any more
├── MissingExtraError              an optional dependency is not installed
└── Interrupted                    exit code 130: Ctrl-C, with what was finished kept
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PARTS = {
    "recipe": (("Recipe",), ""),
    "calibration": (("Calibration",), "calibration_"),
    "refinement": (("Refinement", "ModelRefinement"), "refine_"),
    "how": (("Finetuning", "Pruning"), ""),
    "task": (("TaskRequest",), ""),
}
"""Argument -> classes whose fields it holds, and what their options on the command line begin with."""


def flag(name: str) -> str:
    """The option of the command line that sets the field `name`, for messages."""
    return "--" + name.replace("_", "-")


def is_whole(value: object) -> bool:
    """Whether a setting, which may stand in a file, is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a setting, which may stand in a file, is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def paths_as_text(settings: object, *names: str) -> None:
    """Turn those of the fields of a frozen dataclass that are Paths into texts, which can be written and compared."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, Path):
            object.__setattr__(settings, name, str(value))


def from_fields(kind: type[T], given: Any, name: str) -> T:
    """A `kind` of settings, given as one or as a mapping of its fields; UsageError, by the `name` of the argument."""
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise UsageError(f"{name} is a {kind.__name__} or a mapping of its fields, not {type(given).__name__}.")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise UsageError(f"{name} has no setting {unknown[0]!r}; known are {', '.join(known)}.")
    for key, field in known.items():
        if field.default is field.default_factory is MISSING and key not in given:
            raise UsageError(f"{name} lacks its setting {key!r}. Add it.")
    return kind(**given)


class LosparseError(Exception):
    """Base of all deliberate errors. `str(error)` is one or two sentences: what, where, remedy.

    told: whether another of several processes says it.
    """

    exit_code = 1
    told = False


class UsageError(LosparseError):
    """Options that contradict one another, or that the model cannot satisfy."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe file that cannot be read, or an entry that it may not hold."""


class UnfitError(UsageError):
    """A layer of which a recipe leaves nothing, or whose factors alone exceed it.

    reason: that in a few words, which follow the layer's name. remedy: what to ask for instead, without a full stop.
    """

    def __init__(self, layer: str, shape: tuple[int, int], reason: str, remedy: str) -> None:
        ignore = f"or leave the layer out with --ignore '{layer}'"
        super().__init__(f"{layer} ({shape[0]} x {shape[1]}) {reason}. {remedy}, {ignore}.")
        self.reason, self.remedy = reason, remedy


class SourceError(LosparseError):
    """The model to read could not be found, reached or understood."""


class CheckpointError(LosparseError):
    """A checkpoint file exists and is wrong."""


class FormatVersionError(CheckpointError):
    """The checkpoint was written by a newer version of losparse."""


class OutputError(LosparseError):
    """The result could not be written."""


class ResumeError(OutputError):
    """A partial result that this run may not continue, or none where one is required."""


class ResourceError(LosparseError):
    """Memory that is not there."""


class RankError(LosparseError):
    """Of several processes one ended, never came, or fails where the others do not."""


class TrainingError(LosparseError):
    """Training went wrong: a loss or a weight is no number any more."""


class MissingExtraError(LosparseError):
    """An optional dependency is missing."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}. Install it with: pip install 'losparse[{extra}]'")


class Interrupted(LosparseError):
    """Stopped by the user; what is finished is kept."""

    exit_code = 130
    told = True


def reason_of(error: BaseException) -> str:
    """What an error of another library says, for the middle of a sentence: its first line, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip(" .")


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


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file at `path`, which is there whole or not at all; OutputError if it cannot be written."""
    part = path.with_name(path.name + ".part")
    with write_errors(path):
        write(part)
        part.replace(path)


# --- in Python, where options are arguments ---------------------------------------------------------


def in_python(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which says of a keyword that it does not have where that belongs, and notes beside its errors what
    the options that they name are called here. One that takes any keyword is returned as it is."""
    parameters = signature(function).parameters
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return function

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in parameters:
                raise TypeError(_unexpected(function.__name__, name, parameters))
        try:
            return function(*args, **kwargs)
        except LosparseError as error:
            options = dict.fromkeys(re.findall(r"--[a-z][a-z-]*[a-z]", str(error)))
            places = {option: place_of(option[2:].replace("-", "_"), parameters) for option in options}
            if any(places.values()):
                error.add_note("In Python " + ", ".join(f"{o} is {place}" for o, place in places.items() if place))
            raise

    return call


def place_of(name: str, parameters: Iterable[str]) -> str:
    """How a setting is given to a function of these parameters; "" if it is none of its."""
    if name in parameters:
        return name
    for parameter, (classes, prefix) in PARTS.items():
        if parameter not in parameters:
            continue
        if name == prefix.removesuffix("_") and prefix:
            return parameter
        for one in classes:
            field = name.removeprefix(prefix)
            if field in getattr(import_module(__package__), one).__dataclass_fields__:
                return f"{parameter}={one}({field}=...)"
    return ""


def _unexpected(function: str, name: str, parameters: Iterable[str]) -> str:
    place = place_of(name, parameters)
    near = get_close_matches(name, list(parameters), 1)
    remedy = f" Give {place}." if place else f" Did you mean {near[0]!r}?" if near else ""
    return f"{function}() got an unexpected keyword argument {name!r}.{remedy}"
