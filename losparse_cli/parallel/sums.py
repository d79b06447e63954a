"""What ranks add up together and then all know, in an order that is that of one process."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from torch import Tensor

from .group import Ranks
from .tree import TreeSum


def sum_for_all(group: Ranks, leaves: TreeSum) -> Tensor:
    """The sum of all leaves that ranks hold, one at least, on every rank. The leaves are let go of."""
    total = group.sum_to(0, leaves)
    return group.broadcast(0, {} if total is None else {"sum": total})["sum"]


def add_for_all(group: Ranks, own: Sequence[float]) -> float:
    """The sum of the numbers of all ranks, those of one rank after those of another."""
    return float(sum(chain.from_iterable(group.agree(list(own)))))
