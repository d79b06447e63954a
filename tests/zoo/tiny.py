"""A model type's tiny configuration, found by structure: what is called and valued like a size is made small."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from typing import Any

from .corrections import CORRECTIONS

VOCABULARY = 300  # 256 bytes, a few special tokens, and tokens that stand for pictures and sounds
WIDTH = 64
LAYERS = 2

# Tried in this order. What an entry matches is decided by it alone.
RULES: tuple[tuple[str, int | None], ...] = (
    (r"(sampling|sample)_rate|hop_length|.*_theta|.*_base|.*temperature.*|scale|num_labels", None),
    (r"num_feat_extract_layers|chunk_right_context|chunk_length|num_encoder_blocks", None),
    (r".*vocab(ulary)?(_size.*)?", VOCABULARY),
    (r"num_embeddings|codebook_size|.*_bins", 256),
    (r".*(kernel|stride|conv_pos|dilation|padding|window_size|ratio|factor|groups|_mult|multiplier|bias_max).*", None),
    (r"num_(hidden|encoder|decoder|attention|kv_shared|nextn_predict|mtp)?_?(hidden_)?layers(_\w+)?", LAYERS),
    (r"(\w+_)?(num_)?(n_)?(hidden_)?layers?|depth|num_blocks|\w+_depth|num_(\w+_)?blocks|n_layer", LAYERS),
    (r".*(key_value|kv|query_group)_?\w*heads.*|.*num_key_heads", 2),
    (r".*num_value_heads", 4),
    (r".*_?heads|n_head|num_(\w+_)?heads", 4),
    (r"(qk_)?rope_head_dim|rotary_dim|qk_rope_head_dim|index_head_dim", 8),
    (r"(\w+_)?(head_dim|dim_head|d_kv|attention_head_size|head_size)|qk_nope_head_dim", 16),
    (r"(\w+_)?(kv|q|o)_lora_rank|gate_low_rank_dim", 24),
    (r"num_experts_per_tok|moe_topk|topk_group|top_k(_experts)?|num_experts_per_token|moe_k", 2),
    (r"n_group|num_expert_group", 2),
    (r"(\w+_)?num_(\w+_)?experts|n_routed_experts|num_experts|zero_expert_num", 4),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r".*(intermediate|ffn|mlp_dim|inner|d_ff|feedforward|dff|feed_forward).*", 96),
    (r"(\w+_)?(image|img|pretrain_image)_size|input_size", 64),
    (r"(\w+_)?patch_size", 8),
    (r".*max_position_embeddings|n_positions|n_ctx|context_length|max_(source|target)_positions|\w*_positions", 128),
    (r".*(sliding_window|local_attention|attention_window|chunk_size|block_size)", 8),
    (r"num_mel_bins|feature_size|mel_dim|input_feat_per_channel", 16),
    (r".*(hidden|width|dim|channels?|embd|d_model|embed|features|state_size|d_state|size|units|filters)(_\w+)?", WIDTH),
    (r"num_(image_|query_|mask_)?(queries|tokens|latents|patches)|.*seq_length|.*num_queries", 16),
    (r".*num_.*|.*max_.*|.*_length|.*_len|.*topk", 16),
)

# What is alike stays alike: keys for every query, what is turned of a head.
ALIKE = (("num_key_value_heads", "num_attention_heads"), ("head_dim", "qk_rope_head_dim"))


def shrink(config: Any, model_type: str = "", level: int = 0) -> Any:
    """A small configuration of the class of `config`, the default one, and of the same structure.

    level: 0 makes all sizes small; 1 keeps one layer of each kind that there is; 2 leaves the widths as they are.
    """
    changes: dict[str, Any] = {}
    for key, value in _given(config):
        if hasattr(value, "to_dict"):
            changes[key] = shrink(value, f"{model_type}.{key}", level)
        elif isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
            changes[key] = type(value)(_short_list(key, list(value), 2 * LAYERS if level else LAYERS))
        elif type(value) is int:
            small = _small(key, value, level)
            if small is not None:
                changes[key] = small
        if key not in changes and isinstance(value, bool | int | float | str) and _chosen(config, key, value):
            changes[key] = value
    for key, other in ALIKE:
        if key in changes and other in changes and getattr(config, key) == getattr(config, other):
            changes[key] = changes[other]
    if "mrope_section" in (getattr(type(config), "ignore_keys_at_rope_validation", None) or ()) and level < 2:
        changes["rope_parameters"] = _rope(config)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if level == 1 and len(kinds) > 1 and "num_hidden_layers" in changes:
        changes |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    changes |= _tokens(config) | _stages(config, changes)
    changes |= CORRECTIONS.get(str(config.model_type), {})
    changes |= CORRECTIONS.get(model_type, {}) if model_type else {}
    changes = {key: value for key, value in changes.items() if value is not ...}
    try:
        return type(config)(**changes)
    except Exception:
        plain = {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in changes.items()}
        return type(config)(**plain)


def _rope(config: Any) -> dict[str, Any]:
    """The default's, its three sections together half as wide as what is turned of a head."""
    known = dict(getattr(config, "rope_parameters", None) or {})
    half = int(16 * (known.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1)) // 2
    return {**known, "mrope_section": [half - 2 * (half // 4), half // 4, half // 4]}


def _stages(config: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """What a backbone gives out: from as many of its layers or stages as by default."""
    indices = list(getattr(config, "_out_indices", None) or ())
    if not indices or "stage_names" not in vars(config):
        return {}
    if "num_hidden_layers" in changes and len(config.stage_names) == config.num_hidden_layers + 1:
        last = max(LAYERS, len(indices))
        return {"num_hidden_layers": last, "out_indices": list(range(last - len(indices) + 1, last + 1))}
    return {"out_indices": indices}


def _given(config: Any) -> Iterator[tuple[str, Any]]:
    """Fields that the class itself gives a value, not those computed from others."""
    fields: Mapping[str, Any] = getattr(type(config), "__dataclass_fields__", {})
    for key, value in vars(config).items():
        if key.startswith("_") or key in ("id2label", "label2id"):
            continue
        field = fields.get(key)
        computed = field is not None and field.default is None and field.default_factory is MISSING
        if not computed or hasattr(value, "to_dict"):
            yield key, value


def _chosen(config: Any, key: str, value: Any) -> bool:
    """Whether a configuration inside another one was given a value that is not its own default."""
    field = getattr(type(config), "__dataclass_fields__", {}).get(key)
    return field is not None and type(field.default) is type(value) and field.default != value


def _small(key: str, value: int, level: int) -> int | None:
    if value <= 3 or (re.search(r"token|_id$|index", key) and "num" not in key and "size" not in key):
        return None
    for pattern, limit in RULES:
        if re.fullmatch(pattern, key):
            if limit is None or (level > 1 and limit not in (VOCABULARY, LAYERS, 128)):
                return None
            if limit == VOCABULARY:
                return limit  # of bytes, even where the default is of amino acids
            return min(value, 2 * limit if level and limit == LAYERS and "layers" in key else limit)
    return None


def _short_list(key: str, values: list[int], layers: int) -> list[int]:
    if re.search(r"ind(ex|ices|exes)|idx|extract_layers|_layer_ids", key):
        return list(range(min(len(values), layers)))
    if re.search(r"depth|layers|blocks", key):
        return [min(v, 1) for v in values]
    if re.search(r"kernel|stride|ratio|padding|dilation|scales|window|rate|patch", key):
        return values
    if re.search(r"image|size$", key) and "hidden" not in key:
        return [min(v, WIDTH) for v in values]
    largest = max(values)
    if largest <= WIDTH:
        return values
    if len(set(values)) == 1 and "head" not in key:
        return [WIDTH] * len(values)
    if "head" in key:
        return [max(1, v * WIDTH // largest) for v in values]
    return [v if v <= 3 else max(8, v * WIDTH // (4 * largest) * 8) for v in values]  # 3: of a picture's colours


def _tokens(config: Any) -> dict[str, Any]:
    """Special tokens within the vocabulary, no two alike; text never holds those of pictures and sounds."""
    usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2}
    found: dict[str, Any] = {}
    free = iter(range(VOCABULARY - 1, 258, -1))
    for key, value in _given(config):
        if not re.search(r"token(_id|_index|_ids)?s?$|_(id|idx|index)$", key) or re.search(r"(^|_)(num|max|n)_", key):
            continue
        if type(value) is int and value >= 0:  # no bool
            found[key] = usual.get(key, next(free) if value > 3 else value)
        elif isinstance(value, list) and value and all(type(v) is int for v in value):
            found[key] = usual.get(key) if key in usual else [next(free) for _ in value[:4]]
    if getattr(config, "is_encoder_decoder", False):
        found.setdefault("decoder_start_token_id", usual["decoder_start_token_id"])
    return found
