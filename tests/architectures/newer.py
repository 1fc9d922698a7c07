"""DeepSeek, GLM, MiniMax and others of the last years."""

from __future__ import annotations

from architectures.variant import FULL_SLIDING, LARGE_CHANNEL, LATENT, LATENT3, NO_EYES, TEXT, Variant, rope

NEWER: tuple[Variant, ...] = (
    Variant("DeepSeek-V2", "deepseek_v2", LATENT | {"first_k_dense_replace": 1, "n_shared_experts": 1}),
    Variant("DeepSeek-V3", "deepseek_v3", LATENT3),
    Variant(
        "DeepSeek-V3, YaRN rope",
        "deepseek_v3",
        LATENT3 | rope("yarn", factor=16.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0),
        (32,),
    ),
    Variant(
        "DeepSeek-V3.2",
        "deepseek_v32",
        LATENT
        | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
        | {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 16},
        (16,),
    ),
    Variant(
        "DeepSeek-V4",
        "deepseek_v4",
        {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "q_lora_rank": 16,
            "o_lora_rank": 8,
            "o_groups": 2,
            "index_n_heads": 16,
            "index_head_dim": 16,
            "index_topk": 4,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
            "mlp_layer_types": ["moe", "moe", "moe"],
            "sliding_window": 16,
            "partial_rotary_factor": 0.5,
        },
        (4, 8, 16),
        LARGE_CHANNEL,
    ),
    Variant("GLM", "glm", {"partial_rotary_factor": 0.5, "attention_bias": True}),
    Variant("GLM-4", "glm4", {"partial_rotary_factor": 0.5}),
    Variant("GLM-4 MoE", "glm4_moe", {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "use_qk_norm": True}),
    Variant("GLM-4 MoE Lite", "glm4_moe_lite", LATENT | {"head_dim": ..., "mlp_layer_types": ["dense", "sparse"]}),
    Variant(
        "GLM-5",
        "glm_moe_dsa",
        LATENT | {"first_k_dense_replace": 1, "index_topk": 16, "index_head_dim": 16, "index_n_heads": 16},
        (16,),
    ),
    Variant("MiniMax", "minimax", {"layer_types": ["linear_attention", "full_attention"], "block_size": 16}, (16,)),
    Variant("MiniMax-M2", "minimax_m2", {"rotary_dim": 16}),
    Variant("MiniCPM3", "minicpm3", LATENT | {"head_dim": ..., "dim_model_base": 64}),
    Variant(
        "LongCat-Flash",
        "longcat_flash",
        LATENT
        | {"num_layers": 1, "num_hidden_layers": ..., "zero_expert_num": 2}
        | {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, "moe_topk": 2, "num_experts_per_tok": ...},
    ),
    Variant("Ernie 4.5", "ernie4_5", {"use_bias": True}),
    Variant("Ernie 4.5 MoE", "ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}),
    Variant("EXAONE 4", "exaone4", FULL_SLIDING | {"sliding_window_pattern": None}, (16,)),
    Variant(
        "EXAONE MoE", "exaone_moe", FULL_SLIDING | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}, (16,)
    ),
    Variant("SmolLM3", "smollm3", {"no_rope_layers": [1, 0]}),
    Variant("HunYuan", "hunyuan_v1_dense"),
    Variant("HunYuan, dynamic NTK rope", "hunyuan_v1_dense", rope("dynamic", factor=1.0, alpha=100.0)),
    Variant("HunYuan MoE", "hunyuan_v1_moe", {"moe_topk": [2, 2]}),
    Variant("HY 3", "hy_v3"),
    Variant("Seed-OSS", "seed_oss", {"attention_bias": True}),
    Variant("Arcee", "arcee"),
    Variant("Apertus", "apertus"),
    Variant("LFM2", "lfm2", {"layer_types": ["conv", "full_attention"]}),
    Variant("LFM2-MoE", "lfm2_moe", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    Variant("Helium", "helium"),
    Variant("dots.llm1", "dots1", {"first_k_dense_replace": 1, "n_shared_experts": 1}),
    Variant("Diff-Llama", "diffllama"),
    Variant("NanoChat", "nanochat", {"final_logit_softcapping": 3.0}),
    Variant("gpt-oss", "gpt_oss", FULL_SLIDING, (16,)),
    Variant("gpt-oss, a large channel", "gpt_oss", FULL_SLIDING, (16,), LARGE_CHANNEL),
    Variant("Doge", "doge", {"keep_window_size": 16}, (16,)),
    Variant("BitNet", "bitnet"),
    Variant("AFMoE", "afmoe", FULL_SLIDING | {"num_dense_layers": 1, "global_attn_every_n_layers": 2}, (16,)),
    Variant("CWM", "cwm", FULL_SLIDING, (16,)),
    Variant("HyperCLOVA X", "hyperclovax"),
    Variant("Jais 2", "jais2"),
    Variant("Laguna", "laguna", FULL_SLIDING | {"shared_expert_intermediate_size": 24}, (16,)),
    Variant("MiMo-V2-Flash", "mimo_v2_flash", {"sliding_window": 16}, (16,)),
    Variant("Solar Open", "solar_open"),
    Variant("Youtu", "youtu", LATENT | {"head_dim": ...}),
    Variant(
        "Kimi-Linear",
        "kimi_linear",
        LATENT
        | {"layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 8, "linear_num_heads": 4}
        | {"q_lora_rank": ..., "head_dim": ...},
    ),
    Variant(
        "MiniMax-M3, a large channel",
        "minimax_m3_vl_text",
        {"rotary_dim": 16, "index_head_dim": 8, "dense_intermediate_size": 48, "shared_intermediate_size": 24}
        | {"mlp_layer_types": ["dense", "sparse"]},
        loud=LARGE_CHANNEL,
    ),
    Variant(
        "HY 4, a large channel",
        "hy_v4",
        LATENT
        | {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 16, "mlp_layer_types": ["dense", "sparse"]}
        | {"head_dim": 16, "v_head_dim": 8},
        (16,),
        LARGE_CHANNEL,
    ),
    Variant(
        "GLM-5 next, a large channel",
        "glm5_next",
        {
            "text_config": TEXT
            | LATENT
            | {
                "qk_rope_head_dim": 0,
                "head_dim": 0,
                "layer_types": ["linear_attention", "indexed_attention"],
                "mlp_layer_types": ["dense", "sparse"],
                "index_topk": 16,
                "index_head_dim": 16,
                "index_n_heads": 16,
                "index_kpool": 2,
                "linear_head_dim": 8,
                "linear_num_heads": 4,
                "hc_mult": 2,
            },
            "vision_config": NO_EYES,
        },
        (16,),
        LARGE_CHANNEL,
    ),
    Variant(
        "Step-3.7, a large channel",
        "step3p7",
        {
            "text_config": TEXT
            | FULL_SLIDING
            | {
                "mlp_layer_types": ["dense", "sparse"],
                "share_expert_dim": 24,
                "swiglu_limits": [7.0, 7.0],
                "swiglu_limits_shared": [16.0, 16.0],
            },
            "vision_config": NO_EYES,
        },
        (16,),
        LARGE_CHANNEL,
    ),
)
