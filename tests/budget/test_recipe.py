"""Recipes: what flags and files say, what they may not say, and which of them wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from losparse_cli.budget.recipe import Recipe, make_recipe, recipe_of
from losparse_cli.budget.recipe_file import read_recipe
from losparse_cli.errors import RecipeError, UsageError


def from_text(text: str, folder: Path, **flags: Any) -> Recipe:
    (folder / "recipe.yaml").write_text(text)
    return make_recipe(flags, folder / "recipe.yaml")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rank": -1}, "--rank"),
    ({"rank": 1.5}, "--rank"),
    ({"rank": True}, "--rank"),
    ({"sparsity": 1.01}, "--sparsity"),
    ({"sparsity": float("nan")}, "--sparsity"),
    ({"sparsity": "0.5"}, "--sparsity"),
    ({"sparsity": True}, "--sparsity"),
    ({"keep": -0.1}, "--keep"),
    ({"keep_parameters": 2}, "--keep-parameters"),
    ({"rank_ratio": 1.1}, "--rank-ratio"),
    ({"rank": 1, "rank_ratio": 0.5}, "--rank and --rank-ratio contradict"),
    ({"sparsity": 0.5, "keep": 0.5, "keep_parameters": 0.5}, "--sparsity and --keep and --keep-parameters contradict"),
    ({"rank_ratio": 1, "sparsity": 0.9}, "--rank-ratio 1"),
    ({"threshold_scope": "layer"}, "--threshold-scope"),
    ({"iterations": 0}, "--iterations"),
    ({"iterations": 2.0}, "--iterations"),
    ({"seed": "x"}, "--seed"),
    ({"targets": (5,)}, "--targets"),
    ({"ignore": ("",)}, "--ignore"),
    ({"pattern": "2:2"}, "--pattern"),
    ({"pattern": "2:17"}, "--pattern"),
    ({"pattern": "two:four"}, "--pattern"),
    ({"pattern": 124}, "--pattern"),
    ({"pattern": "2:4", "sparsity": 0.4}, "--pattern 2:4 has sparsity 0.5"),
    ({"pattern": "2:4", "rank": 4, "keep_parameters": 0.5}, "--pattern 2:4 fixes S"),
]


@pytest.mark.parametrize(("fields", "says"), WRONG, ids=[str(fields) for fields, _ in WRONG])
def test_a_recipe_that_cannot_be(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as raised:
        Recipe(**fields)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    "fields",
    [{}, {"rank": 0}, {"sparsity": 0}, {"sparsity": 1}, {"keep": 1}, {"rank_ratio": 1}, {"seed": -3},
     {"rank_ratio": 1, "sparsity": 1}, {"pattern": "2:4", "sparsity": 0.5}, {"pattern": "1:16", "rank": 8},
     {"pattern": "2:4", "keep": 0.6}],
)  # fmt: skip
def test_a_recipe_at_the_edge_of_what_may_be(fields: dict[str, Any]) -> None:
    recipe = Recipe(**fields)
    assert all(getattr(recipe, name) == value for name, value in fields.items())


@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        ({"keep": 60}, "0.6"),
        ({"sparsity": 90}, "0.9"),
        ({"rank_ratio": 20}, "0.2"),
        ({"keep_parameters": 12.5}, "0.125"),
    ],
)
def test_a_share_given_in_percent_is_asked_about(fields: dict[str, Any], meant: str) -> None:
    with pytest.raises(UsageError, match=rf"between 0 and 1, not \d[\d.]*\. Did you mean {meant}\?$"):
        Recipe(**fields)
    with pytest.raises(UsageError, match=r"a share between 0 and 1, not 1000\.$"):
        Recipe(keep=1000)


def test_overrides_apply_where_their_glob_matches_and_later_ones_win(tmp_path: Path) -> None:
    recipe = from_text(
        "rank: 8\nsparsity: 0.9\n"
        "layers:\n  '*.mlp.*': {rank: 16}\n  '*.mlp.up_proj': {rank_ratio: 0.5, keep: 0.4}\n"
        "  '*.q_proj': {pattern: 2:4}\n",
        tmp_path,
    )
    assert recipe.for_layer("model.layers.0.self_attn.k_proj") == Recipe(
        rank=8, sparsity=0.9, overrides=recipe.overrides
    )
    gate = recipe.for_layer("model.layers.0.mlp.gate_proj")
    assert (gate.rank, gate.sparsity) == (16, 0.9)
    up = recipe.for_layer("model.layers.0.mlp.up_proj")
    assert (up.rank, up.rank_ratio, up.sparsity, up.keep) == (None, 0.5, None, 0.4)
    q = recipe.for_layer("model.layers.0.self_attn.q_proj")
    assert (q.rank, q.pattern, q.sparsity) == (8, "2:4", None)  # 2:4 says itself how sparse it is


def test_a_flag_wins_everywhere(tmp_path: Path) -> None:
    text = "rank: 8\nsparsity: 0.9\nseed: 3\nlayers:\n  '*.mlp.*': {rank: 16, pattern: rows}\n"
    recipe = from_text(text, tmp_path, rank_ratio=0.25, keep=0.5)
    for name in ("model.mlp.x", "model.other"):
        layer = recipe.for_layer(name)
        assert (layer.rank, layer.rank_ratio, layer.sparsity, layer.keep) == (None, 0.25, None, 0.5)
    assert recipe.for_layer("model.mlp.x").pattern == "rows"
    assert recipe.seed == 3


def test_flags_that_were_not_given_change_nothing(tmp_path: Path) -> None:
    flags = {"rank": None, "targets": ()}
    assert from_text("rank: 8\ntargets: '*.mlp.*'\n", tmp_path, **flags) == Recipe(rank=8, targets=("*.mlp.*",))
    assert make_recipe(flags) == Recipe()


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("", {}),
        ("# nothing\n", {}),
        ("pattern: 2:4", {"pattern": "2:4"}),
        ("pattern: 1:8\nrank: 3", {"pattern": "1:8", "rank": 3}),
        ("sparsity: 1e-1", {"sparsity": 0.1}),
        ("sparsity: .5", {"sparsity": 0.5}),
        ("keep: 1", {"keep": 1}),
        ("seed: -12", {"seed": -12}),
        ("targets: '*.mlp.*'", {"targets": ("*.mlp.*",)}),
        ("targets: [a, b]\nignore: [c]", {"targets": ("a", "b"), "ignore": ("c",)}),
        ("ignore: []", {"ignore": ()}),
        ("ignore:", {"ignore": ()}),
        ("layers:", {}),
    ],
)
def test_what_a_file_says(text: str, fields: dict[str, Any], tmp_path: Path) -> None:
    assert from_text(text, tmp_path) == Recipe(**fields)


@pytest.mark.parametrize("text", ["rank: 010", "seed: 0x10", "rank: 1_000", "rank: 8.0", "rank: '8'", "sparsity: .nan"])
def test_numbers_that_are_none_are_not_guessed(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        from_text(text, tmp_path)


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['true']", "rank: !!python/name:os.system", "a: &a [*a]"]
)
def test_a_file_can_run_nothing(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        from_text(text, tmp_path)


def test_a_contradiction_of_file_and_flag_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml: 'pattern: 2:4' has .* itself; leave out --sparsity 0\.8\.$"):
        from_text("pattern: 2:4", tmp_path, sparsity=0.8)
    says = r"recipe\.yaml, layers: \*\.mlp\.\*: --pattern 2:4 has .* itself; leave out 'sparsity: 0\.9'\.$"
    with pytest.raises(RecipeError, match=says):
        from_text("layers: {'*.mlp.*': {sparsity: 0.9}}", tmp_path, pattern="2:4")


def test_what_options_alone_do_wrong_is_no_fault_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--rank must be a whole number") as raised:
        from_text("sparsity: 0.9\nrank: 4", tmp_path, rank=-1)
    assert not isinstance(raised.value, RecipeError)


fields = st.fixed_dictionaries(
    {},
    optional={
        "rank": st.integers(0, 64),
        "sparsity": st.floats(0, 1),
        "pattern": st.sampled_from(["unstructured", "rows", "columns"]),
        "iterations": st.integers(1, 9),
        "seed": st.integers(-(2**63), 2**63),
    },
)


@given(fields)
def test_a_recipe_survives_its_json_form(given_fields: dict[str, Any]) -> None:
    recipe = Recipe(**given_fields)
    content = recipe.to_dict()
    assert content.keys() == {*Recipe.__dataclass_fields__} - {"overrides"} | {"layers"}
    assert recipe_of(read_recipe(json.loads(json.dumps(content))), {}) == recipe


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("fields", [
    {}, {"keep": 0.6, "rank_ratio": 0.5}, {"rank": 8, "sparsity": 0.9}, {"bits": 4.0, "rank": 2}, {"pattern": "2:4"},
    {"pattern": "2:4", "value_bits": 4.0}, {"size": "90MB"}, {"targets": "q_proj", "ignore": ["re:.*0"], "keep": 0.4},
])  # fmt: skip
def test_a_settled_recipe_is_taken_back_as_a_mapping(fields: dict[str, Any], calibrated: bool) -> None:
    """As `forecast` and a report have it, reports of before too."""
    layers = (("*.q_proj", (("sparsity", 0.75),)),) if "sparsity" in fields else ()
    recipe = Recipe(**fields, overrides=layers).settled(calibrated=calibrated)
    content = json.loads(json.dumps(recipe.to_dict()))
    assert recipe_of(read_recipe(content), {}) == recipe
    content["overrides"] = content.pop("layers")
    assert recipe_of(read_recipe(content), {}) == recipe


def test_settings_that_are_known_are_all_named() -> None:
    with pytest.raises(RecipeError, match=r"unknown setting 'rnak'; known are rank, .*seed, layers, calibration"):
        read_recipe({"rnak": 4})


def test_a_pattern_with_its_own_density_takes_the_place_of_a_ratio_that_nobody_asked_for(tmp_path: Path) -> None:
    """The settled recipe of a run with text has a rank ratio, which N:M under a budget does not leave room for."""
    for calibrated in (False, True):
        recipe = Recipe(keep=0.8, overrides=(("*.q_proj", (("pattern", "2:4"),)),)).settled(calibrated=calibrated)
        assert recipe.for_layer("model.layers.0.self_attn.q_proj").rank_ratio is None
        assert recipe.for_layer("model.layers.0.self_attn.k_proj").rank_ratio == (0.2 if calibrated else 0.0)
