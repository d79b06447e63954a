"""Shares of work: all of it, once, in a row or by cost."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as some

from losparse_cli.parallel.shares import cut, deal, share, spread

COSTS = some.lists(some.integers(0, 10**9), min_size=1, max_size=60)


@given(COSTS, some.data())
def test_runs_hold_everything_once_and_none_is_empty(costs: list[int], data: some.DataObject) -> None:
    count = data.draw(some.integers(1, len(costs)))
    runs = cut(costs, count)
    assert len(runs) == count
    assert all(runs)
    assert list(chain(*runs)) == list(range(len(costs)))


@given(COSTS, some.data())
def test_no_run_is_longer_than_its_share_by_more_than_the_dearest_unit(costs: list[int], data: some.DataObject) -> None:
    count = data.draw(some.integers(1, len(costs)))
    dear = max(costs)
    # A run that has to take one unit, however dear, pushes those behind it by no more than that unit.
    assert all(sum(costs[k] for k in run) <= sum(costs) / count + count * dear for run in cut(costs, count))


def test_equal_costs_are_cut_evenly() -> None:
    assert [len(run) for run in cut([5] * 24, 4)] == [6, 6, 6, 6]


@pytest.mark.parametrize("count", [0, 4])
def test_there_are_no_more_runs_than_costs(count: int) -> None:
    with pytest.raises(ValueError, match=f"no {count} runs"):
        cut([1, 2, 3], count)


@given(some.integers(0, 200), some.integers(1, 16))
def test_shares_follow_one_another(count: int, size: int) -> None:
    shares = [share(count, rank, size) for rank in range(size)]
    assert list(chain(*shares)) == list(range(count))
    assert max(map(len, shares)) == -(-count // size)


@given(some.lists(some.floats(0, 1e12), max_size=40), some.integers(1, 8))
def test_what_is_dealt_is_no_more_uneven_than_the_dearest_piece(costs: list[float], size: int) -> None:
    owners = deal(costs, size)
    taken = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(size)]
    assert max(taken) <= sum(costs) / size + max(costs, default=0.0) + 1e-3


@given(some.lists(some.integers(0, 6), max_size=20))
def test_members_of_groups_are_spread_each_once(sizes: list[int]) -> None:
    found = spread(sizes)
    assert sorted(found) == [(group, place) for group, n in enumerate(sizes) for place in range(n)]
    assert [place for _, place in found] == sorted(place for _, place in found)


@given(some.integers(1, 20), some.integers(1, 6), some.integers(1, 6))
def test_ranks_have_about_as_many_of_each_group(groups: int, members: int, size: int) -> None:
    found = spread([members] * groups)
    for rank in range(size):
        mine = [found[k][0] for k in share(len(found), rank, size)]
        assert all(mine.count(group) <= -(-members // size) + 1 for group in range(groups))
