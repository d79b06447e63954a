"""Sums over numbered leaves in one fixed binary tree: equal bit by bit, whoever adds up which part of them.

Floating sums depend on their order. Here leaves 2k and 2k + 1 are added first, then those pairs, and so on, so that
ranks that hold leaves in a row hand each other whole subtrees. A leaf that there is not is left out, not added as zero.
"""

from __future__ import annotations

from torch import Tensor

Node = tuple[int, int]
"""(level, k): leaves k * 2**level to (k + 1) * 2**level - 1."""


class TreeSum:
    """The sum of the leaves of one rank, as far as it is settled; others' subtrees may be put beside.

    first: number of the first leaf that this rank may have; it adds its leaves in rising order. Tensors that are added
    belong to the sum from then on. nodes: what waits for a neighbour.
    """

    def __init__(self, first: int = 0) -> None:
        self.nodes: dict[Node, Tensor] = {}
        self._first = first

    def add(self, leaf: int, value: Tensor) -> None:
        """Add leaf number `leaf`, which comes after all that this rank has added."""
        self._settle(leaf)
        self.put((0, leaf), value)

    def put(self, node: Node, value: Tensor) -> None:
        """Add a subtree, which may come from another rank."""
        level, k = node
        while (neighbour := self.nodes.pop((level, k ^ 1), None)) is not None:
            value = neighbour.add_(value) if k & 1 else value.add_(neighbour)
            level, k = level + 1, k >> 1
        self.nodes[level, k] = value

    def _settle(self, end: int) -> None:
        """Raise what waits for leaves before `end` that are of this rank: they are not there. Level by level, for what
        is to meet on one level has to be raised there first."""
        level = 0
        while level <= max((of for of, _ in self.nodes), default=-1):
            for k in [k for of, k in self.nodes if of == level]:
                begin = (k ^ 1) << level
                if begin >= self._first and begin + (1 << level) <= end:
                    self.put((level + 1, k >> 1), self.nodes.pop((level, k)))
            level += 1

    def total(self) -> Tensor | None:
        """The sum of everything, when all leaves are there; None of nothing. The sum holds nothing afterwards."""
        while len(self.nodes) > 1:
            level, k = min(self.nodes)
            self.put((level + 1, k >> 1), self.nodes.pop((level, k)))
        return self.nodes.popitem()[1] if self.nodes else None
