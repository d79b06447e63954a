"""A Progress that keeps what it heard."""

from __future__ import annotations

from losparse_cli.progress import Progress


class Hearing(Progress):
    """totals: unit -> how many there were said to be, at last. done: unit -> how many were. names: of all, in order.
    warned, told: the sentences of warnings, and of what else is said."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.names: list[str] = []
        self.phases: list[str] = []
        self.warned: list[str] = []
        self.told: list[str] = []

    def start(self, unit: str, total: int, done: int = 0) -> None:
        self.totals[unit] = total
        self.done.setdefault(unit, done)

    def advance(self, unit: str, count: int = 1, name: str = "") -> None:
        self.done[unit] += count
        self.names.append(name)

    def warn(self, sentence: str) -> None:
        self.warned.append(sentence)

    def tell(self, sentence: str) -> None:
        self.told.append(sentence)

    def phase(self, text: str) -> None:
        self.phases.append(text)
