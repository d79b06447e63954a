"""Experts in layers of their own compute what transformers' fused ones do, and are called as they are on disk."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import answer, toy_model
from experts import split
from safetensors.torch import load_file

import losparse_cli
from losparse_cli.budget.recipe import Recipe
from losparse_cli.errors import CheckpointError, UsageError
from losparse_cli.shim.experts import SplitExperts, fused_experts
from losparse_cli.shim.linear import LowRankSparseLinear

_COMMON: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any], tuple[str | None, str, str]]] = {
    "Mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}, ("w1", "w3", "w2")),
    "Qwen2Moe": (
        "Qwen2Moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48,
         "shared_expert_intermediate_size": 60},
        ("gate_proj", "up_proj", "down_proj"),
    ),
    "Olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, ("gate_proj", "up_proj", "down_proj")),
    "without a gate": (
        "NemotronH",
        {"layers_block_type": ["attention", "moe"], "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 32,
         "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 60, "n_group": 1, "topk_group": 1,
         "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1},
        (None, "up_proj", "down_proj"),
    ),
}  # fmt: skip


def model_of(kind: str) -> Any:
    name, settings, _ = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**_COMMON, **settings})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_split_they_compute_the_same(kind: str) -> None:
    model = model_of(kind)
    fused = fused_experts(model)
    assert fused
    assert {names for names, _ in fused.values()} == {KINDS[kind][2]}
    expected = {shape: answer(model, batch=shape[0], length=shape[1]) for shape in ((1, 1), (3, 17))}
    ours = split(model)
    assert not fused_experts(ours)
    for twin in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for (batch, length), logits in expected.items():
            torch.testing.assert_close(answer(twin, batch=batch, length=length), logits, rtol=1e-5, atol=1e-6)


def test_no_token_is_lost_and_none_is_needed() -> None:
    model = split(toy_model("mixtral"))
    experts = next(module for module in model.modules() if isinstance(module, SplitExperts))
    x = torch.randn(4, 72)
    for index in ([[0, 1], [0, 1], [0, 1], [0, 1]], [[4, 2], [2, 4], [0, 3], [3, 0]]):
        chosen, weights = torch.tensor(index), torch.rand(4, 2)
        expected = torch.zeros_like(x)
        for token, pair in enumerate(index):
            for place, number in enumerate(pair):
                expected[token] += weights[token, place] * experts._expert(number, x[token : token + 1])[0]
        torch.testing.assert_close(experts(x, chosen, weights), expected)
    assert experts(x[:0], torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)).shape == (0, 72)


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_whole_and_loaded_in_every_way(kind: str, tmp_path: Path) -> None:
    model_of(kind).save_pretrained(tmp_path / "dense")
    made = losparse_cli.compress(tmp_path / "dense", tmp_path / "small", keep=0.6, values="float")
    assert sum(".experts." in layer.name for layer in made.report.layers) >= 8
    plain = losparse_cli.export(tmp_path / "small", tmp_path / "plain")
    assert load_file(plain / "model.safetensors").keys() == load_file(tmp_path / "dense" / "model.safetensors").keys()
    expected = answer(transformers.AutoModelForCausalLM.from_pretrained(plain))
    model, _ = losparse_cli.load(tmp_path / "small")
    shipped = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    for one in (model, shipped):
        torch.testing.assert_close(answer(one), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_some_of_them_alone(tmp_path: Path) -> None:
    model_of("Olmoe").save_pretrained(tmp_path / "dense")
    losparse_cli.compress(
        tmp_path / "dense", tmp_path / "small", Recipe(keep=0.6, values="float", targets=("*.1.mlp.experts.2.*",))
    )
    model, _ = losparse_cli.load(tmp_path / "small")
    ours = [name for name, module in model.named_modules() if isinstance(module, LowRankSparseLinear)]
    assert ours == [f"model.layers.1.mlp.experts.2.{matrix}_proj" for matrix in ("gate", "up", "down")]
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        losparse_cli.export(tmp_path / "small", tmp_path / "plain")
    )
    torch.testing.assert_close(answer(model), answer(stock), rtol=1e-4, atol=1e-5)


def test_dense_experts_stay_as_they_are(tmp_path: Path) -> None:
    """Where none of them is compressed transformers' own fused ones are faster."""
    model_of("Olmoe").save_pretrained(tmp_path / "dense")
    losparse_cli.compress(
        tmp_path / "dense", tmp_path / "small", Recipe(keep=0.6, values="float", ignore=("*.experts.*",))
    )
    model, _ = losparse_cli.load(tmp_path / "small")
    assert not any(isinstance(module, SplitExperts) for module in model.modules())
    assert torch.isfinite(answer(model)).all()


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model_of("Olmoe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"0\.mlp\.experts\.2\.up_proj\.weight .* is missing"):
        losparse_cli.compress(tmp_path, tmp_path / "out", keep=0.6)


def test_a_configuration_with_other_experts_than_the_files(tmp_path: Path) -> None:
    import json

    model_of("Olmoe").save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    for count, said in ((5, r"experts\.4\..* is missing"), (3, r"experts\.3\.")):
        (tmp_path / "dense" / "config.json").write_text(json.dumps(config | {"num_experts": count}))
        with pytest.raises(CheckpointError, match=said):
            losparse_cli.compress(tmp_path / "dense", tmp_path / "out", keep=0.6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_of_a_configuration_with_other_experts_than_the_files(kind: str, tmp_path: Path) -> None:
    import json

    model_of(kind).save_pretrained(tmp_path / "dense")
    losparse_cli.compress(tmp_path / "dense", tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    [key] = [key for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in config]
    for more, said in ((1, "holds no "), (-1, "holds ")):
        changed = config | {key: config[key] + more}
        (tmp_path / "small" / "config.json").write_text(json.dumps(changed))
        number = config[key] + min(more, 0)
        with pytest.raises(CheckpointError, match=rf"{said}.*\.experts\.{number}.* asks for {changed[key]} experts"):
            losparse_cli.export(tmp_path / "small", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("target", ["gate", "*.gate", "*.gate,*.q_proj", "re:.*gate$"])
def test_routers_that_are_named_as_a_target(target: str, tmp_path: Path) -> None:
    model_of("Olmoe").save_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match=r"--targets '\S+' means routers alone \(model\.layers\.0\.mlp\.gate\)"):
        losparse_cli.plan(tmp_path / "dense", tmp_path / "small", Recipe(targets=(target,)))


@pytest.mark.parametrize("target", ["mlp", "*", "re:.*gate"])
def test_routers_that_are_meant_with_others_stay_dense(target: str, tmp_path: Path) -> None:
    model_of("Olmoe").save_pretrained(tmp_path / "dense")
    job = losparse_cli.plan(tmp_path / "dense", tmp_path / "small", Recipe(targets=(target,)))
    assert job.plan.layers
    assert [name for name, reason in job.plan.skipped.items() if reason == "router"] == [
        f"model.layers.{block}.mlp.gate" for block in range(2)
    ]


def test_experts_that_cannot_be_taken_apart_are_listed(tmp_path: Path) -> None:
    config = transformers.DbrxConfig(
        d_model=64, n_heads=2, n_layers=1, max_seq_len=48, vocab_size=101,
        attn_config={"kv_n_heads": 1, "clip_qkv": None, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    )  # fmt: skip
    transformers.DbrxForCausalLM(config).save_pretrained(tmp_path / "dense")
    job = losparse_cli.plan(tmp_path / "dense", tmp_path / "small")
    assert job.plan.skipped["transformer.blocks.0.ffn.experts.mlp"] == "fused expert weights"
