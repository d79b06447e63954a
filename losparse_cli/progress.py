"""What a caller may watch while a verb works."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    from .checkpoint.report import LayerReport
    from .finetuning.trainer import Step


class Progress:
    """Hears how far a run is. A subclass overrides what it shows; here nothing is shown.

    Work is counted in units, each of which has a name: layers, bytes (of the dense model), tensors, windows, rows,
    tokens, steps.
    """

    def start(self, unit: str, total: int, done: int = 0) -> None:
        """There are `total` units to do, of which `done` were found finished. Said again where that changes."""

    def advance(self, unit: str, count: int = 1, name: str = "") -> None:
        """`count` more units are done; `name` is of the last one."""

    def phase(self, text: str) -> None:
        """What goes on now, until the next phase."""

    def tell(self, sentence: str) -> None:
        """Something that was decided or found, worth keeping in view."""

    def warn(self, sentence: str) -> None:
        """What bodes ill for the result."""

    def layer(self, report: LayerReport) -> None:
        """A layer was compressed."""

    def step(self, step: Step) -> None:
        """The optimizer took a step."""


class Within(Progress):
    """Hands on what is heard of a piece of the work, but for how much there is to do: that is said of the whole."""

    def __init__(self, whole: Progress) -> None:
        self._whole = whole

    def advance(self, unit: str, count: int = 1, name: str = "") -> None:
        self._whole.advance(unit, count, name)

    def phase(self, text: str) -> None:
        self._whole.phase(text)

    def warn(self, sentence: str) -> None:
        self._whole.warn(sentence)

    def layer(self, report: LayerReport) -> None:
        self._whole.layer(report)


def listener(progress: Progress | None) -> Progress:
    """What hears how far a run is, for None one that shows nothing; UsageError for what is no Progress."""
    if progress is None:
        return Progress()
    if not isinstance(progress, Progress):
        raise UsageError(
            f"progress is a losparse_cli.Progress that overrides what it shows, not {type(progress).__name__}. Leave "
            "it out to hear nothing."
        )
    return progress
