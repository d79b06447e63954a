"""Shares of a budget: met, within reach, and where they lower the cost most."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losparse_cli.budget.allocate import REACH, Curve, allocate

KEEP = 0.6
PLACES = (KEEP - REACH, KEEP, KEEP + REACH)


def curve(
    size: float = 1000.0, middle: float = 0.1, steepness: float = 2.0, weight: float = 1.0, keep: float = KEEP
) -> Curve:
    """An error that falls by the factor `steepness` from the least share to the middle, and again to the largest."""
    places = (max(0.02, keep - REACH), keep, min(1.0, keep + REACH))
    return Curve(size, places, (middle * steepness, middle, middle / steepness), weight)


curves = st.builds(
    curve,
    size=st.floats(1e2, 1e6),
    middle=st.floats(1e-4, 0.5),
    steepness=st.floats(1.05, 5.0),
    weight=st.floats(1e-4, 1e3),
)
models = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), curves, min_size=1, max_size=12)


def mean(layers: dict[str, Curve], shares: dict[str, float]) -> float:
    return sum(c.size * shares[name] for name, c in layers.items()) / sum(c.size for c in layers.values())


def cost(layers: dict[str, Curve], shares: dict[str, float]) -> float:
    return sum(c.cost(shares[name]) for name, c in layers.items())


@given(models)
def test_the_budget_is_met_within_reach(layers: dict[str, Curve]) -> None:
    shares = allocate(layers, KEEP)
    assert shares.keys() == layers.keys()
    assert all(KEEP - REACH - 1e-9 <= share <= KEEP + REACH + 1e-9 for share in shares.values())
    assert mean(layers, shares) == pytest.approx(KEEP, rel=0.005)
    assert mean(layers, shares) <= KEEP + 1e-9


@given(models)
def test_it_is_no_worse_than_every_layer_alike(layers: dict[str, Curve]) -> None:
    shares = allocate(layers, KEEP)
    assert cost(layers, shares) <= 1.01 * cost(layers, dict.fromkeys(layers, KEEP))


@given(models, st.floats(1.5, 100.0))
def test_a_layer_that_matters_more_gets_no_less(layers: dict[str, Curve], factor: float) -> None:
    twin = curve(size=next(iter(layers.values())).size)
    heavier = Curve(twin.size, twin.keep, twin.error, twin.weight * factor)
    shares = allocate({**layers, "twin": twin, "heavier": heavier}, KEEP)
    assert shares["heavier"] >= shares["twin"] - 1e-9


@given(st.floats(1.1, 3.0), st.floats(1.05, 3.0))
def test_a_steeper_curve_gets_no_less(steepness: float, factor: float) -> None:
    """Of two layers whose errors are alike at the uniform size, and whose weights are."""
    layers = {"flat": curve(steepness=steepness), "steep": curve(steepness=steepness * factor)}
    # Equal slopes are worth as much: only where the steep one is already so good does it need no more.
    shares = allocate(layers, KEEP)
    assert cost(layers, shares) <= cost(layers, {"flat": KEEP, "steep": KEEP}) + 1e-12
    price = {name: c.cost(KEEP) - c.cost(KEEP + 0.01) for name, c in layers.items()}
    assert price["steep"] > price["flat"]
    assert shares["steep"] >= shares["flat"] - 1e-9


@given(st.integers(1, 9), st.floats(1e-3, 0.5), st.floats(1.01, 5.0), st.floats(1e-6, 1e6))
def test_equal_layers_are_treated_alike(count: int, middle: float, steepness: float, weight: float) -> None:
    layers = {f"layer{k}": curve(middle=middle, steepness=steepness, weight=weight) for k in range(count)}
    shares = allocate(layers, KEEP)
    assert max(shares.values()) - min(shares.values()) < 1e-9
    assert shares["layer0"] == pytest.approx(KEEP, abs=2 * REACH / 80)


@pytest.mark.slow
@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0.01, 0.5), st.floats(1.1, 4.0), st.floats(0.1, 10.0)), min_size=3, max_size=3))
def test_no_choice_on_a_grid_is_better(settings_of: list[tuple[float, float, float]]) -> None:
    layers = {
        str(k): curve(size=1000.0 * (k + 1), middle=middle, steepness=steepness, weight=weight)
        for k, (middle, steepness, weight) in enumerate(settings_of)
    }
    found = cost(layers, allocate(layers, KEEP))
    grid = [KEEP - REACH + 2 * REACH * i / 20 for i in range(21)]
    best = min(
        cost(layers, shares)
        for choice in product(grid, repeat=3)
        if mean(layers, shares := dict(zip(layers, choice, strict=True))) <= KEEP + 1e-9
    )
    assert found <= 1.01 * best


@pytest.mark.parametrize("keep", [0.01, 0.05, 0.5, 0.97, 1.0])
def test_shares_stay_shares_at_either_end(keep: float) -> None:
    layers = {
        "a": Curve(10.0, (0.02, 0.5, 1.0), (0.5, 0.1, 0.01), 1.0),
        "b": Curve(1000.0, (0.02, 0.5, 1.0), (0.9, 0.5, 0.01), 100.0),
    }
    shares = allocate(layers, keep)
    assert all(0.02 <= share <= 1.0 + 1e-9 for share in shares.values())
    assert mean(layers, shares) == pytest.approx(max(keep, 0.02), rel=0.005)


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.95, 1.0])
def test_where_the_reach_ends_at_a_whole_layer(keep: float) -> None:
    layers = {"a": curve(keep=keep, weight=2.0), "b": curve(keep=keep, size=500.0)}
    shares = allocate(layers, keep)
    assert all(0.02 <= share <= 1.0 for share in shares.values())
    assert mean(layers, shares) == pytest.approx(keep, rel=0.005)


def test_a_cost_is_interpolated_by_its_logarithm() -> None:
    one = Curve(10.0, (0.5, 0.6, 0.7), (0.4, 0.1, 0.025), 2.0)
    assert [one.cost(share) for share in one.keep] == pytest.approx([0.8, 0.2, 0.05])
    assert one.cost(0.55) == pytest.approx(2 * (0.4 * 0.1) ** 0.5)
    assert one.cost(0.65) == pytest.approx(2 * (0.1 * 0.025) ** 0.5)
    assert one.cost(0.8) == pytest.approx(2 * 0.025 / 4)  # as it went on before
    exact = Curve(10.0, (0.5, 0.6, 0.7), (0.1, 0.0, 0.0), 1.0)
    assert 0 < exact.cost(0.7) < 1e-11


def test_a_layer_without_a_say_gives_what_it_may() -> None:
    layers = {"idle": curve(weight=0.0), "busy": curve(weight=1.0)}
    shares = allocate(layers, KEEP)
    assert shares["idle"] == pytest.approx(KEEP - REACH, abs=1e-6)
    assert shares["busy"] == pytest.approx(KEEP + REACH, abs=1e-6)
