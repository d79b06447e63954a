"""Sums of leaves: one order of adding, however leaves are dealt to ranks, and few of them waiting."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from losparse_cli.parallel.shares import share
from losparse_cli.parallel.tree import TreeSum


def by_definition(leaves: dict[int, Tensor], begin: int, level: int) -> Tensor | None:
    """The sum of a subtree, from the top down."""
    if level == 0:
        return leaves.get(begin)
    parts = [by_definition(leaves, begin + half, level - 1) for half in (0, 1 << (level - 1))]
    there = [part for part in parts if part is not None]
    return there[0] + there[1] if len(there) == 2 else next(iter(there), None)


def leaves_of(numbers: set[int]) -> dict[int, Tensor]:
    """Of sizes so different that another order shows."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(64, 3, generator=generator) * 10.0 ** torch.randint(-4, 5, (64, 1), generator=generator)
    return {k: drawn[k] for k in sorted(numbers)}


@given(some.sets(some.integers(0, 39)), some.integers(1, 7), some.data())
def test_any_number_of_ranks_adds_the_same(numbers: set[int], size: int, data: some.DataObject) -> None:
    leaves = leaves_of(numbers)
    owner = data.draw(some.integers(0, size - 1))
    held = []
    for rank in range(size):
        mine = share(40, rank, size)
        held.append(TreeSum(mine.start))
        for leaf in mine:
            if leaf in leaves:
                held[rank].add(leaf, leaves[leaf].clone())
    for rank in range(size):
        for node, value in held[rank].nodes.items() if rank != owner else ():
            held[owner].put(node, value.clone())
    found, expected = held[owner].total(), by_definition(leaves, 0, 6)
    assert (found is None) == (expected is None)
    assert found is None or expected is None or torch.equal(found, expected)


@given(some.sets(some.integers(0, 63), min_size=1))
def test_no_more_wait_than_the_tree_has_levels(numbers: set[int]) -> None:
    tree, most = TreeSum(), 0
    for leaf in sorted(numbers):
        tree.add(leaf, torch.ones(1))
        most = max(most, len(tree.nodes))
    assert most <= 1 + math.log2(64)
    total = tree.total()
    assert total is not None
    assert float(total) == len(numbers)


def test_ranks_that_hold_whole_subtrees_hand_over_one_each() -> None:
    for rank in range(4):
        mine = share(31, rank, 4)
        tree = TreeSum(mine.start)
        for leaf in mine:
            tree.add(leaf, torch.ones(1))
        assert len(tree.nodes) == (1 if rank < 3 else 3)  # of the last seven leaves 4 + 2 + 1


def test_a_sum_of_nothing_is_none() -> None:
    assert TreeSum().total() is None
