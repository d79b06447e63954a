"""The Typer app; the one place where an error becomes a sentence and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import Interrupted, LosparseError
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
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever began this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        app()
    except LosparseError as error:
        if "--debug" in sys.argv:
            raise
        _complain(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # before a command began, while what it needs is imported
        _complain("Interrupted. Nothing was begun.")
        sys.exit(Interrupted.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left; there is nobody to tell
        sys.exit(1)
    except OSError as error:
        if "--debug" in sys.argv:
            raise
        _complain(f"{error.filename or 'A file'} cannot be used: {error.strerror or error}. Check it and repeat.")
        sys.exit(1)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        kind = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
        _complain(f"Unexpected error ({kind}): {error} Repeat with --debug to see where, and please report it.")
        sys.exit(1)


def _hurries(arguments: list[str]) -> bool:
    """Whether the command writes token by token, or, as `bench`, shows the speed that other Python programs get.

    Threads that sleep take several times a small product's own time to wake, and torch does not let them sleep.
    """
    return next((word for word in arguments if not word.startswith("-")), None) in ("bench", "generate")


def _complain(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=not sys.stderr.isatty()).print(
        Text.assemble(("error: ", "bold red"), " ".join(message.split("\n")))
    )
