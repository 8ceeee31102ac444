"""Gemma 2 and 3: norms before and after attention and MLP, gains stored less 1, embeddings times
sqrt(d_model), blocks with and without a window in turn. Of a multimodal Gemma 3 the text part.
"""

from __future__ import annotations

import dataclasses

from qkattr.config import BlockConfig, ModelConfig, Rotary
from qkattr.errors import InputError
from qkattr.load.models.families.fields import Fields
from qkattr.load.models.families.llama import ATTENTION, GATED_MLP, attention_biases
from qkattr.load.models.families.reading import (
    make_rotary,
    read_activation,
    read_rope,
    read_rotary,
    read_sizes,
    read_windows,
)
from qkattr.load.models.families.tables import Family, Row


def _norm(tensor: str, axes: str, field: str) -> Row:
    """Gemma multiplies by 1 + w."""
    return Row(f"{tensor}.weight", axes, field, plus=1.0)


_NORMS = (
    _norm("input_layernorm", "D", "norm_attn.weight"),
    _norm("post_attention_layernorm", "D", "norm_attn_post.weight"),
    _norm("pre_feedforward_layernorm", "D", "norm_mlp.weight"),
    _norm("post_feedforward_layernorm", "D", "norm_mlp_post.weight"),
)
_QK_NORMS = (
    _norm("self_attn.q_norm", "H", "norm_q"),
    _norm("self_attn.k_norm", "H", "norm_k"),
)


def _gemma2_block(config: ModelConfig) -> tuple[Row, ...]:
    return (*_NORMS, *ATTENTION, *attention_biases(config), *GATED_MLP)


def _gemma3_block(config: ModelConfig) -> tuple[Row, ...]:
    return (*_gemma2_block(config), *_QK_NORMS)


def _read(fields: Fields, pattern: int) -> ModelConfig:
    """What Gemma 2 and 3 share. pattern: every so many blocks, one has no window."""
    if fields.left.get("sliding_window") is None:
        raise InputError(
            f"config.json has no sliding_window; it is not a complete {fields.family} config"
        )
    sizes = read_sizes(fields)
    gemma2, head_dim, context = fields.family == "gemma2", sizes["head_dim"], sizes["context"]
    rotary, local = (
        (read_rotary(fields, head_dim, context), None)
        if gemma2
        else _two_rotaries(fields, head_dim, context)
    )
    return ModelConfig(
        **sizes,
        block=BlockConfig(
            scale=fields.positive("query_pre_attn_scalar") ** -0.5,
            eps=fields.positive("rms_norm_eps"),
            activation=read_activation(fields, "hidden_activation"),
            softcap=fields.positive("attn_logit_softcapping", None) if gemma2 else None,
        ),
        rotary=rotary,
        local_rotary=local,
        windows=read_windows(fields, sizes["n_blocks"], lambda b: (b + 1) % pattern != 0),
        attention_bias=fields.take("attention_bias", bool, False),
        final_softcap=fields.positive("final_logit_softcapping", None),
    )


def _gemma2(fields: Fields) -> ModelConfig:
    return _read(fields, 2)


def _gemma3(fields: Fields) -> ModelConfig:
    return _read(fields, fields.size("sliding_window_pattern"))


def _two_rotaries(fields: Fields, head_dim: int, context: int) -> tuple[Rotary, Rotary]:
    """Of blocks without a window and with one: an object a layer type, or the older attributes,
    in which rope_scaling is of the blocks without a window alone.
    """
    whole = dict(rope_theta=fields.positive("rope_theta", 1e6))
    local = dict(rope_theta=fields.positive("rope_local_base_freq", 1e4))
    rope = read_rope(fields)
    for kind, table in (("full_attention", whole), ("sliding_attention", local)):
        own = rope.pop(kind, None) or {}
        if not isinstance(own, dict):
            raise InputError(
                f"config.json: rope_parameters of {kind} should be an object, got {own!r:.40}; "
                f"restore the model's own config"
            )
        table.update(own)
    return make_rotary(whole | rope, head_dim, context), make_rotary(local, head_dim, context)


def _multimodal(fields: Fields) -> ModelConfig:
    """The text part of a Gemma 3 that also sees."""
    text = dict(fields.take("text_config", dict, {}))
    if text.get("model_type", "gemma3_text") != "gemma3_text":
        raise InputError(
            f"config.json: text_config is of type {text['model_type']!r:.40}, expected "
            f"'gemma3_text'; restore the model's own config"
        )
    tied = fields.take("tie_word_embeddings", bool)
    if "tie_word_embeddings" in fields.raw and text.setdefault("tie_word_embeddings", tied) != tied:
        raise InputError(
            "config.json: tie_word_embeddings differs from that of text_config; "
            "restore the model's own config"
        )
    config = GEMMA3_TEXT.config({"model_type": "gemma3_text"} | text, fields.accept)
    return dataclasses.replace(config, family=fields.family)


_OUTSIDE = (
    Row("embed_tokens.weight", "V D", "embed_VD"),
    _norm("norm", "D", "norm_final.weight"),
)

GEMMA2 = Family(read=_gemma2, block=_gemma2_block, outside=_OUTSIDE, scaled_embedding=True)
GEMMA3_TEXT = Family(read=_gemma3, block=_gemma3_block, outside=_OUTSIDE, scaled_embedding=True)
GEMMA3 = dataclasses.replace(
    GEMMA3_TEXT,
    read=_multimodal,
    stems=(
        ("model.language_model.", "lm_head.weight"),
        ("language_model.model.", "language_model.lm_head.weight"),
    ),
    unused=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
)
