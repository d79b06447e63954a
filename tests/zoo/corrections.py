"""What the rules of `tiny` get wrong: model type -> fields of its configuration; `...` leaves one at its default."""

from __future__ import annotations

from typing import Any

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SMALL_EFFICIENTNET = {
    "width_coefficient": 1.0, "depth_coefficient": 1.0, "in_channels": [32, 8, 16], "out_channels": [8, 16, 64],
    "kernel_sizes": [3, 3, 5], "strides": [1, 2, 2], "num_block_repeats": [1, 1, 1], "expand_ratios": [1, 6, 6],
    "hidden_dim": 1280,
}  # fmt: skip

# What a type's own configuration must be given to be built at all.
GIVEN: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
}

CORRECTIONS: dict[str, dict[str, Any]] = {
    # So that what is seldom takes part, too.
    "rwkv": {"num_hidden_layers": 4, "rescale_every": 2},
    # What must fit together.
    "align_vision_model": {**SMALL_EFFICIENTNET, "hidden_dim": 64},
    "autoformer": {"prediction_length": 4, "context_length": 16},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "bit": {"num_groups": 4},
    "blip-2": {"image_token_index": 299},
    "bros": {"dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2, "dim_bbox_projection": 16},
    "chameleon": {"vocabulary_map": {"<image>": 299, **{f"IMGIMG{c}Z": 260 + i for i, c in enumerate("ABCDEFGH")}}},
    "clvp_encoder": {"num_attention_heads": 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), ROPE),
    },
    "clap_audio_model": {
        "spec_size": 256,
        "patch_embeds_hidden_size": 16,
        "hidden_size": 128,
        "num_attention_heads": [2, 2, 4, 4],
    },
    "cvt": {"depth": (1, 2, 3), "embed_dim": (16, 48, 96)},
    "d_fine": {"encoder_in_channels": (64, 128, 256), "decoder_in_channels": (64, 64, 64)},
    "dbrx.attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "depth_pro": {"patch_size": 16, "image_size": 64, "intermediate_hook_ids": [1, 0]},
    "donut-swin": {"num_heads": [2, 2, 4, 4]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots3_note_vision_encoder": {"per_layer_config": None},
    "efficientnet": SMALL_EFFICIENTNET,
    "deepseek_ocr2.vision_config.sam_config": {"image_size": 384, "downsample_channels": [64, 64]},
    "deepseek_ocr2_vision.sam_config": {"image_size": 384, "downsample_channels": [64, 64]},
    "deimv2": {"encoder_in_channels": (64, 128, 256)},
    "efficientloftr": {"out_features": [16, 16, 32, 64], "stage_in_channels": ..., "num_attention_heads": 8},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}},
    "esm": {"vocab_size": 300, "pad_token_id": 0, "mask_token_id": 3},
    "fun_asr_nano.adaptor_config": {"intermediate_size": 16},
    "fastspeech2_conformer_hifigan": {"model_in_dim": 80},
    "gemma3n_text": {"intermediate_size": 96, "num_kv_shared_layers": 0, "activation_sparsity_pattern": None},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "glm5_next_text": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "glpn": {"num_encoder_blocks": 4},
    "granite_speech_encoder": {"context_size": 16},
    "granite_speech_plus_encoder": {"context_size": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hgnet_v2": {
        "stem_channels": (3, 8, 16),
        "stage_in_channels": (16, 32, 64, 128),
        "stage_mid_channels": (8, 16, 32, 64),
        "stage_out_channels": (32, 64, 128, 256),
        "hidden_sizes": [32, 64, 128, 256],
    },
    "informer": {"prediction_length": 4, "context_length": 16},
    "kosmos-2": {"latent_query_num": 16},
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "llama4_vision_model": {"intermediate_size": 256},
    "mamba2": {"num_heads": 8},
    "mask2former": {"feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64},
    "mimi": {"upsample_groups": 64},
    "superpoint": {"keypoint_decoder_dim": 65},
    "swin": {"embed_dim": 24, "num_heads": [2, 2, 4, 4]},
    "time_series_transformer": {"prediction_length": 4, "context_length": 16},
    "xlstm": {"num_heads": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
}
