"""Bits foreseen from a sample, against the entropy of all codes; a step that spends what it is given."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losparse_cli.linalg.rates import Curve, curve, step_within


def gaussian_bits(ratio: float) -> float:
    """Entropy of a Gaussian of deviation `ratio`, rounded to whole numbers."""
    edges = torch.arange(-200, 201).double() - 0.5
    p = torch.distributions.Normal(0.0, ratio).cdf(edges).diff()
    p = p[p > 0]
    return float(-(p * p.log2()).sum())


@pytest.mark.parametrize("octave", [-5.0, -2.25, -1.0, 0.0, 1.5])
def test_what_is_foreseen_is_the_entropy(octave: float) -> None:
    X = 3.0 * torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    found = curve(X)
    assert found.at(math.log2(3.0) + octave) == pytest.approx(gaussian_bits(2.0**-octave), abs=0.03)


def test_rows_of_unlike_size_have_frequencies_of_their_own() -> None:
    X = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 512)[:, None]
    alike = X[torch.randperm(512, generator=torch.Generator().manual_seed(1))].view(-1)[torch.randperm(512 * 512)]
    assert curve(X).at(0.0) < curve(alike.view(512, 512)).at(0.0) - 0.1


def test_beyond_the_finest_step_each_octave_costs_a_bit() -> None:
    found = curve(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    assert found.at(-40.0) == pytest.approx(found.at(-30.0) + 10)
    assert found.at(40.0) == 0.0


def test_codes_of_which_a_pattern_leaves_some_take_what_the_others_do_and_their_places() -> None:
    X = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    alone = curve(X)
    among = alone.spread(0.25, 0.5)
    for step in (-30.0, -4.0, 0.0, 40.0):
        assert among.at(step) == pytest.approx(0.25 * alone.at(step) + 0.5)
    where = torch.rand(256, 512, generator=torch.Generator().manual_seed(1)) < 0.25
    found = curve(X * where, 0.25)
    places = -0.25 * math.log2(0.25) - 0.75 * math.log2(0.75)
    assert found.at(-6.0) == pytest.approx(0.25 * alone.at(-6.0) + places, abs=0.05)
    assert found.at(-40.0) == pytest.approx(found.at(-30.0) + 2.5)


@pytest.mark.parametrize("density", [1.0, 0.25])
def test_a_layer_of_zeros_takes_nothing_at_any_step(density: float) -> None:
    nothing = curve(torch.zeros(40, 30), density)
    assert [nothing.at(step) for step in (-40.0, -11.0, 0.0, 9.0)] == [0.0] * 4
    assert nothing.spread(0.5, 0.75).at(-40.0) == 0.75


@given(st.lists(st.tuples(st.floats(-8, 8), st.integers(1, 10_000)), min_size=1, max_size=5), st.floats(0.2, 9))
def test_a_budget_is_spent_and_no_more(sizes: list[tuple[float, int]], bits: float) -> None:
    shape = tuple(max(0.0, 10.0 - k / 2) for k in range(29))
    layers = [(Curve(anchor, shape), count) for anchor, count in sizes]
    budget = bits * sum(count for _, count in layers)
    step = step_within(layers, budget)
    spent = sum(count * one.at(step) for one, count in layers)
    finer = sum(count * one.at(step - 0.01) for one, count in layers)
    assert spent <= budget + 1e-6
    assert finer > budget


def test_bits_beside_the_curve_are_counted() -> None:
    layers = [(curve(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))), 4096)]
    one, other = step_within(layers, 4096 * 4.0), step_within(layers, 4096 * 4.0, offset=1.0)
    assert other == pytest.approx(one + 1, abs=0.1)


def test_where_nothing_is_left_the_step_is_the_coarsest() -> None:
    layers = [(Curve(0.0, tuple(max(1.0, 10.0 - k / 2) for k in range(29))), 100)]
    assert step_within(layers, -5.0) == 4
