"""One request, whether it comes from options, from Python or from a recipe that describes a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from losparse_cli.budget.recipe import Recipe
from losparse_cli.compression.request import Refinement, Request, make_request
from losparse_cli.errors import RecipeError, UsageError
from losparse_cli.text.request import Calibration

WHOLE = """
keep: 0.5
layers:
  '*.q_proj': {keep: 0.7}
calibration: {source: text.txt, tokens: 4096, length: 256}
refine: {steps: 50}
device: cpu
memory_limit: 8GB
max_shard_size: 1GB
"""


def test_a_recipe_describes_a_whole_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(WHOLE)
    found = make_request(tmp_path / "recipe.yaml")
    assert found == Request(
        Recipe(keep=0.5, overrides=(("*.q_proj", (("keep", 0.7),)),)), Calibration("text.txt", 4096, 256),
        Refinement(50), "cpu", "8GB", "1GB",
    )  # fmt: skip
    assert Recipe.from_file(tmp_path / "recipe.yaml") == found.recipe
    assert make_request(str(tmp_path / "recipe.yaml")) == found


def test_what_is_given_beside_a_recipe_wins(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(WHOLE)
    found = make_request(
        tmp_path / "recipe.yaml", {"keep": 0.6, "rank": None}, calibration={"source": None, "tokens": 100},
        refinement={"mode": "off", "steps": None}, device="cuda", max_shard_size="2GB",
    )  # fmt: skip
    assert found.recipe == Recipe(keep=0.6)
    assert found.calibration == Calibration("text.txt", 100, 256)
    assert found.refinement is None
    assert (found.device, found.memory_limit, found.max_shard_size) == ("cuda", "8GB", "2GB")
    other = make_request(tmp_path / "recipe.yaml", calibration=Calibration("self"), refinement=Refinement(7))
    assert (other.calibration, other.refinement) == (Calibration("self"), Refinement(7))


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ({}, Request()),
        ({"recipe": {"keep": 0.5, "targets": "q_proj"}}, Request(Recipe(keep=0.5, targets=("q_proj",)))),
        ({"given": {"keep": 0.5, "rank": None, "targets": ()}}, Request(Recipe(keep=0.5))),
        ({"given": {"keep": np.float32(0.5), "rank": np.int64(4)}}, Request(Recipe(keep=0.5, rank=4))),
        ({"recipe": Recipe(rank=4, sparsity=0.5), "given": {"keep": 0.5}}, Request(Recipe(rank=4, keep=0.5))),
        ({"calibration": "text.txt"}, Request(calibration=Calibration("text.txt"))),
        ({"calibration": Path("text.txt")}, Request(calibration=Calibration("text.txt"))),
        ({"calibration": {"source": None, "tokens": None}}, Request()),
        ({"recipe": {"calibration": "self", "refine": "blocks"}}, Request(Recipe(), Calibration("self"), Refinement())),
        ({"recipe": {"refine": False}}, Request()),
        ({"recipe": {"device": 0, "max_shard_size": 0}}, Request(device=0, max_shard_size=0)),  # refused by `prepare`
        ({"calibration": "self", "refinement": "blocks"}, Request(Recipe(), Calibration("self"), Refinement())),
        ({"calibration": "self", "refinement": {"steps": 3}}, Request(Recipe(), Calibration("self"), Refinement(3))),
    ],
)  # fmt: skip
def test_the_first_obvious_calls(asked: dict[str, Any], meant: Request) -> None:
    assert make_request(**asked) == meant


@pytest.mark.parametrize(
    ("asked", "kind", "says"),
    [
        ({"recipe": 0.5}, UsageError, "recipe is a Recipe, a mapping .* or the path of a YAML file, not float"),
        ({"recipe": {"rnak": 4}}, RecipeError, "the recipe has the unknown setting 'rnak'"),
        ({"recipe": {"calibration": {"sauce": "x"}}}, RecipeError, "calibration has no setting 'sauce'"),
        ({"recipe": {"calibration": {"tokens": 9}}}, RecipeError, "add --calibration SOURCE"),
        ({"recipe": {"calibration": 5}}, RecipeError, "calibration is a Calibration, a mapping .* not int"),
        ({"calibration": ["a.txt"]}, UsageError, "calibration is a Calibration, a mapping .* not list"),
        ({"calibration": {"tokens": 9}}, UsageError, "--calibration-tokens says how to use calibration text"),
        ({"refinement": "all"}, UsageError, "--refine is blocks, model, both or off"),
        ({"refinement": {"mode": None, "steps": 3}}, UsageError, "--refine-steps says how to refine: add --refine"),
        ({"refinement": {"mode": "off", "lr": 0.1}}, UsageError, "--refine-lr says how to refine"),
        ({"recipe": {"refine": {"steps": 0}}}, RecipeError, "the recipe: refine: steps is a whole number"),
        ({"recipe": {"refine": {"steps": 2.5}}}, RecipeError, "refine: steps is a whole number >= 1, not 2.5"),
        ({"recipe": {"refine": {"lr": "fast"}}}, RecipeError, "refine: lr is a number between 0 and 1, not 'fast'"),
        ({"calibration": {"source": "self", "tokens": "9"}}, UsageError, "--calibration-tokens is a positive number"),
        ({"calibration": {"source": "self", "length": 32.0}}, UsageError, "--calibration-length is a whole number"),
        ({"calibration": {"source": "self", "batch": 0}}, UsageError, "batch of the calibration is a whole number"),
        ({"calibration": True}, UsageError, "calibration is a Calibration, a mapping .* not bool"),
    ],
)
def test_what_is_none_of_these(asked: dict[str, Any], kind: type[UsageError], says: str) -> None:
    with pytest.raises(kind, match=says):
        make_request(**asked)


CONTRADICTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("values: float", {"bits": 4}, "recipe.yaml: --bits is for whole numbers in S, and 'values: float' for floats"),
    ("bits: 4", {"values": "float"}, "recipe.yaml: bits is for whole numbers in S, and --values float for floats"),
    ("values: float\nbits: 4", {}, "recipe.yaml: bits is for whole numbers in S, and 'values: float' for floats"),
    ("bits: 4\nrank_ratio: 0.5", {}, "recipe.yaml: rank_ratio is for floats in S, and bits for whole numbers: leave"),
    ("bits: 4\npattern: 2:4", {}, ""),  # zeros may be of either
    ("sparsity: 0.5\nlayers: {q_proj: {bits: 4}}", {},
     "recipe.yaml, layers: q_proj: bits is for whole numbers in S, and sparsity for floats: leave out one of them."),
    ("layers: {q_proj: {bits: 4}}", {"sparsity": 0.5, "rank": 8}, ""),  # what is asked beside the file wins
    ("layers: {q_proj: {bits: 4}}", {"rank_ratio": 0.5},
     "recipe.yaml, layers: q_proj: --rank-ratio is for floats in S, and bits for whole numbers: leave"),
    ("keep: 0.9\nlayers: {q_proj: {bits: 4}}", {}, ""),  # a share of the bytes may be of either
    ("calibration: self\nrefine: blocks\nlayers: {q_proj: {bits: 4}}", {}, ""),
    ("bits: 4\nlayers: {q_proj: {rank_ratio: 0.5}}", {},
     "recipe.yaml, layers: q_proj: rank_ratio is for floats in S, and bits for whole numbers: leave out one of them."),
    ("layers: {q_proj: {bits: 4}, k_proj: {iterations: 5}}", {},
     "recipe.yaml, layers: k_proj: iterations is for floats in S, and bits of layers: q_proj for whole numbers: leave"),
    ("bits: 4\nlayers: {q_proj: {sparsity: 0.5}}", {}, ""),
    ("layers: {k_proj: {sparsity: 0.5}, q_proj: {bits: 4}}", {}, ""),
    ("sparsity: 0.5\nvalue_bits: 3\nlayers: {q_proj: {bits: 4}, k_proj: {pattern: 2:4}}", {}, ""),
    ("value_bits: 3", {}, "recipe.yaml: value_bits is of the values that zeros leave, and not how many there are: add"),
    ("bits: 3\npattern: rows", {}, "recipe.yaml: 'pattern: rows' says where zeros are, and not how many there are:"),
    ("size: 90MB\nsparsity: 0.5", {}, "recipe.yaml: sparsity and size contradict each other: give one of them."),
    ("size: 90MB", {"bits": 4}, ""),  # what is given beside a file takes its place
    ("size: large", {}, "recipe.yaml: size 'large' is no size; write 5GB, 500MB or 2GiB."),
    ("layers: {q_proj: {size: 90MB}}", {}, "recipe.yaml has the unknown setting 'size' under layers: q_proj"),
    ("size: 90MB\nallocate: error\ncalibration: self", {}, "recipe.yaml: 'allocate: error' decides rank and size of"),
    ("sensitivity: 'on'", {}, "recipe.yaml: 'sensitivity: on' needs text to calibrate with: add --calibration FILE"),
    ("allocate: error\ncalibration: self\nrank: 4", {}, "recipe.yaml: 'allocate: error' decides rank and size of each"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "given", "says"), CONTRADICTIONS, ids=[text for text, _, _ in CONTRADICTIONS])
def test_a_contradiction_names_where_each_part_of_it_came_from(
    text: str, given: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(text)
    if not says:
        make_request("recipe.yaml", given)
        return
    with pytest.raises(RecipeError) as raised:
        make_request("recipe.yaml", given)
    assert str(raised.value).startswith(says)


def test_settings_of_single_layers_say_what_s_holds_where_nothing_else_does() -> None:
    assert make_request({"layers": {"q_proj": {"sparsity": 0.5}}}).settled().values == "float"
    assert make_request({"layers": {"q_proj": {"bits": 5}}}).settled().values == "codes"
    assert make_request({"keep": 0.4, "layers": {"q_proj": {"iterations": 2}}}).settled().values == "float"
