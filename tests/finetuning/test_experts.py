"""A mixture of experts that is trained: its experts, too, whether they lie one by one on disk or all in one tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import answer, character_tokenizer, randomized
from safetensors.torch import load_file

import losparse_cli
from losparse_cli.budget.recipe import Recipe
from losparse_cli.finetuning.request import Finetuning
from losparse_cli.shim.experts import SplitExperts
from losparse_cli.tasks.request import TaskRequest

_COMMON: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "num_experts_per_tok": 2, "num_local_experts": 3,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Mixtral": {}, "GraniteMoe": {}, "GptOss": {"head_dim": 24, "layer_types": ["full_attention"] * 2},
}  # fmt: skip


@pytest.fixture(params=KINDS)
def dense(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    settings = getattr(transformers, f"{request.param}Config")(**{**_COMMON, **KINDS[request.param]})
    randomized(getattr(transformers, f"{request.param}ForCausalLM")(settings)).save_pretrained(tmp_path / "dense")
    character_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("what is learned here is of no use to anybody. " * 20)
    return tmp_path / "dense"


def trained(source: Path, output: Path, recipe: Recipe | None = None) -> Any:
    """The result of a few steps, loaded; it is what its dense export is."""
    task = TaskRequest("causal-lm", train_file=str(source.parent / "text.txt"), max_length=32)
    how = Finetuning(precision="float32", max_steps=2, batch_size=2, gradient_accumulation_steps=1)
    losparse_cli.finetune(source, output, task=task, how=how, recipe=recipe)
    assert losparse_cli.verify(output).sound
    model, _ = losparse_cli.load(output)
    plain = losparse_cli.export(output, output.with_name(f"{output.name}-plain"))
    stock = type(model).from_pretrained(plain)
    torch.testing.assert_close(answer(model), answer(stock), rtol=1e-4, atol=1e-5)
    before, after = (load_file(place / "model.safetensors") for place in (source.parent / "dense", plain))
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    return model


def test_from_dense_and_from_compressed(dense: Path, tmp_path: Path) -> None:
    model = trained(dense, tmp_path / "trained", Recipe(keep_parameters=0.5, rank_ratio=0.3, pattern="rows"))
    experts = [module for module in model.modules() if isinstance(module, SplitExperts)]
    assert len(experts) == 2
    report = losparse_cli.inspect(tmp_path / "trained")
    assert sum(".experts." in layer.name for layer in report.layers) == 6 * len([n for n in experts[0].names if n])
    trained(tmp_path / "trained", tmp_path / "further")


def test_experts_that_stay_dense_stay_together(dense: Path, tmp_path: Path) -> None:
    recipe = Recipe(keep_parameters=0.5, rank_ratio=0.3, pattern="rows", ignore=("experts",))
    model = trained(dense, tmp_path / "trained", recipe)
    assert not any(isinstance(module, SplitExperts) for module in model.modules())


def test_some_of_them(dense: Path, tmp_path: Path) -> None:
    recipe = Recipe(keep_parameters=0.5, rank_ratio=0.3, pattern="rows", targets=("*.0.*.experts.1.*", "*.q_proj"))
    trained(dense, tmp_path / "trained", recipe)
    report = losparse_cli.inspect(tmp_path / "trained")
    assert {layer.name.split(".experts.")[-1][0] for layer in report.layers if ".experts." in layer.name} == {"1"}
