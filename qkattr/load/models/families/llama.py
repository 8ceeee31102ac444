"""RMSNorm, rotary, grouped-query attention, gated MLP: Llama 2 and 3, Mistral, Qwen 2 and 3,
OLMo 2, Phi-3. They differ in biases, QK-norm, where the norms stand, windows, and fused tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qkattr.config import BlockConfig, ModelConfig
from qkattr.kinds import NO_WINDOW
from qkattr.load.models.families.fields import Fields
from qkattr.load.models.families.reading import (
    read_activation,
    read_rotary,
    read_sizes,
    read_windows,
)
from qkattr.load.models.families.tables import Family, Row

ATTENTION = (
    Row("self_attn.q_proj.weight", "NH D", "wq_DNH"),
    Row("self_attn.k_proj.weight", "KH D", "wk_DKH"),
    Row("self_attn.v_proj.weight", "KH D", "wv_DKH"),
    Row("self_attn.o_proj.weight", "D NH", "wo_NHD"),
)
QKV_BIASES = (
    Row("self_attn.q_proj.bias", "NH", "bq_NH"),
    Row("self_attn.k_proj.bias", "KH", "bk_KH"),
    Row("self_attn.v_proj.bias", "KH", "bv_KH"),
)
OUTPUT_BIAS = (Row("self_attn.o_proj.bias", "D", "bo_D"),)
GATED_MLP = (
    Row("mlp.gate_proj.weight", "F D", "w_gate_DF"),
    Row("mlp.up_proj.weight", "F D", "w_up_DF"),
    Row("mlp.down_proj.weight", "D F", "w_down_FD"),
)
OUTSIDE = (
    Row("embed_tokens.weight", "V D", "embed_VD"),
    Row("norm.weight", "D", "norm_final.weight"),
)
_MLP_BIASES = (
    Row("mlp.gate_proj.bias", "F", "b_gate_F"),
    Row("mlp.up_proj.bias", "F", "b_up_F"),
    Row("mlp.down_proj.bias", "D", "b_down_D"),
)
_PRE_NORMS = (
    Row("input_layernorm.weight", "D", "norm_attn.weight"),
    Row("post_attention_layernorm.weight", "D", "norm_mlp.weight"),
)
_POST_NORMS = (
    Row("post_attention_layernorm.weight", "D", "norm_attn_post.weight"),
    Row("post_feedforward_layernorm.weight", "D", "norm_mlp_post.weight"),
)
_HEAD_NORMS = (
    Row("self_attn.q_norm.weight", "H", "norm_q"),
    Row("self_attn.k_norm.weight", "H", "norm_k"),
)
_WIDE_NORMS = (
    Row("self_attn.q_norm.weight", "NH", "norm_q"),
    Row("self_attn.k_norm.weight", "KH", "norm_k"),
)
_FUSED = (
    Row("self_attn.qkv_proj.weight", "NH+KH+KH D", "wq_DNH wk_DKH wv_DKH"),
    Row("self_attn.o_proj.weight", "D NH", "wo_NHD"),
    Row("mlp.gate_up_proj.weight", "F+F D", "w_gate_DF w_up_DF"),
    Row("mlp.down_proj.weight", "D F", "w_down_FD"),
)


def attention_biases(config: ModelConfig) -> tuple[Row, ...]:
    """Of all four projections, where the config has them."""
    return QKV_BIASES + OUTPUT_BIAS if config.attention_bias else ()


def _read(
    fields: Fields, sliding: Callable[[int], bool] | None = None, **values: Any
) -> ModelConfig:
    """What the families here share.

    sliding: which blocks have a window, where the config does not list them; None: the family has
    none. values: the rest of `ModelConfig`.
    """
    sizes = read_sizes(fields)
    n_blocks, head_dim = sizes["n_blocks"], sizes["head_dim"]
    no_windows = (NO_WINDOW,) * n_blocks
    return ModelConfig(
        **sizes,
        block=BlockConfig(
            scale=head_dim**-0.5,
            eps=fields.positive("rms_norm_eps"),
            activation=read_activation(fields),
        ),
        rotary=read_rotary(fields, head_dim, sizes["context"], partial=fields.family == "phi3"),
        windows=no_windows if sliding is None else read_windows(fields, n_blocks, sliding),
        **values,
    )


def _llama(fields: Fields) -> ModelConfig:
    biases = dict(
        attention_bias=fields.take("attention_bias", bool, False),
        mlp_bias=fields.take("mlp_bias", bool, False),
    )
    return _read(fields, **biases)


def _olmo2(fields: Fields) -> ModelConfig:
    return _read(fields, attention_bias=fields.take("attention_bias", bool, False))


def _windowed(fields: Fields) -> ModelConfig:
    """Mistral and Phi-3: one window for all blocks, or none."""
    return _read(fields, lambda b: True)


def _qwen(fields: Fields) -> ModelConfig:
    """Qwen 2 always has biases, Qwen 3 where its config says so."""
    if not fields.take("use_sliding_window", bool, False):
        fields.left["sliding_window"] = None
    first = fields.take("max_window_layers", int, 28)
    bias = fields.family == "qwen2" or fields.take("attention_bias", bool, False)
    return _read(fields, lambda b: b >= first, attention_bias=bias)


LLAMA = Family(
    read=_llama,
    block=lambda config: (
        *_PRE_NORMS,
        *ATTENTION,
        *GATED_MLP,
        *attention_biases(config),
        *(_MLP_BIASES if config.mlp_bias else ()),
    ),
    outside=OUTSIDE,
)
MISTRAL = Family(
    read=_windowed,
    block=lambda config: (*_PRE_NORMS, *ATTENTION, *GATED_MLP),
    outside=OUTSIDE,
)
QWEN2 = Family(
    read=_qwen,
    block=lambda config: (*_PRE_NORMS, *ATTENTION, *QKV_BIASES, *GATED_MLP),
    outside=OUTSIDE,
)
QWEN3 = Family(
    read=_qwen,
    block=lambda config: (
        *_PRE_NORMS,
        *ATTENTION,
        *attention_biases(config),
        *_HEAD_NORMS,
        *GATED_MLP,
    ),
    outside=OUTSIDE,
)
OLMO2 = Family(
    read=_olmo2,
    block=lambda config: (
        *_POST_NORMS,
        *ATTENTION,
        *attention_biases(config),
        *_WIDE_NORMS,
        *GATED_MLP,
    ),
    outside=OUTSIDE,
)
PHI3 = Family(
    read=_windowed,
    block=lambda config: (*_PRE_NORMS, *_FUSED),
    outside=OUTSIDE,
)
