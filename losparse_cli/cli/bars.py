"""Progress bars, each of which is one line: where there is no room for all of a note, its end is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich import progress as rich
from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column
from rich.text import Text

ROOMY = 110  # columns of a terminal that has room for long bars
LONG, SHORT = 40, 16  # columns of a bar


@dataclass(frozen=True)
class Tail:
    """A line of plain text, of which the beginning goes where it is too long: names differ at their end."""

    text: str
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = " ".join(self.text.split())
        if cell_len(text) > options.max_width:
            backwards = chop_cells(text[::-1], max(1, options.max_width - 1))
            text = f"…{backwards[0][::-1]}"
        yield Text(text, style=self.style, no_wrap=True, overflow="crop")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = min(cell_len(self.text), options.max_width)
        return Measurement(min(width, 1), width)


class Words(rich.ProgressColumn):
    """What an attribute or a field of a task says: the only columns that give way to the others."""

    def __init__(self, name: str, style: str = "") -> None:
        super().__init__()
        self._name, self._style = name, style

    def render(self, task: Any) -> Tail:
        return Tail(task.fields.get(self._name) or getattr(task, self._name, ""), self._style)


class TimeLeft(rich.TimeRemainingColumn):
    """`3:10 left`, once: of bytes, which go along with layers, it would only be another guess; nothing before anyone
    knows how much there is to do."""

    def __init__(self) -> None:
        super().__init__(compact=True, table_column=Column(no_wrap=True))

    def render(self, task: Any) -> Text:
        if task.total is None or task.fields.get("unit") == "bytes":
            return Text()
        return super().render(task).append(" left")


class Amount(rich.DownloadColumn):
    """`12/210` for layers, `105.1/269.0 MB` for bytes, `49%` for per cent; nothing before there is a total."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Any) -> Text:
        if task.total is None:
            return Text()
        unit = task.fields.get("unit")
        if unit == "percent":
            return Text(f"{task.percentage:.0f}%")
        return super().render(task) if unit == "bytes" else rich.MofNCompleteColumn().render(task)


def bars(console: Console, *, transient: bool = False, disable: bool = False) -> rich.Progress:
    """Of tasks with a description, and as fields a note and a unit."""
    return rich.Progress(
        Words("description"),
        rich.BarColumn(LONG if console.width >= ROOMY else SHORT, table_column=Column(no_wrap=True)),
        Amount(),
        TimeLeft(),
        Words("note", "dim"),
        console=console,
        transient=transient,
        disable=disable,
    )
