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
    "chmv2.backbone_config": {"return_class_token": True},
    "clap_audio_model": {
        "spec_size": 256,
        "patch_embeds_hidden_size": 16,
        "hidden_size": 128,
        "num_attention_heads": [2, 2, 4, 4],
    },
    "clvp_encoder": {"num_attention_heads": 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), ROPE),
    },
    "cvt": {"depth": (1, 2, 3), "embed_dim": (16, 48, 96)},
    "d_fine": {"encoder_in_channels": (64, 128, 256), "decoder_in_channels": (64, 64, 64)},
    "dbrx.attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "deepseek_ocr2.vision_config.sam_config": {"image_size": 384, "downsample_channels": [64, 64]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_ocr2_vision.sam_config": {"image_size": 384, "downsample_channels": [64, 64]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deimv2": {"encoder_in_channels": (64, 128, 256)},
    "depth_pro": {"patch_size": 16, "image_size": 64, "intermediate_hook_ids": [1, 0]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96},
    "donut-swin": {"embed_dim": 24, "num_heads": [2, 2, 4, 4], "window_size": 4, "image_size": 128},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots3_note_vision_encoder": {"per_layer_config": None},
    "edgetam_prompt_encoder": {"image_size": 128, "patch_size": 16},
    "efficientloftr": {"out_features": [16, 16, 32, 64], "stage_in_channels": ..., "num_attention_heads": 8},
    "efficientnet": SMALL_EFFICIENTNET,
    "ernie4_5_vl_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}},
    "esm": {"vocab_size": 300, "pad_token_id": 0, "mask_token_id": 3},
    "esmfold2_atom_encoder": {"num_uid_rope_pairs": 2},
    "fastspeech2_conformer_hifigan": {"model_in_dim": 80},
    "fun_asr_nano.adaptor_config": {"intermediate_size": 16},
    "gemma3n_text": {"intermediate_size": 96, "num_kv_shared_layers": 0, "activation_sparsity_pattern": None},
    "gemma4_assistant.text_config": {"num_kv_shared_layers": 0},
    "gemma4_unified_assistant.text_config": {"num_kv_shared_layers": 0},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "glm5_next_text": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "spatial_target_layers": [0, 1],
        "downsample_rate": "4/8",
    },
    "granite_speech_encoder": {"context_size": 16},
    "granite_speech_plus_encoder": {"context_size": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hgnet_v2": {
        "stem_channels": (3, 8, 16),
        "stage_in_channels": (16, 32, 64, 128),
        "stage_mid_channels": (8, 16, 32, 64),
        "stage_out_channels": (32, 64, 128, 256),
        "hidden_sizes": [32, 64, 128, 256],
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "informer": {"prediction_length": 4, "context_length": 16},
    "instructblip": {"image_token_index": 299},
    "instructblipvideo": {"video_token_index": 299},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kosmos-2": {"latent_query_num": 16},
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "llama4_vision_model": {"intermediate_size": 256},
    "mamba2": {"num_heads": 8},
    "markuplm": {
        "tag_pad_id": 216,
        "subs_pad_id": 1001,
        "max_xpath_tag_unit_embeddings": 256,
        "max_xpath_subs_unit_embeddings": 1024,
    },
    "mask2former": {"feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64},
    "mimi": {"upsample_groups": 64},
    "mimi_decoder": {"upsample_groups": 64},
    "ministral": {"head_dim": 16},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "mpnet": {"relative_attention_num_buckets": 32},
    "nemotron_h_omni.vision_config": {"video_temporal_patch_size": 2},
    "pocket_tts_audio_tokenizer_decoder": {"upsample_groups": 64},
    "qwen3_omni_moe_talker": {"spatial_merge_size": 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 96},
    "sam2_hiera_det_model": {
        "hidden_size": 32,
        "embed_dim_per_stage": [32, 64, 128, 256],
        "blocks_per_stage": [1, 2, 1, 1],
        "global_attention_blocks": [2],
        "image_size": [128, 128],
    },
    "sam2_prompt_encoder": {"image_size": 128, "patch_size": 16},
    "sam2_vision_model": {
        "backbone_channel_list": [256, 128, 64, 32],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    },
    "sam_hq_prompt_encoder": {"image_embedding_size": 8},
    "sam_hq_vision_model": {"num_pos_feats": 32},
    "shieldgemma2": {"mm_tokens_per_image": 16, "yes_token_index": 5, "no_token_index": 6},
    "superpoint": {"keypoint_decoder_dim": 65},
    "swin": {"embed_dim": 24, "num_heads": [2, 2, 4, 4]},
    "swin2sr": {"embed_dim": 60, "num_heads": [6, 6], "depths": [2, 2]},
    "time_series_transformer": {"prediction_length": 4, "context_length": 16},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}
