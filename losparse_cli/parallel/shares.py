"""Work in shares: runs in a row, blocks of numbered batches, or piece by piece to whoever has least."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise


def cut(costs: Sequence[int], count: int) -> list[range]:
    """Numbers of `costs` in so many runs, one after another, that cost about the same and are never empty.

    ValueError for more runs than costs, or none.
    """
    if not 1 <= count <= len(costs):
        raise ValueError(f"{len(costs)} costs make no {count} runs")
    sums = [0, *accumulate(costs)]
    cuts = [0]
    for k in range(1, count):
        aim = sums[-1] * k / count
        at = bisect_left(sums, aim)
        if at and aim - sums[at - 1] < sums[at] - aim:
            at -= 1
        cuts.append(min(max(at, cuts[-1] + 1), len(costs) - (count - k)))
    return [range(begin, end) for begin, end in pairwise([*cuts, len(costs)])]


def share(count: int, rank: int, size: int) -> range:
    """Which of `count` numbered things a rank takes: as many in a row as the busiest one, or what is left."""
    each = -(-count // size)
    return range(min(count, rank * each), min(count, (rank + 1) * each))


def spread(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(group, place) of all members of groups of these sizes: the first of each group, then the second ones, and so on.

    Ranks that have a share of these in a row have about as many members of every group.
    """
    return [(group, place) for place in range(max(sizes, default=0)) for group, n in enumerate(sizes) if place < n]


def deal(costs: Sequence[float], size: int) -> list[int]:
    """For each cost the rank that takes it: the dearest first, each to whoever has least so far."""
    taken = [0.0] * size
    owners = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        owners[number] = min(range(size), key=lambda rank: (taken[rank], rank))
        taken[owners[number]] += costs[number]
    return owners
