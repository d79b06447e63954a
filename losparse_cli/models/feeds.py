"""What feeds a linear layer: a norm's weight, or rows of another layer, that can take a factor of each channel.

Formats of other engines hold no factors of columns. Where a layer reads the output of a norm, or what rows of another
layer put out and nothing but sums and products of channels came between, a factor of its column k may as well multiply
the weight of the norm, or those rows: the function stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
"""Whose blocks were looked through: attention sums rows of v over tokens, and up is multiplied into down as it is."""


@dataclass(frozen=True)
class Feed:
    """source: module name of the norm or the linear layer. readers: every linear layer that reads it. repeats, width:
    each run of `width` channels is read so many times in a row, as heads of attention that share their values do.
    norm: whether the source is one."""

    source: str
    readers: tuple[str, ...]
    repeats: int
    width: int
    norm: bool


def find_feeds(model: Any) -> dict[str, Feed]:
    """Linear layer -> what feeds it, for those of which it is known."""
    config = model.config.get_text_config()
    if config.model_type not in MODEL_TYPES:
        return {}
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    repeats = heads // config.num_key_value_heads
    found: dict[str, Feed] = {}
    for block, module in model.named_modules():
        children = dict(module.named_children())
        if not {"self_attn", "mlp", "input_layernorm"} <= children.keys():
            continue
        before_mlp = next(n for n in ("pre_feedforward_layernorm", "post_attention_layernorm") if n in children)
        feeds = [
            Feed(f"{block}.input_layernorm", _all(f"{block}.self_attn", "qkv"), 1, hidden, True),
            Feed(f"{block}.self_attn.v_proj", (f"{block}.self_attn.o_proj",), repeats, head_dim, False),
            Feed(f"{block}.{before_mlp}", (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"), 1, hidden, True),
            Feed(f"{block}.mlp.up_proj", (f"{block}.mlp.down_proj",), 1, config.intermediate_size, False),
        ]
        found |= {reader: feed for feed in feeds for reader in feed.readers}
    return {name: feed for name, feed in found.items() if isinstance(model.get_submodule(name), nn.Linear)}


def _all(attention: str, letters: str) -> tuple[str, ...]:
    return tuple(f"{attention}.{letter}_proj" for letter in letters)
