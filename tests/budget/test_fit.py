"""A size of everything -> bits, or shares kept: never above it, and near it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from losparse_cli.budget.fit import plan_within
from losparse_cli.budget.plan import Layer, Plan, make_plan
from losparse_cli.budget.recipe import MOST_BITS, Recipe
from losparse_cli.budget.units import parse_size
from losparse_cli.errors import UsageError

BESIDE = 70_000
LAYERS = [
    Layer(f"model.layers.{k}.{name}", f"{k}.{name}.weight", f"{k}.{name}", shape, 2)
    for k in range(3)
    for name, shape in (("mlp.up_proj", (1024, 256)), ("attn.q_proj", (256, 256)), ("gate", (8, 64)))
]
ROWS = Layer("embed", "embed.weight", "embed", (2000, 256), 2, rows="embedding")
DENSE = BESIDE + sum(layer.dense_bytes for layer in (*LAYERS, ROWS))


def total(plan: Plan) -> int:
    """As in a folder: what is planned, what stays dense, and other files."""
    planned = {p.layer.name for p in plan.layers}
    return BESIDE + plan.bound_bytes + sum(x.dense_bytes for x in (*LAYERS, ROWS) if x.name not in planned)


def within(size: Any, **fields: Any) -> Plan:
    recipe = Recipe(size=size, **fields).settled()
    return plan_within([*LAYERS, ROWS] if recipe.coded else LAYERS, {}, recipe, total)


@given(st.integers(DENSE // 4, 45 * DENSE // 100))
def test_the_result_is_as_large_as_asked_for_and_hardly_smaller(size: int) -> None:
    plan = within(size)
    assert 0.9995 * size <= total(plan) <= size
    assert len({p.bits for p in plan.layers if not p.layer.rows}) == 1
    assert next(p.bits for p in plan.layers if p.layer.rows) == 7


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 4},
        {"embedding_bits": 5},
        {"embedding_bits": "none"},
        {"overrides": (("*.mlp.*", (("bits", 5),)),)},
        {"overrides": (("*.mlp.*", (("keep", 0.25),)),)},
        {"overrides": (("*.mlp.*", (("sparsity", 0.5),)),)},
        {"values": "codes", "pattern": "2:4"},
    ],
    ids=str,
)
def test_with_settings_of_other_kinds(fields: dict[str, Any]) -> None:
    size = 1_400_000 if fields.get("embedding_bits") == "none" else 1_100_000
    layers = [x for x in (*LAYERS, ROWS) if fields.get("embedding_bits") != "none" or not x.rows]
    values = {"values": "codes"} if "rank" in fields or "sparsity" in str(fields) else {}
    recipe = Recipe(size=size, **fields, **values).settled()
    plan = plan_within(layers, {}, recipe, total)
    assert 0.9995 * size <= total(plan) <= size
    up = next(p for p in plan.layers if "mlp" in p.layer.name)
    if "bits" in str(fields) and "overrides" in fields:
        assert up.bits == 5
    if "sparsity" in str(fields) or "pattern" in fields:
        assert up.sparse


@pytest.mark.parametrize("fields", [{}, {"rank": 4}, {"pattern": "rows"}, {"pattern": "2:4"}, {"rank_ratio": 0.3}])
def test_floats_keep_as_much_as_the_size_leaves_them(fields: dict[str, Any]) -> None:
    layers = LAYERS[::3] + LAYERS[1::3]
    beside = BESIDE + sum(layer.dense_bytes for layer in layers)

    def nbytes(plan: Plan) -> int:
        return beside - plan.dense_bytes + plan.bound_bytes

    recipe = Recipe(size=1_500_000, values="float", **fields).settled()
    assert recipe.keep is None
    plan = plan_within(layers, {}, recipe, nbytes)
    assert 0.985 * 1_500_000 <= nbytes(plan) <= 1_500_000
    assert all(p.iterations == 4 for p in plan.layers)


@pytest.mark.parametrize("fields", [{}, {"rank": 8, "values": "codes"}, {"values": "float"}], ids=str)
def test_too_small_a_size_is_refused_with_the_least_there_is(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"--size 10kB is too little.* (\S+) is the smallest result") as raised:
        within("10kB", **fields)
    least = re.search(r" (\S+) is the smallest", str(raised.value))
    assert least is not None
    assert total(within(least[1], **fields)) <= parse_size(least[1])
    less = f"{0.9 * parse_size(least[1]):.0f}"
    with pytest.raises(UsageError, match=rf"--size {less} \(bytes\) is too little"):
        within(less, **fields)


def test_no_less_than_the_dense_model_is_refused() -> None:
    for size in (DENSE, "1GB"):
        with pytest.raises(UsageError, match=rf"--size {size}( \(bytes\))? is no less than the 3.064MB of the dense"):
            within(size)


def test_more_than_whole_numbers_can_use_is_said() -> None:
    plan = within(3 * DENSE // 4)
    assert {p.bits for p in plan.layers if not p.layer.rows} == {MOST_BITS}
    [note] = plan.notes
    assert "as it cannot use all of --size" in note
    assert not within(DENSE // 3).notes


def test_what_has_no_plan_at_any_size_says_why() -> None:
    layers = [Layer("a", "a.weight", "a", (64, 64), 2)]
    with pytest.raises(UsageError, match=r"rank 40 factors are no smaller than the 64 x 64 matrix"):
        plan_within(layers, {}, Recipe(size=9000, rank=40, values="codes").settled(), total)


def test_a_size_that_bits_come_to_gives_those_bits() -> None:
    made = make_plan([*LAYERS, ROWS], {}, Recipe(bits=3.3).settled())
    again = within(total(made) + 10)
    assert next(iter(again.layers)).bits == pytest.approx(3.3, abs=0.001)
