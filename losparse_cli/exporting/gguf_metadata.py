"""config.json of a model -> what a GGUF file says of it, and how its tensors differ from those of transformers.

Names of the keys are those of the `gguf` package; what they mean to llama.cpp was read from its documentation of the
format and tried with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError


@dataclass(frozen=True)
class Architecture:
    """name: that of `gguf.MODEL_ARCH`. permuted: rows of q and k lie in the other order of rotary pairs. norm_offset:
    added to norms. pattern: every so many-eth block attends to everything, 0 where all do, or as the config says.
    activation: the only one that it computes."""

    name: str
    permuted: bool = False
    norm_offset: float = 0.0
    pattern: int = 0
    activation: str = "silu"


ARCHITECTURES = {
    "llama": Architecture("LLAMA", permuted=True),
    "mistral": Architecture("LLAMA", permuted=True),
    "qwen2": Architecture("QWEN2"),
    "qwen3": Architecture("QWEN3"),
    "gemma2": Architecture("GEMMA2", norm_offset=1.0, pattern=2, activation="gelu_pytorch_tanh"),
    "gemma3_text": Architecture("GEMMA3", norm_offset=1.0, pattern=6, activation="gelu_pytorch_tanh"),
}
"""model_type -> what llama.cpp calls it, for those of which every value is known to arrive."""


def architecture_of(config: Any, address: str) -> Architecture:
    """UsageError if llama.cpp does not know such a model as transformers does, or would compute something else."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UsageError(
            f"{address} is a {kind}, and GGUF is written of {known} alone. Leave out --gguf for a dense checkpoint, "
            "which llama.cpp's own converter may read."
        )
    found = ARCHITECTURES[kind]
    wrong = next(_differences(config, found), None)
    if wrong is not None:
        raise UsageError(f"{address}: llama.cpp computes a {kind} otherwise: {wrong}. Leave out --gguf.")
    return found


def _differences(config: Any, architecture: Architecture) -> Any:
    """What llama.cpp takes for granted of such models, and this one has otherwise."""
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        yield f"rotary positions of kind {rope['rope_type']!r}"
    if rope.get("rope_type") == "llama3" and not architecture.permuted:
        yield "rotary positions of kind 'llama3'"
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        yield f"rotary positions of kind {local['rope_type']!r} in sliding windows"
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != architecture.activation:
        yield f"the activation {activation}"
    if architecture.name not in ("LLAMA", "QWEN2") and getattr(config, "attention_bias", False):
        yield "attention_bias"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "rotary positions in a part of a head"
    if config.model_type in ("llama", "mistral") and getattr(config, "mlp_bias", False):
        yield "mlp_bias"
    if config.model_type == "mistral" and getattr(config, "sliding_window", None):
        yield f"sliding_window {config.sliding_window}"
    if config.model_type == "qwen2" and _head_dim(config) * config.num_attention_heads != config.hidden_size:
        yield f"{config.num_attention_heads} heads of {_head_dim(config)} are not as wide as hidden_size"
    if config.model_type in ("qwen2", "qwen3") and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        yield "sliding windows in some blocks"
    if config.model_type.startswith("gemma"):
        if config.query_pre_attn_scalar != _head_dim(config):
            yield f"query_pre_attn_scalar {config.query_pre_attn_scalar} and heads of {_head_dim(config)}"
        every = architecture.pattern
        usual = ["sliding_attention" if (k + 1) % every else "full_attention" for k in range(config.num_hidden_layers)]
        if list(config.layer_types) != usual:
            yield f"not every {every}th block attends to everything"
    if getattr(config, "use_bidirectional_attention", False):
        yield "attention to what comes later"


def write_metadata(writer: Any, config: Any, vocabulary: int) -> None:
    """Sizes, norms and positions of the model."""
    head_dim = _head_dim(config)
    writer.add_vocab_size(vocabulary)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if config.model_type.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
        local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
        if local is not None:
            writer.add_rope_freq_base_swa(float(local["rope_theta"]))
        if config.attn_logit_softcapping is not None:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)


def rope_factors(config: Any) -> Tensor | None:
    """What frequencies of Llama 3's longer contexts are divided by, (head_dim / 2,); None without such a scaling."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    head_dim, low, high = _head_dim(config), rope["low_freq_factor"], rope["high_freq_factor"]
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    smooth = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    found: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return found


def rotary_order(W: Tensor, heads: int) -> Tensor:
    """Rows of q or k, (heads * head_dim, ...), with the halves of each head's pairs side by side, as llama.cpp turns
    them."""
    return W.view(heads, 2, len(W) // heads // 2, *W.shape[1:]).transpose(1, 2).reshape(W.shape)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> dict[str, Any]:
    """Of blocks that attend to everything."""
    found = getattr(config, "rope_parameters", None) or {}
    return dict(found.get("full_attention") or found)
