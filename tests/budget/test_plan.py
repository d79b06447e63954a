"""Plans: rank and nnz by the request, and bounds that no S exceeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losparse_cli.budget.plan import Layer, count_nnz, make_plan, plan_layer
from losparse_cli.budget.recipe import CALIBRATED_KEEP, DEFAULT_KEEP, Recipe
from losparse_cli.errors import UsageError
from losparse_cli.linalg.patterns import parse_pattern, select
from losparse_cli.shim.codec import smallest


def layer(m: int, n: int, name: str = "model.layers.0.mlp.up_proj", itemsize: int = 2) -> Layer:
    return Layer(name, f"{name}.weight", name, (m, n), itemsize)


shapes = st.tuples(st.integers(1, 70), st.integers(1, 70))
patterns = st.sampled_from(["unstructured", "rows", "columns", "2:4", "1:3", "5:16"])


@given(shapes, st.floats(0, 1), patterns, st.sampled_from(["matrix", "row"]))
def test_a_pattern_can_keep_the_count_exactly(shape: tuple[int, int], density: float, pattern: str, scope: str) -> None:
    nnz = count_nnz(shape, density, pattern, scope)
    support = select(torch.rand(shape), parse_pattern(pattern), nnz, scope)
    assert int(support.sum()) == nnz


@given(shapes, st.floats(0, 1), patterns, st.integers(0, 9), st.sampled_from([2, 4, 8]), st.data())
def test_no_support_takes_more_than_its_bound(
    shape: tuple[int, int], density: float, pattern: str, rank: int, itemsize: int, data: st.DataObject
) -> None:
    """Neither one spread at random, nor one crowded into a corner, which a gap layout likes least."""
    m, n = shape
    rank = min(rank, m, n)
    nnz = count_nnz(shape, density, pattern, "matrix")
    if not rank and not nnz:
        return
    recipe = Recipe(rank=rank, sparsity=None if ":" in pattern else 1 - density, pattern=pattern)
    plan = plan_layer(layer(m, n, itemsize=itemsize), recipe.settled())
    assert (plan.rank, plan.nnz) == (rank, nnz)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    scores = torch.rand(shape, generator=generator)
    crowded = torch.arange(m * n, dtype=torch.float32).view(m, n)
    striped = (crowded % data.draw(st.integers(1, 600)) == 0).float()
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    for scored in (scores, crowded, -crowded, striped):
        spec, index = smallest(select(scored, parse_pattern(pattern), nnz), rank, pattern)
        stored = spec.nbytes(dtype)
        assert stored <= plan.bound_bytes
        values = rank * (m + n) * itemsize + nnz * itemsize
        assert stored == values + sum(tensor.numel() * tensor.itemsize for tensor in index.values())


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize(
    "more", [{"values": "float"}, {"rank": 8}, {"rank_ratio": 0.4}, {"pattern": "rows"}, {"pattern": "columns"}]
)
def test_keep_is_what_is_expected_to_be_stored(keep: float, more: dict[str, Any]) -> None:
    plan = plan_layer(layer(512, 768), Recipe(keep=keep, **more).settled())
    assert plan.expected_bytes <= keep * plan.layer.dense_bytes + 1
    assert plan.expected_bytes == pytest.approx(
        keep * plan.layer.dense_bytes, rel=0.005 if "pattern" not in more else 0.05
    )
    assert plan.expected_bytes <= plan.bound_bytes


@pytest.mark.parametrize("keep", [0.6, 0.7, 0.9])
def test_where_s_is_settled_the_rank_takes_the_rest(keep: float) -> None:
    plan = plan_layer(layer(512, 768), Recipe(keep=keep, pattern="2:4").settled())
    assert plan.nnz == 512 * 768 // 2
    assert 0 <= keep * plan.layer.dense_bytes - plan.expected_bytes < 2 * (512 + 768) + 1
    alone = plan_layer(layer(512, 768), Recipe(keep=keep, rank_ratio=1).settled())
    assert alone.nnz == 0
    assert alone.rank == int(keep * 512 * 768 / (512 + 768))


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.9])
def test_rank_ratio_is_the_share_of_the_kept_parameters(ratio: float) -> None:
    plan = plan_layer(layer(512, 768), Recipe(keep_parameters=0.4, rank_ratio=ratio).settled())
    assert plan.parameters == pytest.approx(0.4 * 512 * 768, rel=0.01)
    assert plan.rank * (512 + 768) == pytest.approx(ratio * plan.parameters, abs=512 + 768)


def test_a_layer_that_would_not_shrink_stays_dense_and_says_why() -> None:
    layers = [layer(64, 64, "a"), layer(512, 512, "b")]
    plan = make_plan(layers, {"head": "output head"}, Recipe(rank=40, sparsity=0.95))
    assert [p.layer.name for p in plan.layers] == ["b"]
    assert plan.skipped == {"head": "output head", "a": "rank 40 factors are no smaller than the 64 x 64 matrix"}
    plan = make_plan(layers, {}, Recipe(rank=20, sparsity=0.6))
    assert "would not shrink" in plan.skipped["a"]


def test_nothing_to_do_is_an_error_with_the_reason() -> None:
    with pytest.raises(UsageError, match=r"rank 40 factors.*64 x 64.*Lower --rank"):
        make_plan([layer(64, 64)], {}, Recipe(rank=40))
    with pytest.raises(UsageError, match=r"losparse inspect"):
        make_plan([], {"head": "output head"}, Recipe())


@pytest.mark.parametrize(
    "fields", [{"keep": 0}, {"sparsity": 1}, {"keep_parameters": 0}, {"keep": 1e-9}, {"rank_ratio": 1, "keep": 0}]
)
def test_a_layer_of_which_nothing_is_left_is_an_error(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"model\.layers\.0\.mlp\.up_proj \(64 x 96\) would have nothing left"):
        plan_layer(layer(64, 96), Recipe(values="float", **fields).settled())


def test_a_budget_that_cannot_hold_the_factors_is_an_error() -> None:
    for fields in ({"keep": 0.1, "rank": 8}, {"keep": 0.3, "pattern": "2:4"}, {"keep_parameters": 0.01, "rank": 8}):
        with pytest.raises(UsageError, match=r"up_proj \(64 x 96\) does not fit the budget.*Lower --rank"):
            plan_layer(layer(64, 96), Recipe(values="float", **fields).settled())


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 0, "sparsity": 0.7, "pattern": "rows"},
        {"rank": 0, "sparsity": 0.995},
        {"rank": 0, "sparsity": 0.995, "threshold_scope": "row"},
        {"keep": 0.02},
        {"keep": 0.3, "pattern": "rows"},
        {"keep": 0.2, "rank_ratio": 1},
        {"keep_parameters": 0.005},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_a_gate_of_one_row_is_left_dense_with_the_reason(fields: dict[str, Any]) -> None:
    """ModelCloud/GPTQModel#1439: shared_expert_gate of Qwen's mixtures of experts has one output."""
    gate, other = layer(1, 64, "shared_expert_gate"), layer(512, 512)
    plan = make_plan([gate, other], {}, Recipe(values="float", **fields))
    assert [p.layer for p in plan.layers] == [other]
    assert "would have nothing left" in plan.skipped["shared_expert_gate"]
    with pytest.raises(UsageError, match=r"shared_expert_gate .* would have nothing left"):
        make_plan([gate], {}, Recipe(values="float", **fields))


def test_the_sums_of_a_plan() -> None:
    plan = make_plan([layer(256, 256, "a"), layer(512, 256, "b")], {}, Recipe(rank=4, sparsity=0.9))
    assert plan.dense_bytes == 2 * (256 * 256 + 512 * 256)
    assert plan.expected_bytes == sum(p.expected_bytes for p in plan.layers)
    assert plan.bound_bytes == sum(p.bound_bytes for p in plan.layers)
    assert plan.expected_bytes <= plan.bound_bytes < plan.dense_bytes
    assert plan.workspace_bytes >= 512 * 256 * 4


@pytest.mark.parametrize(("calibrated", "keep"), [(False, DEFAULT_KEEP), (True, CALIBRATED_KEEP)])
def test_what_an_override_leaves_open_is_settled_as_for_all(calibrated: bool, keep: float) -> None:
    """N:M has a size by itself; a layer that is taken out of it has none, until it is settled."""
    recipe = Recipe(pattern="2:4", overrides=(("*.up_proj", (("pattern", "unstructured"),)),))
    plan = make_plan([layer(512, 768)], {}, recipe.settled(calibrated=calibrated), calibrated=calibrated).layers[0]
    assert plan.expected_bytes == pytest.approx(keep * plan.layer.dense_bytes, rel=0.01)
