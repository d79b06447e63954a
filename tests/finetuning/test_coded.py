"""Fine-tuning over whole numbers: codes stay, factors of rows, adapters, norms and heads are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import losparse_cli
from losparse_cli.budget.recipe import Recipe
from losparse_cli.errors import UsageError
from losparse_cli.finetune import finetune
from losparse_cli.finetuning.prepare import prepare_finetuning
from losparse_cli.finetuning.request import Finetuning
from losparse_cli.verify import verify
from tests.finetuning.learners import request_for, write_learner

HOW: dict[str, Any] = {"precision": "float32", "batch_size": 8, "max_steps": 30, "learning_rate": 3e-3}


def coded(place: Path, kind: str, **recipe: Any) -> Path:
    dense = write_learner(place / "dense", kind)
    return losparse_cli.compress(dense, place / "small", Recipe(**({"bits": 6.0} | recipe))).output


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def _inside(name: str) -> str:
    """Without what stands before the layers: a head puts a prefix there."""
    return name.split("encoder.layer.", 1)[-1]


@pytest.mark.parametrize("kind", ["bert-base", "bert-qa", "gpt2", "bart"])
def test_every_kind_of_task(kind: str, tmp_path: Path) -> None:
    small = coded(tmp_path, kind)
    task = request_for(tmp_path, kind, train=64, validation=16)
    result = finetune(small, tmp_path / "out", task=task, how=Finetuning(**HOW), device="cpu")
    assert verify(result.output).sound
    before, after = (
        {_inside(name): value for name, value in tensors(folder).items()} for folder in (small, result.output)
    )
    codes = [name for name in after if name.endswith("S_codes")]
    assert codes
    for name in codes:
        factors = name.replace("S_codes", "weight")
        assert torch.equal(before[name], after[name])
        assert torch.equal(before[name.replace("codes", "scale")], after[name.replace("codes", "scale")])
        assert not torch.equal(before[factors], after[factors])
    losparse_cli.load(result.output)
    report = result.report
    assert report.coded
    assert 5 < report.bits < 9  # a toy's tables and factors weigh much
    written = tensors(result.output).values()
    assert report.model_bytes_after == sum(value.numel() * value.itemsize for value in written)


def test_it_learns_the_task(tmp_path: Path) -> None:
    small = coded(tmp_path, "bert", bits=4.0)
    task = request_for(tmp_path, "bert", train=256, validation=64)
    result = finetune(small, tmp_path / "out", task=task, how=Finetuning(**HOW | {"max_steps": 150}), device="cpu")
    assert result.scores["accuracy"] > 0.8


def test_an_adapter_is_added_and_trained(tmp_path: Path) -> None:
    small = coded(tmp_path, "bert")
    options: dict[str, Any] = {
        "task": request_for(tmp_path, "bert", train=32, validation=8), "how": Finetuning(**HOW), "device": "cpu",
    }  # fmt: skip
    plain, _ = losparse_cli.load(small)
    training = prepare_finetuning(small, tmp_path / "out", recipe=Recipe(rank=3), **options)
    ids = torch.tensor([[1, 5, 6, 2]])
    with torch.no_grad():
        torch.testing.assert_close(training.model(ids).logits, plain.float()(ids).logits)  # at first nothing changes
    result = finetune(small, tmp_path / "out", recipe=Recipe(rank=3), **options)
    assert {layer.spec.rank for layer in result.report.layers if layer.spec.kind != "embedding"} == {3}
    assert verify(result.output).sound
    found = tensors(result.output)
    assert all(bool(value.any()) for name, value in found.items() if name.endswith(".U"))
    again, _ = losparse_cli.load(result.output)
    with pytest.raises(UsageError, match="U and V already"):
        prepare_finetuning(result.output, tmp_path / "more", recipe=Recipe(rank=2), **options)
    assert again.config.num_labels == 3


def test_factors_move_in_proportion_to_their_size(tmp_path: Path) -> None:
    small = coded(tmp_path, "bert")
    task = request_for(tmp_path, "bert", train=32, validation=8)
    how = Finetuning(**HOW | {"max_steps": 1, "learning_rate": 1e-4, "warmup_steps": 0.0})
    result = finetune(small, tmp_path / "out", task=task, how=how, device="cpu")
    before, after = tensors(small), tensors(result.output)
    for name in after:
        if name.endswith("S_codes"):
            a, b = (found[name.replace("S_codes", "weight")].float() for found in (before, after))
            step = (b - a).abs().max() / a.square().mean().sqrt()
            assert 1e-3 < step < 4e-3, name  # twenty times the rate


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe(keep_parameters=0.1, pattern="rows"), "which stay as they are"),
        (Recipe(rank=4000, pattern="rows"), "--rank 4000 is more"),
    ],
)
def test_what_cannot_be(recipe: Recipe, said: str, tmp_path: Path) -> None:
    small = coded(tmp_path, "bert")
    task = request_for(tmp_path, "bert", train=16, validation=4)
    with pytest.raises(UsageError, match=said):
        prepare_finetuning(small, tmp_path / "out", task=task, recipe=recipe, device="cpu")


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = coded(tmp_path, "bert")
    options: dict[str, Any] = {
        "task": request_for(tmp_path, "bert", train=64, validation=8), "device": "cpu", "recipe": Recipe(rank=2),
        "how": Finetuning(**HOW | {"save_steps": 10}),
    }  # fmt: skip
    whole = tensors(finetune(small, tmp_path / "whole", **options).output)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("losparse_cli.finetune.write_result", killed, raising=False)
        patched.setattr("losparse_cli.finetuning.pruner.Pruner.prune", lambda self, step: step == 15 and killed())
        with pytest.raises(KeyboardInterrupt):
            finetune(small, tmp_path / "out", **options)
    again = tensors(finetune(small, tmp_path / "out", **options).output)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
