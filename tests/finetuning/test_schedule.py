"""The cubic schedule against its formula, its phases, and the requests that it refuses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from losparse_cli.errors import UsageError
from losparse_cli.finetuning.schedule import CubicSchedule


def test_the_formula() -> None:
    """r(t) = r_T + (r_0 − r_T) (1 − (t − t_i) / (T − t_i − t_f))³, written out for one run."""
    schedule = CubicSchedule(0.15, total=100, initial_warmup=10, final_warmup=30)
    assert [schedule.remaining(step) for step in (1, 5, 10)] == [1.0, 1.0, 1.0]
    assert schedule.remaining(11) == pytest.approx(0.15 + 0.85 * (59 / 60) ** 3)
    assert schedule.remaining(40) == pytest.approx(0.15 + 0.85 / 8)
    assert schedule.remaining(69) == pytest.approx(0.15 + 0.85 / 60**3)
    assert [schedule.remaining(step) for step in (70, 71, 100)] == [0.15, 0.15, 0.15]


@given(
    total=st.integers(1, 400), before=st.integers(0, 200), after=st.integers(0, 200), every=st.integers(1, 50),
    start=st.floats(0, 1), ratio=st.floats(0, 1),
)  # fmt: skip
def test_phases(total: int, before: int, after: int, every: int, start: float, ratio: float) -> None:
    share = start * ratio
    if before + after >= total:
        with pytest.raises(UsageError, match="-warmup-steps"):
            CubicSchedule(share, total, before, after, every, start)
        return
    schedule = CubicSchedule(share, total, before, after, every, start)
    shares = [schedule.remaining(step) for step in range(1, total + 1)]
    renewed = [step for step in range(1, total + 1) if schedule.renews(step)]
    assert all(a >= b for a, b in pairwise(shares))
    assert all(share <= s <= start for s in shares)
    assert all(s == start for s in shares[:before])
    assert all(s == share for s in shares[total - after - 1 :])  # exactly, and at the last step in any case
    assert not any(step <= before for step in renewed)
    assert set(renewed) >= set(range(max(1, total - after), total + 1))  # every step of the last phase
    between = range(before + 1, total - after)
    assert [step for step in renewed if step in between] == [step for step in between if step % every == 0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"share": 0.6, "start": 0.5}, "60.0% of S is asked for, and it holds 50.0%"),
        ({"initial_warmup": -1}, "whole numbers >= 0"),
        ({"final_warmup": -1}, "whole numbers >= 0"),
        ({"every": 0}, ">= 1"),
        ({"initial_warmup": 4, "final_warmup": 6}, "Of 10 steps, 4 and 6 are to be before and after"),
        ({"total": 1, "initial_warmup": 1}, "train longer"),
    ],
)
def test_what_does_not_fit(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        CubicSchedule(**{"share": 0.5, "total": 10, "initial_warmup": 0, "final_warmup": 0} | settings)
