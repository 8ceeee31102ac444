"""LayerNorm, biases, an ungated MLP: GPT-2, and GPT-NeoX with Pythia."""

from __future__ import annotations

from qkattr.config import BlockConfig, ModelConfig, Rotary
from qkattr.kinds import NO_WINDOW
from qkattr.load.models.families.fields import Fields
from qkattr.load.models.families.reading import read_activation, read_rotary, read_sizes
from qkattr.load.models.families.tables import Family, Row


def _norm(tensor: str, field: str) -> tuple[Row, Row]:
    return Row(f"{tensor}.weight", "D", f"{field}.weight"), Row(
        f"{tensor}.bias", "D", f"{field}.bias"
    )


# GPT-2's linear maps are [in, out], unlike those of every other family.
_GPT2_BLOCK = (
    *_norm("ln_1", "norm_attn"),
    Row("attn.c_attn.weight", "D NH+KH+KH", "wq_DNH wk_DKH wv_DKH"),
    Row("attn.c_attn.bias", "NH+KH+KH", "bq_NH bk_KH bv_KH"),
    Row("attn.c_proj.weight", "NH D", "wo_NHD"),
    Row("attn.c_proj.bias", "D", "bo_D"),
    *_norm("ln_2", "norm_mlp"),
    Row("mlp.c_fc.weight", "D F", "w_up_DF"),
    Row("mlp.c_fc.bias", "F", "b_up_F"),
    Row("mlp.c_proj.weight", "F D", "w_down_FD"),
    Row("mlp.c_proj.bias", "D", "b_down_D"),
)
_NEOX_BLOCK = (
    *_norm("input_layernorm", "norm_attn"),
    Row("attention.query_key_value.weight", "N3H D", "wq_DNH wk_DKH wv_DKH"),
    Row("attention.dense.weight", "D NH", "wo_NHD"),
    *_norm("post_attention_layernorm", "norm_mlp"),
    Row("mlp.dense_h_to_4h.weight", "F D", "w_up_DF"),
    Row("mlp.dense_h_to_4h.bias", "F", "b_up_F"),
    Row("mlp.dense_4h_to_h.weight", "D F", "w_down_FD"),
    Row("mlp.dense_4h_to_h.bias", "D", "b_down_D"),
)
_NEOX_BIASES = (
    Row("attention.query_key_value.bias", "N3H", "bq_NH bk_KH bv_KH"),
    Row("attention.dense.bias", "D", "bo_D"),
)


def _gpt2(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields, grouped=False, widened=4)
    scaled = fields.take("scale_attn_weights", bool, True)
    return ModelConfig(
        **sizes,
        block=BlockConfig(
            scale=sizes["head_dim"] ** -0.5 if scaled else 1.0,
            norm="layer",
            eps=fields.positive("layer_norm_epsilon"),
            activation=read_activation(fields, "activation_function"),
        ),
        rotary=Rotary(base=1.0, dims=0),
        windows=(NO_WINDOW,) * sizes["n_blocks"],
        scale_by_depth=fields.take("scale_attn_by_inverse_layer_idx", bool, False),
    )


def _neox(fields: Fields) -> ModelConfig:
    sizes = read_sizes(fields, grouped=False)
    return ModelConfig(
        **sizes,
        block=BlockConfig(
            scale=sizes["head_dim"] ** -0.5,
            norm="layer",
            eps=fields.positive("layer_norm_eps"),
            activation=read_activation(fields),
            parallel=fields.take("use_parallel_residual", bool, True),
        ),
        rotary=read_rotary(fields, sizes["head_dim"], sizes["context"], partial=True),
        windows=(NO_WINDOW,) * sizes["n_blocks"],
        attention_bias=fields.take("attention_bias", bool, True),
    )


GPT2 = Family(
    read=_gpt2,
    block=lambda config: _GPT2_BLOCK,
    outside=(
        Row("wte.weight", "V D", "embed_VD"),
        Row("wpe.weight", "P D", "position_PD"),
        *_norm("ln_f", "norm_final"),
    ),
    stems=(("transformer.", "lm_head.weight"), ("", "lm_head.weight")),
    layers="h.{}.",
    unused=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),  # the causal mask
    aliases=dict(
        hidden_size="n_embd",
        num_attention_heads="n_head",
        num_hidden_layers="n_layer",
        max_position_embeddings="n_positions",
        intermediate_size="n_inner",
    ),
)
NEOX = Family(
    read=_neox,
    block=lambda config: (*_NEOX_BLOCK, *(_NEOX_BIASES if config.attention_bias else ())),
    outside=(Row("embed_in.weight", "V D", "embed_VD"), *_norm("final_layer_norm", "norm_final")),
    stems=(("gpt_neox.", "embed_out.weight"), ("", "embed_out.weight")),
    unused=(
        r".*\.rotary_emb\.inv_freq",
        r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias)",  # the causal mask
    ),
    aliases=dict(rope_theta="rotary_emb_base", partial_rotary_factor="rotary_pct"),
)
