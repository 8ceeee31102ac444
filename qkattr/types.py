"""The axis legend, and the frozen pytrees that cross module borders.

Axis letters, used verbatim in einsum strings and as suffixes of arrays that meet in one:

    B batch             L block              F MLP hidden           C key-side or source components
    T query position    N query heads        V vocabulary           E edges kept of one target
    S key position      K key/value heads    M dictionary width     R target rows
    D d_model           G = N / K            A feature slots,       U distinct directions in use
                        H head_dim           query-side components

Boundary b = 0..L: boundary 0 is the embedding output, boundary b the residual stream after block
b - 1. The QK circuit of block b reads boundary b. Query head n reads key/value head n // G.
"""

from __future__ import annotations

from flax import struct
from jaxtyping import Array, Float, Int

from qkattr.kinds import FOLDED_KINDS as FOLDED_KINDS
from qkattr.kinds import NO_WINDOW as NO_WINDOW
from qkattr.kinds import PROMPT_KINDS as PROMPT_KINDS
from qkattr.kinds import Kind as Kind


@struct.dataclass
class Norm:
    """An RMSNorm (no bias) or LayerNorm (bias) with its gain as it multiplies:
    Gemma's 1 + w is stored as 1 + w.
    """

    weight: Float[Array, "D"]
    bias: Float[Array, "D"] | None = None


@struct.dataclass
class BlockWeights:
    """One transformer block, or L of them stacked on a leading axis.
    `None` is a part that the family does not have.

    This is all that qkattr needs of a model to expand scores, edges and head loadings;
    `docs/embedding.md` maps a Flax model onto it. Weights may be bfloat16; they are read as
    float32.
    """

    wq_DNH: Float[Array, "D N H"]
    wk_DKH: Float[Array, "D K H"]
    wv_DKH: Float[Array, "D K H"]
    wo_NHD: Float[Array, "N H D"]
    w_up_DF: Float[Array, "D F"]
    w_down_FD: Float[Array, "F D"]
    inv_freq: Float[Array, "P"]  # rotary, first 2P dimensions, half-split; empty: none
    window: Int[Array, ""]  # a query at t sees keys s > t - window; NO_WINDOW: all keys s <= t
    w_gate_DF: Float[Array, "D F"] | None = None  # None: an ungated MLP, act(x @ w_up) @ w_down
    norm_attn: Norm | None = None  # before attention; None: no norm
    norm_mlp: Norm | None = None  # before the MLP
    norm_attn_post: Norm | None = (
        None  # on the attention output, before it joins the residual stream
    )
    norm_mlp_post: Norm | None = None  # on the MLP output
    # QK-norm, before rotary: gain of an RMSNorm of each head, or of all heads together (OLMo 2)
    norm_q: Float[Array, "H"] | Float[Array, "N H"] | None = None
    norm_k: Float[Array, "H"] | Float[Array, "K H"] | None = None
    bq_NH: Float[Array, "N H"] | None = None
    bk_KH: Float[Array, "K H"] | None = None
    bv_KH: Float[Array, "K H"] | None = None
    bo_D: Float[Array, "D"] | None = None
    b_up_F: Float[Array, "F"] | None = None
    b_gate_F: Float[Array, "F"] | None = None
    b_down_D: Float[Array, "D"] | None = None


@struct.dataclass
class Params:
    """A whole model. `blocks` is stacked on a leading axis L."""

    embed_VD: Float[Array, "V D"]  # times embed_scale on the way in; as it is on the way out
    blocks: BlockWeights
    norm_final: Norm | None = None
    unembed_DV: Float[Array, "D V"] | None = None  # None: tied to the embedding
    unembed_bias_V: Float[Array, "V"] | None = None
    position_PD: Float[Array, "P D"] | None = None  # learned position embedding
    embed_scale: Float[Array, ""] | None = None  # None: 1


@struct.dataclass
class Activations:
    """What a block computed on the way: the scales and pre-activations that freezing it needs."""

    scale_attn_T: Float[Array, "T"]
    scale_q_TN: Float[Array, "T N"]
    scale_k_SK: Float[Array, "S K"]
    q_TNH: Float[Array, "T N H"]
    k_SKH: Float[Array, "S K H"]
    scores_NTS: Float[Array, "N T S"]
    pattern_NTS: Float[Array, "N T S"]
    scale_attn_post_T: Float[Array, "T"]
    scale_mlp_T: Float[Array, "T"]
    gate_TF: Float[Array, "T F"] | None
    up_TF: Float[Array, "T F"]
    scale_mlp_post_T: Float[Array, "T"]


@struct.dataclass
class Trace:
    """What one forward pass computed; a field is None when it was not asked for.

    boundaries: `[L+1, T, D]` residual stream at every boundary (the last one before the final
    norm).
    scores: `[L, N, T, S]` attention scores after the scale, before softcap and mask.
    patterns: `[L, N, T, S]` attention probabilities.
    """

    boundaries: Float[Array, "L+1 T D"] | None = None
    scores: Float[Array, "L N T S"] | None = None
    patterns: Float[Array, "L N T S"] | None = None
