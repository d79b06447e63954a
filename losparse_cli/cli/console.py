"""What a person sees while a command runs: messages and progress bars; or JSON for a script."""

from __future__ import annotations

import json as json_module
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import Progress as Bars
from rich.progress import TaskID
from rich.table import Table

from ..checkpoint.report import telling_error
from ..errors import Interrupted
from ..progress import Progress
from .bars import bars

if TYPE_CHECKING:
    from ..checkpoint.report import LayerReport


PIPE_WIDTH = 160


class Screen(RichConsole):
    """What is printed to a reader that has left is dropped: work goes on, and ends as it would have."""

    def on_broken_pipe(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())  # for what others write there, and what is written at the end
        os.close(nowhere)


class Console:
    """What a command was asked for goes to standard output, as tables and lines, or with --json as data; what it says
    on the way, progress, notes and warnings, to standard error, or with --json nowhere."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json, self.quiet = json, quiet or json
        self.err = Screen(stderr=True, quiet=self.quiet, highlight=False, soft_wrap=not sys.stderr.isatty())
        # A pipe has no width of its own, unless COLUMNS says one: wide enough that nothing is cut.
        self._has_width = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
        self.out = Screen(quiet=self.quiet, highlight=False, width=None if self._has_width else PIPE_WIDTH)
        self._data: dict[str, Any] = {}
        if self.quiet or not self.err.is_terminal:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported
            if "huggingface_hub" in sys.modules:
                sys.modules["huggingface_hub"].utils.disable_progress_bars()

    def say(self, message: str) -> None:
        """Of progress, or a note."""
        self.err.print(message)

    def show(self, line: str, *, whole: bool = False, **style: Any) -> None:
        """A line of the result, in markup; only a known width breaks it, and no command, which is `whole`."""
        self.out.print(line, soft_wrap=whole or not self._has_width, **style)

    def warn(self, message: str) -> None:
        self.err.print(f"[yellow]warning:[/] {escape(message)}")

    def complain(self, message: str) -> None:
        """What --quiet does not silence; with --json it is part of the data."""
        if not self.json:
            Screen(stderr=True, soft_wrap=True, highlight=False).print(f"[red]{escape(message)}[/]")

    def table(self, table: Table) -> None:
        self.out.print(table)

    def data(self, content: dict[str, Any]) -> None:
        """Collect what --json prints."""
        self._data |= content

    def flush(self) -> None:
        """Print the collected JSON, if it was asked for."""
        if self.json and self._data:
            sys.stdout.write(json_module.dumps(self._data, indent=2, default=str) + "\n")

    @contextmanager
    def status(self, message: str) -> Iterator[Any]:
        if self.err.is_terminal and not self.quiet:
            with self.err.status(escape(clean(message, self.err.width - 4))) as status:
                yield status
        else:
            yield _NoStatus()


@contextmanager
def interruptible() -> Iterator[None]:
    """Turns Ctrl-C during work that is journalled into a sentence; Typer would end without one."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(
            "Interrupted. What is finished is kept: the same command goes on where it stopped."
        ) from error


class _NoStatus:
    def update(self, message: str) -> None:
        """Nothing moves where there is no terminal."""


class LayerProgress(Progress):
    """Two bars, layers and bytes, and the time left; where there is no terminal plain lines, one for what is done
    before the first layer, and one for each tenth of the layers."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._done = self._total = 0
        self._stage = ""  # what goes on before the first layer, of which only the beginning is told

    def start(self, unit: str, total: int, done: int = 0) -> None:
        if unit == "layers":
            self._done, self._total = done, total
        if self._bars is None:
            return
        if unit in self._tasks:
            self._bars.update(self._tasks[unit], total=total, completed=done)
        else:
            self._tasks[unit] = self._bars.add_task(unit.capitalize(), total=total, completed=done, note="", unit=unit)

    def advance(self, unit: str, count: int = 1, name: str = "") -> None:
        if self._bars is not None:
            self._bars.update(self._tasks[unit], advance=count)

    def phase(self, text: str) -> None:
        """What goes on between two layers, or before the first."""
        if self._bars is not None:
            self._bars.update(self._tasks["layers"], note=text)
        elif not self._total and (stage := text.partition(":")[0]) != self._stage:
            self._stage = stage
            self._console.say(escape(text))

    def tell(self, sentence: str) -> None:
        self._console.say(escape(sentence))

    def warn(self, sentence: str) -> None:
        self._console.warn(sentence)

    def layer(self, report: LayerReport) -> None:
        self._done += 1
        error = getattr(report, telling_error([report]))
        note = report.name if error is None else f"{report.name}  error {error:.3f}"
        if self._bars is not None:
            self._bars.update(self._tasks["layers"], advance=1, note=note)
        elif is_told(self._done, self._total):
            self._console.say(f"layer {self._done}/{self._total}  {escape(note)}")

    def __enter__(self) -> LayerProgress:
        if self._console.err.is_terminal and not self._console.quiet:
            self._bars = bars(self._console.err)
            self._bars.start()
            self._tasks["layers"] = self._bars.add_task("Layers", total=None, note="", unit="layers")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()


def is_told(done: int, total: int) -> bool:
    """Whether the line of a unit is one of about ten, evenly spaced, that are shown where there is no terminal."""
    return done % max(1, -(-total // 10)) == 0 or done == total


class CountProgress(Progress):
    """One bar over units that are named as they are finished."""

    def __init__(self, console: Console, verb: str) -> None:
        self._bars = bars(console.err, transient=True, disable=console.quiet or not console.err.is_terminal)
        self._task = self._bars.add_task(verb, total=None, note="")

    def start(self, unit: str, total: int, done: int = 0) -> None:
        self._bars.update(self._task, total=total, completed=done)

    def advance(self, unit: str, count: int = 1, name: str = "") -> None:
        self._bars.update(self._task, advance=count, note=name)

    def __enter__(self) -> CountProgress:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()


class Phases(Progress):
    """What begins, a line each; for work that shows by itself how far it is."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def phase(self, text: str) -> None:
        self._console.say(escape(text))


def size(nbytes: float) -> str:
    """12.3 MB: decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def clean(name: object, most: int = 60) -> str:
    """A name that any file may hold: on one line, of printable characters, and not longer than `most` of them."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in str(name))
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}"


def invoked() -> str:
    """What a person types to run losparse: its name, where it lies if no shell would find it, or as a module."""
    beside = Path(sys.executable).with_name("losparse")
    if shutil.which("losparse"):
        return "losparse"
    return short(beside) if beside.is_file() else f"{short(Path(sys.executable))} -m losparse_cli"


def short(path: Path) -> str:
    """A path as the person would type it: relative where that is shorter."""
    relative = os.path.relpath(path)
    return escape(relative if len(relative) < len(str(path)) else str(path))


def calm_libraries() -> None:
    """Silence transformers' own progress bars and advice, which would break ours."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
