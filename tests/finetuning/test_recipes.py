"""The paper's settings, by name."""

from __future__ import annotations

import pytest

from losparse_cli.budget.recipe import make_recipe
from losparse_cli.cli.options import task_request
from losparse_cli.errors import UsageError
from losparse_cli.finetuning.pruner import Pruning
from losparse_cli.finetuning.recipes import RECIPES, settings
from losparse_cli.finetuning.request import Finetuning
from losparse_cli.finetuning.schedule import CubicSchedule

SIZES = ("rank", "rank_ratio", "sparsity", "keep_parameters", "pattern")
PRUNING = {"importance": "importance", "threshold": "threshold", "beta": "beta", "prune_every": "every",
           "initial_warmup_steps": "initial_warmup", "final_warmup_steps": "final_warmup"}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_is_an_option(name: str) -> None:
    found = settings(name, {})
    task_request(found)
    make_recipe({k: found.get(k) for k in SIZES})
    how = {k: v for k, v in found.items() if k in Finetuning.__dataclass_fields__}
    Finetuning(**how, pruning=Pruning(**{PRUNING[k]: v for k, v in found.items() if k in PRUNING}))
    known = {*SIZES, *PRUNING, *Finetuning.__dataclass_fields__, *task_request(found).__dataclass_fields__}
    assert not set(found) - known


@pytest.mark.parametrize(
    ("name", "low_rank", "sparse"),
    [("mnli", 0.05, 0.15), ("sst2", 0.05, 0.15), ("squad", 0.05, 0.45), ("xsum", 0.35, 0.05)],
)
def test_sizes_are_the_papers(name: str, low_rank: float, sparse: float) -> None:
    found = settings(name, {})
    assert found["keep_parameters"] * found["rank_ratio"] == pytest.approx(low_rank)
    assert found["keep_parameters"] * (1 - found["rank_ratio"]) == pytest.approx(sparse)


@pytest.mark.parametrize(
    ("name", "rows", "share"), [("mnli", 392_702, 0.15), ("squad", 88_524, 0.45), ("xsum", 204_045, 0.05)]
)
def test_phases_fit_the_papers_data(name: str, rows: int, share: float) -> None:
    found = settings(name, {})
    steps = rows * found["epochs"] // (found["batch_size"] * found.get("gradient_accumulation_steps", 1))
    CubicSchedule(share, steps, found["initial_warmup_steps"], found["final_warmup_steps"], found["prune_every"])


def test_what_is_given_wins() -> None:
    assert settings(None, {"rank": 8}) == {"rank": 8}
    pruned = settings("mnli", {"rank": 0, "epochs": 1.0})
    assert (pruned["rank"], pruned["keep_parameters"], pruned["epochs"]) == (0, 0.2, 1.0)
    assert "rank_ratio" not in pruned
    low_rank = settings("mnli", {"sparsity": 1.0})
    assert "keep_parameters" not in low_rank
    own = settings("mnli", {"train_file": "rows.csv"})
    assert task_request(own).train_file == "rows.csv"
    assert not {"dataset_name", "dataset_config_name", "validation_split"} & set(own)


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(UsageError, match=r"no recipe 'mlni'.* mnli, qqp"):
        settings("mlni", {})
