"""Where layers stand, by their names alone.

A layer's place is its stack (what stands before the first number of its name), its block (that number) and its
kind: the last part of its name, with as many parts before it as tell it from other kinds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a layer stands. block: None for a layer outside all stacks."""

    stack: str
    block: int | None
    kind: str


def places(names: Sequence[str]) -> list[Place]:
    """The place of every layer. Numbers behind the first, of experts and the like, make no kinds."""
    split = [re.fullmatch(r"(?:(.*?)\.)?([0-9]{1,9})\.(.+)", name, flags=re.DOTALL) for name in names]
    paths = [
        tuple(part for part in (found[3] if found else name).split(".") if not part.isdecimal()) or (name,)
        for name, found in zip(names, split, strict=True)
    ]
    kinds = _shortest(paths)
    return [
        Place((found[1] or "") if found else "", int(found[2]) if found else None, kinds[path])
        for found, path in zip(split, paths, strict=True)
    ]


def _shortest(paths: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Path -> its shortest end that no other path shares."""
    owners: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for path in paths:
        for k in range(1, len(path) + 1):
            owners.setdefault(path[-k:], set()).add(path)
    return {
        path: ".".join(next((path[-k:] for k in range(1, len(path)) if len(owners[path[-k:]]) == 1), path))
        for path in dict.fromkeys(paths)
    }
