"""Which layers a request means: names, globs, classes, expressions, and lists of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from losparse_cli.budget.plan import Layer, make_plan
from losparse_cli.budget.recipe import Recipe, make_recipe
from losparse_cli.budget.targets import choose, matches, only, parts
from losparse_cli.errors import RecipeError, UsageError

LAYERS = [
    f"model.layers.{k}.{name}"
    for k in (0, 1, 10)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
]
KINDS = dict.fromkeys(LAYERS, ("Linear",)) | {"lm_head": ("Linear",), "model.embed_tokens": ("Embedding",)}
DENSE = {"lm_head": "output head", "model.embed_tokens": "embedding"}


def chosen(*targets: str, ignore: tuple[str, ...] = ()) -> list[str]:
    return choose(KINDS, DENSE, targets, ignore)[0]


def of(*names: str) -> list[str]:
    return [layer for layer in LAYERS if layer.endswith(names)]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("q_proj", of("q_proj")),  # PEFT: the name, or the end of it
        ("self_attn.q_proj", of("q_proj")),
        ("model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        ("q_proj,v_proj", of("q_proj", "v_proj")),
        (" q_proj , v_proj ", of("q_proj", "v_proj")),
        ("mlp", of("up_proj", "down_proj")),  # a module and all that lies inside
        ("layers.1", [layer for layer in LAYERS if ".1." in layer]),  # not layers.10
        ("Linear", LAYERS),  # llm-compressor: a class
        ("re:.*q_proj", of("q_proj")),  # llm-compressor: an expression, from the name's begin
        (r"re:.*layers\.[0,1]\..*up_proj$", LAYERS[3:10:5]),
        (r"re:.*\.\d{1,1}\.mlp\.up", LAYERS[3:10:5]),
        ("re:.*q_proj,re:.*v_proj", of("q_proj", "v_proj")),
        ("*.layers.[01].*q_proj", LAYERS[0:10:5]),
        ("*.self_attn.?_proj", of("q_proj", "k_proj", "v_proj")),
    ],
)
def test_a_target_means_what_users_of_peft_and_llm_compressor_expect(target: str, expected: list[str]) -> None:
    assert chosen(target) == expected
    assert chosen(ignore=(target,)) == [layer for layer in LAYERS if layer not in expected]
    recipe = Recipe(keep=0.5, overrides=((target, (("keep", 0.25),)),))
    assert [name for name in LAYERS if recipe.for_layer(name, ("Linear",)).keep == 0.25] == expected


def test_everything_is_chosen_where_nothing_is_asked_and_reasons_are_kept() -> None:
    assert choose(KINDS, DENSE, (), ()) == (LAYERS, DENSE)
    left, skipped = choose(KINDS, DENSE, ("self_attn",), ("*.1.*.q_proj", "v_proj"))
    assert left == [x for x in of("q_proj", "k_proj") if x != "model.layers.1.self_attn.q_proj"]
    assert skipped["model.layers.1.self_attn.q_proj"] == "named by --ignore"
    assert skipped["model.layers.0.mlp.up_proj"] == "not among --targets"
    assert skipped["lm_head"] == "output head"
    assert {*left, *skipped} == {*KINDS}
    assert choose(KINDS, DENSE, (), ("lm_head", "Embedding")) == (LAYERS, DENSE)  # no layer that stays dense anyway


@pytest.mark.parametrize(
    ("targets", "ignore", "option", "near"),
    [
        (("q_porj",), (), "--targets", "q_proj"),
        (("proj",), (), "--targets", "self_attn.q_proj"),  # a whole name, not a part of one
        (("*.q_porj",), (), "--targets", "q_proj"),
        (("*.MLP.*",), (), "--targets", "mlp"),
        (("q_proj", "*.nothing_like_it"), (), "--targets", "model.layers"),
        (("re:q_proj",), (), "--targets", "self_attn.q_proj"),
        (("Conv1D",), (), "--targets", "model.layers"),
        ((), ("*.layers.7.*",), "--ignore", "model.layers"),
    ],
)
def test_a_target_that_means_no_layer_names_near_misses(
    targets: tuple[str, ...], ignore: tuple[str, ...], option: str, near: str
) -> None:
    wrong = (*targets, *ignore)[-1]
    with pytest.raises(UsageError) as raised:
        choose(KINDS, DENSE, targets, ignore)
    assert str(raised.value).startswith(f"{option} {wrong!r} matches no layer. Close names: ")
    assert near in str(raised.value)


@pytest.mark.parametrize("target", [".*q_proj", r"model\.layers\.\d+\.self_attn\.(q|k)_proj", ".*layers.0.*q_proj"])
def test_an_expression_without_its_mark_is_told_how(target: str) -> None:
    with pytest.raises(UsageError, match=r"--targets .* matches no layer\. Did you mean 're:") as raised:
        chosen(target)
    assert str(raised.value).endswith(f"Did you mean 're:{target}'?")
    assert chosen(f"re:{target}")


def test_the_wrong_one_of_a_list_is_named() -> None:
    with pytest.raises(UsageError, match="--targets 'k_porj' matches no layer"):
        chosen("q_proj,k_porj,v_proj")


@pytest.mark.parametrize("target", ["re:(", "q_proj,re:*", "re:[0-"])
def test_what_is_no_expression_is_refused_before_anything_is_read(target: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--targets 're:.*no regular expression"):
        Recipe(targets=(target,))
    file = tmp_path / "recipe.yaml"
    file.write_text(f"layers:\n  '{target}': {{keep: 0.5}}\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml.*no regular expression"):
        make_recipe({}, file)


@pytest.mark.parametrize("empty", ["", ",", " "])
def test_an_empty_target_is_refused(empty: str) -> None:
    with pytest.raises(UsageError, match="--ignore is empty"):
        Recipe(ignore=(empty,))


def test_one_name_is_taken_without_a_tuple_around_it() -> None:
    settings: dict[str, Any] = {"targets": "q_proj", "ignore": ["mlp"]}
    recipe = Recipe(**settings)
    assert (recipe.targets, recipe.ignore) == (("q_proj",), ("mlp",))


def test_only_means_a_layer_and_no_other_that_ends_alike() -> None:
    names = ["layers.0.fc1", "decoder.layers.0.fc1", "layers.0.fc1.inner", "layers.0xfc1"]
    assert [name for name in names if matches(only("layers.0.fc1"), name)] == ["layers.0.fc1"]
    recipe = Recipe(keep=0.5).with_overrides({"layers.0.fc1": {"keep": 0.25}})
    assert [recipe.for_layer(name).keep for name in names] == [0.25, 0.5, 0.5, 0.5]


def test_a_plan_knows_the_classes_of_its_layers() -> None:
    layers = [Layer(f"blocks.{k}", "w", "blocks", (64, 64), 2, kinds=(kind,)) for k, kind in enumerate("AB")]
    plan = make_plan(layers, {}, Recipe(keep=0.5, overrides=(("B", (("rank", 4),)),)))
    assert [p.rank for p in plan.layers] == [0, 4]


def test_commas_inside_brackets_separate_nothing() -> None:
    assert parts("a,[b,c],re:x{1,3},(d,e),f") == ["a", "[b,c]", "re:x{1,3}", "(d,e)", "f"]
