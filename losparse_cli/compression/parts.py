"""A part of a run without text, that a process does by itself: `--part K/N`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import UsageError

MOST = 64
"""Sections that a model's units are cut into at most, and so parts of a run."""
LEAST, TOGETHER = 8, 8
"""The same at least, of a model of as many layers; and layers of a section, where there are more."""


@dataclass(frozen=True)
class Part:
    """Part `number` of `count`, counted from one; UsageError if there is none such."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise UsageError(
                f"--part K/N is one of N parts, 1/N to N/N, not {self.number}/{self.count}: give 1/3, 2/3 and 3/3 for "
                "three."
            )

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def part_named(text: str | Part | None) -> Part | None:
    """The part that a text such as 2/3 names; UsageError for what names none."""
    if text is None or isinstance(text, Part):
        return text
    found = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", str(text))
    if found is None:
        raise UsageError(f"--part is K/N, such as 2/3 for the second of three, not {text!r}.")
    return Part(int(found[1]), int(found[2]))


def section_count(layers: int) -> int:
    """Sections of a model with so many layers that are compressed: a matter of the model alone."""
    return max(1, min(layers, MOST, max(LEAST, layers // TOGETHER)))
