"""The Typer app; the one place where an error becomes a sentence and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, NoReturn

import typer

from .. import __version__
from ..errors import Interrupted, LosparseError
from ..parallel.launch import is_first, launched
from .commands import COMMANDS

ABOUT = "Compress any Hugging Face transformer: W ≈ U V + S, with whole numbers or floats in a sparse S."

app = typer.Typer(
    name="losparse",
    help=ABOUT,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"losparse {__version__}")
        raise typer.Exit


@app.callback(help=ABOUT)
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `losparse` itself."""


def interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, of which Ctrl-C makes a sentence: Typer would end without one."""

    @wraps(command)
    def run(**options: Any) -> None:
        try:
            command(**options)
        except KeyboardInterrupt as error:
            raise Interrupted("Interrupted. The same command begins anew.") from error

    return run


for command in COMMANDS:
    app.command(name=command.__name__.rstrip("_"))(interruptible(command))


def main() -> None:
    """Entry point of the `losparse` command. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    if not _hurries(sys.argv[1:]):
        # OpenMP's threads spin while they wait: on a machine whose cores are busy that costs up to ten times the time.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if launched() > 1:  # what ends a run is said in a sentence, not in frames of C++
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever began this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        app()
    except LosparseError as error:
        if "--debug" in sys.argv:
            raise
        _complain(str(error), error)
        _end(error.exit_code)
    except KeyboardInterrupt as error:  # before a command began, while what it needs is imported
        _complain("Interrupted. Nothing was begun.", error)
        _end(Interrupted.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left; there is nobody to tell
        _end(1)
    except OSError as error:
        if "--debug" in sys.argv:
            raise
        _complain(
            f"{error.filename or 'A file'} cannot be used: {error.strerror or error}. Check it and repeat.", error
        )
        _end(1)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        kind = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
        _complain(f"Unexpected error ({kind}): {error} Repeat with --debug to see where, and please report it.", error)
        _end(1)


def _hurries(arguments: list[str]) -> bool:
    """Whether the command writes token by token, or, as `bench`, shows the speed that other Python programs get.

    Threads that sleep take several times a small product's own time to wake, and torch does not let them sleep.
    """
    return next((word for word in arguments if not word.startswith("-")), None) in ("bench", "generate")


def _end(code: int) -> NoReturn:
    """Exit; one of several processes at once, for what it has begun to say to others will never be said."""
    if launched() > 1:
        for stream in (sys.stdout, sys.stderr):
            if not stream.closed:
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _complain(message: str, error: BaseException) -> None:
    """Tell a person, if it is for this process to do so."""
    from rich.console import Console
    from rich.text import Text

    if not is_first():
        from ..parallel.group import must_tell

        if not must_tell(error):
            return
    Console(stderr=True, soft_wrap=not sys.stderr.isatty()).print(
        Text.assemble(("error: ", "bold red"), " ".join(message.split("\n")))
    )
