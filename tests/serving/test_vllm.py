"""vLLM computes what our loader computes; in an environment of its own (`make test-vllm`)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from losparse_cli.compress import compress
from losparse_cli.load import load

from .served import PROMPTS, TOKENS

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
SIZES = {
    "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 1100,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64, "tie_word_embeddings": False},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
}
RECIPES: dict[str, dict[str, Any]] = {
    "codes": {"bits": 5.0},
    "codes and U V": {
        "bits": 6.0,
        "rank": 4,
        "overrides": (("*.k_proj", (("rank", 2),)),),
        "ignore": ("*.1.*.v_proj",),
    },
    "floats": {"rank": 4, "sparsity": 0.5, "overrides": (("*.v_proj", (("rank", 2), ("sparsity", 0.9))),)},
    "columns": {"rank": 4, "sparsity": 0.5, "pattern": "columns", "ignore": ("*.0.*.up_proj",)},
}
CASES = [
    ("llama", "codes and U V", (), 1),
    ("llama", "floats", ("--compiled",), 1),
    ("llama", "columns", (), 2),
    ("qwen2", "codes", ("--compiled",), 1),
    ("qwen2", "codes and U V", (), 2),
    ("gemma3", "codes", (), 1),
    ("mixtral", "codes", (), 1),
    ("mixtral", "floats", (), 2),
]


def made(folder: Path, kind: str, recipe: dict[str, Any]) -> Path:
    """A random model of this kind, compressed; its dense form goes to `folder` too."""
    name, settings = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings}, initializer_range=0.2)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases that matter
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "dense")
    from losparse_cli.budget.recipe import Recipe

    return compress(folder / "dense", folder / "small", Recipe(**recipe)).output


def of_ours(folder: Path, adapter: Path | None = None) -> list[list[int]]:
    model: Any = load(folder, dtype=torch.float32)[0]
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    found = []
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(TOKENS):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


def of_vllm(folder: Path, *options: str, ranks: int = 1) -> list[list[int]]:
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(ranks > 1)), "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks))),
    }  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-m", "tests.serving.served", str(folder), *options, "--ranks", str(ranks)],
        env=os.environ | settings, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = [line for line in ran.stdout.splitlines() if line.startswith("tokens ")]
    assert said, ran.stdout[-3000:] + ran.stderr[-3000:]
    found: list[list[int]] = json.loads(said[0].removeprefix("tokens "))
    return found


@pytest.mark.parametrize(("kind", "recipe", "options", "ranks"), CASES)
def test_tokens_are_those_of_our_loader(
    kind: str, recipe: str, options: tuple[str, ...], ranks: int, tmp_path: Path
) -> None:
    folder = made(tmp_path, kind, RECIPES[recipe])
    assert of_vllm(folder, *options, ranks=ranks) == of_ours(folder)


def test_lora_goes_on_top(tmp_path: Path) -> None:
    folder = made(tmp_path, "llama", RECIPES["codes and U V"])
    wanted = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(load(folder, dtype=torch.float32)[0], wanted)
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = of_ours(folder, tmp_path / "adapter")
    assert tokens != of_ours(folder)
    assert of_vllm(folder, "--lora", str(tmp_path / "adapter")) == tokens


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = made(tmp_path, "llama", RECIPES["codes"])
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.S_scale"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(AssertionError, match=r"The weights hold no model.layers.1.mlp.down_proj.S_scale"):
        of_vllm(folder)


def test_experts_that_lay_in_one_tensor_are_refused(tmp_path: Path) -> None:
    from losparse_cli.serving.vllm import LosparseConfig

    settings = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(**settings))
    model.save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", tmp_path / "small", bits=5.0)
    block = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    with pytest.raises(ValueError, match=r"losparse export CHECKPOINT --dense"):
        LosparseConfig.from_config(block)
