"""Which layers are found, why every other is left dense, and what is said about a model that cannot be built."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import TOYS, toy_model
from experts import split
from torch import nn
from transformers import Conv1D

import losparse_cli
from losparse_cli.errors import SourceError, UsageError
from losparse_cli.models.skeleton import build_skeleton, classify, kinds_of

# Toy -> the linear layers of one block (the last one), by the end of their names.
_LLAMA = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
LAYERS = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "gemma3": _LLAMA,
    "gpt2": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
    "opt": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2",
    "falcon": "self_attention.query_key_value self_attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
    "mamba": "mixer.in_proj",
    "mixtral": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    + " ".join(f"mlp.experts.{e}.{w}" for e in range(5) for w in ("w1", "w2", "w3")),
    "bert": "attention.self.query attention.self.key attention.self.value attention.output.dense "
    "intermediate.dense output.dense",
    "t5": "SelfAttention.q SelfAttention.k SelfAttention.v SelfAttention.o EncDecAttention.q EncDecAttention.k "
    "EncDecAttention.v EncDecAttention.o DenseReluDense.wi_0 DenseReluDense.wi_1 DenseReluDense.wo",
    "bart": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj encoder_attn.q_proj "
    "encoder_attn.k_proj encoder_attn.v_proj encoder_attn.out_proj fc1 fc2",
}
LAST = {
    "gpt2": "transformer.h.1.",
    "opt": "model.decoder.layers.1.",
    "falcon": "transformer.h.1.",
    "mamba": "backbone.layers.1.",
}
LAST |= {"bert": "bert.encoder.layer.1.", "t5": "decoder.block.1.", "bart": "model.decoder.layers.1."}

OUTSIDE, HEAD = "outside the repeated blocks", "output head"
_BERT = {f"bert.embeddings.{name}_embeddings": "embedding" for name in ("word", "position", "token_type")}
REASONS = {
    "llama": {"model.embed_tokens": "embedding", "lm_head": HEAD},
    "qwen2": {"model.embed_tokens": "embedding", "lm_head": HEAD},
    "gpt2": {"transformer.wte": "embedding", "transformer.wpe": "embedding", "lm_head": HEAD},
    "opt": {
        "model.decoder.embed_tokens": "embedding", "model.decoder.embed_positions": "embedding", "lm_head": HEAD,
        "model.decoder.project_in": OUTSIDE, "model.decoder.project_out": OUTSIDE},
    "mixtral": {
        "model.embed_tokens": "embedding", "lm_head": HEAD,
        **{f"model.layers.{k}.mlp.gate": "router" for k in (0, 1)}},
    "mamba": {
        "backbone.embeddings": "embedding", "lm_head": HEAD,
        **{f"backbone.layers.{k}.mixer.{name}": "its weight is read by MambaMixer itself" for k in (0, 1)
           for name in ("x_proj", "dt_proj", "out_proj")}},
    "bert": {**_BERT, "bert.pooler.dense": OUTSIDE, "classifier": OUTSIDE},
    "bert-qa": {**_BERT, "qa_outputs": OUTSIDE},
    "t5": {
        "shared": "embedding", "encoder.embed_tokens": "embedding", "decoder.embed_tokens": "embedding",
        **{f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias": "embedding"
           for side in ("encoder", "decoder")},
        "lm_head": HEAD},
}  # fmt: skip


def skeleton_of(toy: Any, name: str, **changes: Any) -> Any:
    folder = toy(name, **changes)
    return build_skeleton(folder, json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("name", LAYERS)
def test_every_linear_layer_of_a_block_is_found(name: str, toy: Any) -> None:
    found = skeleton_of(toy, name).linears
    last = LAST.get(name, "model.layers.1.")
    names = [n.removeprefix(last) for n in found if n.startswith(last)]
    if name == "t5":
        names = [n.split(".", 2)[2] for n in names]
    assert sorted(names) == sorted(LAYERS[name].split())
    model = split(toy_model(name))
    for full, linear in found.items():
        weight = model.get_submodule(full).weight
        assert linear.transposed == (name == "gpt2")
        assert linear.shape == (tuple(weight.T.shape) if linear.transposed else tuple(weight.shape))


@pytest.mark.parametrize("name", REASONS)
def test_every_layer_left_dense_has_its_reason(name: str, toy: Any) -> None:
    assert skeleton_of(toy, name).skipped == REASONS[name]


@pytest.mark.parametrize("name", TOYS)
def test_every_linear_layer_and_embedding_is_accounted_for_once(name: str, toy: Any) -> None:
    skeleton = skeleton_of(toy, name)
    assert not skeleton.linears.keys() & skeleton.skipped.keys()
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    everything = {n for n, m in toy_model(name).named_modules() if isinstance(m, kinds)}
    assert everything <= skeleton.linears.keys() | skeleton.skipped.keys()
    assert all(p.device.type == "meta" for p in skeleton.model.parameters())
    assert not skeleton.model.training


def small(**parts: nn.Module) -> nn.Module:
    """A model of one block with these parts."""
    model = nn.Module()
    model.config = SimpleNamespace(num_experts=4)
    model.blocks = nn.ModuleList([nn.Module()])
    for name, part in parts.items():
        setattr(model.blocks[0], name, part)
    return model


def test_reasons_that_no_toy_has() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.asked = nn.Linear(8, 8), nn.Linear(8, 8)
            nn.init.ones_(self.asked.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if isinstance(self.asked.weight, torch.Tensor):
                x = x.to(self.asked.weight.dtype).to(self.asked.weight.device)
            return self.asked(x) @ self.read.weight

    tied, twin = nn.Linear(8, 8), nn.Linear(8, 8)
    twin.weight = tied.weight
    moe = nn.Module()
    moe.experts, moe.gate = nn.ModuleList([nn.Linear(8, 8)]), nn.Linear(8, 4)
    router = type("TopRouter", (nn.Module,), {})()
    router.choose, router.widen = nn.Linear(8, 4), nn.Linear(8, 8)
    model = small(
        tied=tied, twin=twin, scaled=Scaled(8, 8), reader=Reader(), attention=nn.MultiheadAttention(8, 2),
        moe=moe, router=router, conv=nn.Conv1d(8, 8, 3),
        falcon=type("FalconLinear", (nn.Linear,), {})(8, 8), plain=nn.Linear(8, 6),
    )  # fmt: skip
    linears, skipped = classify(model)
    assert skipped == {
        "blocks.0.tied": "tied weight",
        "blocks.0.twin": "tied weight",
        "blocks.0.scaled": "Scaled, which may compute more than a product",
        "blocks.0.reader.read": "its weight is read by Reader itself",
        "blocks.0.attention.out_proj": "NonDynamicallyQuantizableLinear, which may compute more than a product",
        "blocks.0.moe.gate": "router",
        "blocks.0.router.choose": "router",
    }
    assert list(linears) == [
        f"blocks.0.{n}" for n in ("reader.asked", "moe.experts.0", "router.widen", "falcon", "plain")
    ]
    assert linears["blocks.0.plain"].shape == (6, 8)


def test_heads_in_a_list_are_heads() -> None:
    model = small(plain=nn.Linear(8, 8))
    model.heads = nn.ModuleList([nn.Linear(8, 5), nn.Linear(8, 5)])
    model.get_output_embeddings = lambda: model.heads
    linears, skipped = classify(model)
    assert skipped == {"heads.0": "output head", "heads.1": "output head"}
    assert list(linears) == ["blocks.0.plain"]


def test_kinds_are_the_classes_of_every_layer_and_their_bases(toy: Any) -> None:
    kinds = skeleton_of(toy, "llama").kinds
    assert kinds["model.layers.0.self_attn.q_proj"] == kinds["lm_head"] == ("Linear",)
    assert kinds["model.embed_tokens"] == ("Embedding",)
    assert kinds_of(type("FalconLinear", (nn.Linear,), {})(8, 8)) == ("FalconLinear", "Linear")


def test_choosing_only_what_stays_dense_says_so(toy: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No layer of this model can be compressed"):
        losparse_cli.compress(
            toy("llama"), tmp_path / "out", losparse_cli.Recipe(rank=4, sparsity=0.5, targets=("lm_head",))
        )


# --- models that cannot be built --------------------------------------------------------------------


def built_from(toy: Any, place: Path, name: str = "llama", **changes: Any) -> Any:
    config = json.loads((toy(name) / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (place / "config.json").write_text(json.dumps(config))
    return build_skeleton(place, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["LlamaForWorldPeace"]},
            "'LlamaForWorldPeace', which transformers .* does not have: upgrade",
        ),
        ({"model_type": "llama9"}, "llama9"),
        ({"model_type": None}, "model_type"),
        ({"architectures": ["pipeline"]}, "cannot build pipeline"),
        ({"hidden_size": "wide"}, "cannot build LlamaForCausalLM"),
        (
            {"auto_map": {"AutoConfig": "mine.Config"}, "model_type": "mine"},
            "needs the model's own code.*--trust-remote-code",
        ),
        ({"auto_map": {"AutoModelForCausalLM": "mine.Mine"}, "architectures": ["Mine"]}, "--trust-remote-code"),
    ],
    ids=["architecture", "model-type", "no-model-type", "not-a-model", "wrong-type", "own-config", "own-model"],
)
def test_a_model_that_cannot_be_built_is_a_source_error(changes: Any, message: str, toy: Any, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message):
        built_from(toy, tmp_path, **changes)


def test_without_an_architecture_the_base_model_is_built(toy: Any, tmp_path: Path) -> None:
    skeleton = built_from(toy, tmp_path, architectures=None)
    assert type(skeleton.model) is transformers.LlamaModel
    assert "layers.0.mlp.up_proj" in skeleton.linears


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig):
    model_type = "mine"
class Mine(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_a_models_own_code_runs_only_when_trusted(toy: Any, tmp_path: Path) -> None:
    changes = {"model_type": "mine", "architectures": ["Mine"]}
    changes["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    config = json.loads((toy("llama") / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(OWN_CODE)
    with pytest.raises(SourceError, match="--trust-remote-code"):
        build_skeleton(tmp_path, config)
    skeleton = build_skeleton(tmp_path, config, trust_remote_code=True)
    assert type(skeleton.model).__name__ == "Mine"
    assert len(skeleton.linears) == 14
