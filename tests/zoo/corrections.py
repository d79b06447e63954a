"""What the rules of `tiny` get wrong: model type -> fields of its configuration; `...` leaves one at its default."""

from __future__ import annotations

from typing import Any

CORRECTIONS: dict[str, dict[str, Any]] = {
    # So that what is seldom takes part, too.
    "rwkv": {"num_hidden_layers": 4, "rescale_every": 2},
    # What must fit together.
    "cohere_compass_text": {"rope_parameters": ...},
    "depth_pro": {"patch_size": 16, "image_size": 64},
    "donut-swin": {"num_heads": [2, 2, 4, 4]},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots3_note_vision_encoder": {"per_layer_config": None},
    "gemma3n_text": {"intermediate_size": 96, "num_kv_shared_layers": 0, "activation_sparsity_pattern": None},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "glm5_next_text": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "mamba2": {"num_heads": 8},
    "xlstm": {"num_heads": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
}
