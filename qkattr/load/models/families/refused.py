"""Families that are refused by name, and why."""

from __future__ import annotations

_EXPERTS = "its MLPs are mixtures of experts, and a block of qkattr has one MLP"
_HYBRID = (
    "it has state-space, recurrent or linear-attention blocks, and these blocks have no QK score"
)
_LATENT = (
    "its keys are compressed and its MLPs are mixtures of experts, which qkattr does not implement"
)

REFUSED = (
    dict.fromkeys(
        """mixtral qwen2_moe qwen3_moe qwen3_vl_moe phimoe olmoe dbrx gpt_oss granitemoe
        granitemoeshared jetmoe arctic ernie4_5_moe glm4_moe hunyuan_v1_moe llama4 llama4_text dots1
        minimax_m2 flex_olmo afmoe exaone_moe cohere2_moe nllb_moe""".split(),
        _EXPERTS,
    )
    | dict.fromkeys("deepseek_v2 deepseek_v3 deepseek_v32 kimi_k2 glm4_moe_lite".split(), _LATENT)
    | dict.fromkeys(
        """mamba mamba2 falcon_mamba falcon_h1 jamba bamba zamba zamba2 rwkv rwkv5 rwkv6 rwkv7 xlstm
        recurrent_gemma granitemoehybrid qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe lfm2 lfm2_moe
        minimax nemotron_h olmo_hybrid kimi_linear bailing_hybrid plamo2 hymba retnet""".split(),
        _HYBRID,
    )
)
