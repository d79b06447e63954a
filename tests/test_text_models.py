"""The text model inside a larger one: on disk its layers carry the larger one's names, in memory its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY

import losparse_cli
from losparse_cli import Recipe
from losparse_cli.shim.linear import LowRankSparseLinear

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 48,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "patch_size": 4}

# huggingface/transformers#45494: AutoModelForCausalLM on a quantized Qwen3.5.
LARGER: dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "Qwen3_5Config", "Qwen3_5ForCausalLM",
        {**_TEXT, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
        {**_VISION, "depth": 2, "out_hidden_size": 64, "num_heads": 4, "num_position_embeddings": 16,
         "deepstack_visual_indexes": []}),
    "mllama": ("MllamaForConditionalGeneration", "MllamaConfig", "MllamaForCausalLM",
        {**_TEXT, "cross_attention_layers": [1]},
        {**_VISION, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 4, "image_size": 16,
         "intermediate_layers_indices": [0], "vision_output_dim": 128, "supported_aspect_ratios": [[1, 1]]}),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGER)
def test_the_text_model_loads_with_its_compressed_layers_and_saves_them(name: str, tmp_path: Path) -> None:
    larger, config, text, text_config, vision_config = LARGER[name]
    settings = getattr(transformers, config)(text_config=text_config, vision_config=vision_config)
    model = getattr(transformers, larger)(settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
    model.save_pretrained(tmp_path / "dense")
    losparse_cli.compress(tmp_path / "dense", tmp_path / "small", Recipe(rank=4, sparsity=0.5))

    def load(folder: Path) -> Any:
        return losparse_cli.load(folder, model_class=getattr(transformers, text))[0]

    losparse_cli.register()
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert type(auto).__name__ == text
    ours = load(tmp_path / "small")
    layers = {n for n, module in ours.named_modules() if isinstance(module, LowRankSparseLinear)}
    full = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]["modules"]
    assert layers
    assert len(layers) == sum("language_model" in layer for layer in full)
    expected = load(losparse_cli.export(tmp_path / "small", tmp_path / "plain"))
    ids = torch.arange(3, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, expected(ids).logits, rtol=2e-4, atol=2e-5)
        ours.save_pretrained(tmp_path / "again")
        again = load(tmp_path / "again")
        assert torch.equal(again(ids).logits, ours(ids).logits)
        assert losparse_cli.verify(tmp_path / "again").problems == ()
        dense = load(losparse_cli.export(tmp_path / "again", tmp_path / "dense-again"))
        assert torch.equal(dense(ids).logits, expected(ids).logits)
