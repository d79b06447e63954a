"""What a person sees while a whole model is trained towards its dense one."""

from __future__ import annotations

from types import TracebackType

from rich import progress as rich
from rich.markup import escape

from ..progress import Progress
from .bars import bars
from .console import Console


class RefinementProgress(Progress):
    """One bar, and a line for each look at held-out text; the lines alone where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: rich.Progress | None = None
        self._task = rich.TaskID(0)
        if console.err.is_terminal and not console.quiet:
            self._bar = bars(console.err)

    def start(self, unit: str, total: int, done: int = 0) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description="Training", total=total, completed=done, unit=unit)

    def advance(self, unit: str, count: int = 1, name: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._task, advance=count)

    def phase(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, note=text)

    def tell(self, sentence: str) -> None:
        self._console.say(escape(sentence))

    def warn(self, sentence: str) -> None:
        self._console.warn(sentence)

    def __enter__(self) -> RefinementProgress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("Reading", total=None, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
