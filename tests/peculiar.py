"""Tiny models of unusual make, each of which once came out wrong; random weights, one token a character."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from conftest import character_tokenizer

_TOKENS: dict[str, Any] = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT: dict[str, Any] = {
    **_TOKENS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
_PICTURE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def rwkv() -> Any:
    """Divides two weights of its later blocks before it first computes (huggingface/transformers#23848)."""
    sizes = {"hidden_size": 64, "attention_hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    return t.RwkvForCausalLM(t.RwkvConfig(**_TOKENS, **sizes, rescale_every=2))


def t5gemma() -> Any:
    """Encoder and decoder have embeddings of their own, and the head is tied to the decoder's."""
    part = {**_TEXT, "sliding_window": 8}
    decoder = t.T5GemmaModuleConfig(**part, cross_attention_hidden_size=64)
    config = t.T5GemmaConfig(encoder=t.T5GemmaModuleConfig(**part), decoder=decoder, vocab_size=101)
    return t.T5GemmaForConditionalGeneration(config)


def falcon_h1() -> Any:
    """Fills a buffer of its blocks, which no file holds, when the whole model is initialized."""
    return t.FalconH1ForCausalLM(t.FalconH1Config(
        **_TEXT, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_expand=1,
        mamba_chunk_size=8, ssm_multipliers=[0.5, 0.6, 0.7, 0.8, 0.9],
    ))  # fmt: skip


def segformer() -> Any:
    """Names no input embeddings, as 34 base classes of transformers do."""
    return t.SegformerForImageClassification(t.SegformerConfig(
        hidden_sizes=[32, 64], depths=[1, 1], num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2], decoder_hidden_size=32,
    ))  # fmt: skip


def clip() -> Any:
    """Reads text and names no input embeddings, and cannot do without a picture."""
    text = {name: value for name, value in _TEXT.items() if name not in ("head_dim", "num_key_value_heads")}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=_PICTURE, projection_dim=32))


def gemma3() -> Any:
    """A language model beside a tower that text never reaches."""
    text = {**_TEXT, "sliding_window": 8}
    return t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(text_config=text, vision_config=_PICTURE, mm_tokens_per_image=4)
    )


def gemma3n() -> Any:
    """Linear layers stand in a ModuleList themselves, outside its blocks."""
    return t.Gemma3nForCausalLM(t.Gemma3nTextConfig(**{
        **_TEXT, "vocab_size_per_layer_input": 101, "hidden_size_per_layer_input": 16, "intermediate_size": [96] * 4,
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 8, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    }))  # fmt: skip


def paligemma() -> Any:
    """A language model beside a tower, which looks at values of its input, so that none can be left out."""
    text, picture = t.GemmaConfig(**_TEXT), t.SiglipVisionConfig(**_PICTURE, projection_dim=64)
    return t.PaliGemmaForConditionalGeneration(
        t.PaliGemmaConfig(text_config=text, vision_config=picture, projection_dim=64, image_token_index=99)
    )


def write(make: Callable[[], Any], folder: Path) -> Path:
    """The model with every parameter random, and a tokenizer."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
            parameter.normal_(centre, 0.1)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder
