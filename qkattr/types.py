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

from typing import Annotated

from flax import struct
from jaxtyping import Array, Float, Int

from qkattr.kinds import FOLDED_KINDS as FOLDED_KINDS
from qkattr.kinds import NO_WINDOW as NO_WINDOW
from qkattr.kinds import PROMPT_KINDS as PROMPT_KINDS
from qkattr.kinds import Kind as Kind


@struct.dataclass
class Norm:
    """An RMSNorm (no bias) or LayerNorm (bias).

    weight: `[D]` the gain as it multiplies: Gemma's 1 + w is stored as 1 + w.
    bias: `[D]` what LayerNorm adds after it.
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

    wq_DNH, wk_DKH, wv_DKH: what reads queries, keys and values off the normed residual stream.
    wo_NHD: what the heads' outputs write.
    w_gate_DF, w_up_DF, w_down_FD: the MLP; without a gate it is `act(x @ w_up) @ w_down`.
    inv_freq: rotary frequencies, radians per position; the first 2 * len dimensions of a head turn,
      dimension i with i + len; empty: no rotary.
    window: a query at t sees keys s > t - window; NO_WINDOW: all keys s <= t.
    norm_attn, norm_mlp: norms before attention and before the MLP.
    norm_attn_post, norm_mlp_post: norms of what they write, before it joins the stream.
    norm_q, norm_k: QK-norm, before rotary: the gain of an RMSNorm of each head `[H]`, or of all
      heads together `[N, H]`, `[K, H]` (OLMo 2).
    bq_NH, bk_KH, bv_KH, bo_D: attention's biases.
    b_gate_F, b_up_F, b_down_D: the MLP's biases.
    """

    wq_DNH: Float[Array, "D N H"]
    wk_DKH: Float[Array, "D K H"]
    wv_DKH: Float[Array, "D K H"]
    wo_NHD: Float[Array, "N H D"]
    w_up_DF: Float[Array, "D F"]
    w_down_FD: Float[Array, "F D"]
    inv_freq: Float[Array, "pairs"]
    window: Int[Array, ""]
    w_gate_DF: Float[Array, "D F"] | None = None
    norm_attn: Norm | None = None
    norm_mlp: Norm | None = None
    norm_attn_post: Norm | None = None
    norm_mlp_post: Norm | None = None
    norm_q: Float[Array, "H"] | Float[Array, "N H"] | None = None
    norm_k: Float[Array, "H"] | Float[Array, "K H"] | None = None
    bq_NH: Float[Array, "N H"] | None = None
    bk_KH: Float[Array, "K H"] | None = None
    bv_KH: Float[Array, "K H"] | None = None
    bo_D: Float[Array, "D"] | None = None
    b_up_F: Float[Array, "F"] | None = None
    b_gate_F: Float[Array, "F"] | None = None
    b_down_D: Float[Array, "D"] | None = None

    @property
    def group(self) -> int:
        """G: query head n reads key/value head n // G."""
        return self.wq_DNH.shape[-2] // self.wk_DKH.shape[-2]


#: All blocks of a model, stacked on a leading axis L.
BlockStack = Annotated[BlockWeights, "L"]


@struct.dataclass
class Params:
    """A whole model.

    embed_VD: `[V, D]` times `embed_scale` on the way in; as it is on the way out.
    blocks: all blocks, stacked on a leading axis L.
    norm_final: the norm before the unembedding.
    unembed_DV: `[D, V]`; None: tied to the embedding.
    unembed_bias_V: `[V]` what is added to the logits.
    position_PD: `[P, D]` a learned position embedding.
    embed_scale: what token embeddings are multiplied by; None: 1.
    """

    embed_VD: Float[Array, "V D"]
    blocks: BlockStack
    norm_final: Norm | None = None
    unembed_DV: Float[Array, "D V"] | None = None
    unembed_bias_V: Float[Array, "V"] | None = None
    position_PD: Float[Array, "context D"] | None = None
    embed_scale: Float[Array, ""] | None = None


@struct.dataclass
class Activations:
    """What a block computed on the way: the scales and pre-activations that freezing it needs.

    scale_attn_T, scale_mlp_T: the norms' scales (1 / rms or 1 / std) before attention and MLP.
    scale_q_TN, scale_k_SK: the QK-norm's scales; 1 where there is none.
    q_TNH, k_SKH: queries and keys after QK-norm and rotary.
    scores_NTS: attention scores after the scale, before softcap and mask.
    pattern_NTS: attention probabilities.
    scale_attn_post_T, scale_mlp_post_T: the scales of the norms behind attention and MLP.
    gate_TF, up_TF: pre-activations of the MLP; no gate: None.
    """

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

    boundaries: `[L+1, T, D]` residual stream at every boundary, the last before the final norm.
    scores: `[L, N, T, S]` attention scores after the scale, before softcap and mask.
    patterns: `[L, N, T, S]` attention probabilities.
    """

    boundaries: Float[Array, "L+1 T D"] | None = None
    scores: Float[Array, "L N T S"] | None = None
    patterns: Float[Array, "L N T S"] | None = None
