"""A block made linear: patterns, norm scales and MLP frozen at the prompt.

For a covector g at boundary b+1, position t, and a vector x_c at boundary b, position s
(DESIGN: edges):

    residual   [s = t]   g . x_c
    mlp        [s = t]   g~ . x_c            g~ = J_mlp[t]^T g
    head n               A_n[t,s] (g + g~) . O_n V_n N'(x_c)

`push` carries vectors forward, `pull` carries covectors that read one position back, `pull_stream`
those that read every position (it is the transpose of `push`), `constant` is what the block adds
that depends on no source, and `head_loadings` gives one number a head. The identity that ties them
to the model:

    push(x_b) + constant = x_{b+1}   exactly, to float32 rounding, for all three MLP linearisations.

Exact given the frozen patterns and scales. In a parallel block the MLP reads boundary b itself, so
the heads carry g alone. This module is the only place where frozen attention is computed.
Axes: R covectors (rows), T/S positions, D d_model, N heads, K key/value heads, G = N/K, H head_dim,
F hidden.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from qkattr.config import BlockConfig
from qkattr.model.attention import attend
from qkattr.model.layers import f32, lifted, norm_bias, norm_direction, norm_linear, norm_transpose
from qkattr.model.mlp import MLPSlopes, slopes
from qkattr.model.transformer import block
from qkattr.shapes import checked
from qkattr.types import Activations, BlockWeights


@struct.dataclass
class FrozenBlock:
    """A block at a prompt: its weights, and everything non-linear measured once.

    weights: the block's.
    seen: what it computed at the prompt.
    mlp: its hidden layer, made linear.
    cfg: its configuration (static).
    precision: of every matmul with it (static).
    """

    weights: BlockWeights
    seen: Activations
    mlp: MLPSlopes
    cfg: BlockConfig = struct.field(pytree_node=False, kw_only=True)
    precision: str = struct.field(pytree_node=False, kw_only=True)


@struct.dataclass
class Pulled:
    """Covectors carried back through a frozen block.

    position: `[R]` where each row reads the block's output.
    residual, mlp: `[R, D]` covectors on boundary b at the same position.
    heads: `[R, N, H]` covectors on each head's values, to be weighted by its pattern.
    constant: `[R]` the row's edge from `const`.
    """

    position: Int[Array, "R"]
    residual: Float[Array, "R D"]
    mlp: Float[Array, "R D"]
    heads: Float[Array, "R N H"]
    constant: Float[Array, "R"]


@struct.dataclass
class PulledStream:
    """Covectors on all positions of boundary b+1, carried back through a frozen block.

    below: `[R, T, D]` covectors on boundary b.
    heads: `[R, T, N, H]` covectors on each head's output at query t, before its pattern.
    constant: `[R, T]` what the block's constants give at t.
    """

    below: Float[Array, "R T D"]
    heads: Float[Array, "R T N H"]
    constant: Float[Array, "R T"]


@checked
def freeze(
    weights: BlockWeights,
    x: Float[Array, "T D"],
    *,
    cfg: BlockConfig,
    linearisation: str = "jacobian",
    precision: str = "highest",
) -> FrozenBlock:
    """Run the block on the residual stream it read, and keep what makes it linear there."""
    with jax.named_scope("freeze"):
        _, seen = block(weights, x, cfg=cfg, precision=precision)
        mlp = slopes(weights, seen.gate_TF, seen.up_TF, cfg=cfg, linearisation=linearisation)
    return FrozenBlock(weights=weights, seen=seen, mlp=mlp, cfg=cfg, precision=precision)


@checked
def push(frozen: FrozenBlock, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """Vectors at every position of boundary b, carried to boundary b+1. Linear;
    `constant` is left out.
    """
    w, seen, cfg = frozen.weights, frozen.seen, frozen.cfg
    y = norm_linear(w.norm_attn, x, seen.scale_attn_T, cfg=cfg)
    attn = _attn_out(frozen, _einsum(frozen, "SD,DKH->SKH", y, w.wv_DKH))
    read = x if cfg.parallel else x + attn
    return x + attn + _mlp_push(frozen, read)


@checked
def constant(frozen: FrozenBlock) -> Float[Array, "T D"]:
    """What the block adds that no source carries: value and output biases, norm biases,
    the MLP's rest.
    """
    attn, mlp = _attn_constant(frozen), _mlp_constant(frozen)
    return attn + mlp if frozen.cfg.parallel else attn + mlp + _mlp_push(frozen, attn)


@checked
def pull(frozen: FrozenBlock, g: Float[Array, "R D"], position: Int[Array, "R"]) -> Pulled:
    """Covectors at boundary b+1, row r at `position[r]`, carried back to boundary b."""
    w, seen, cfg = frozen.weights, frozen.seen, frozen.cfg
    with jax.named_scope("pull_mlp"):
        z = _einsum(frozen, "RD,FD->RF", _post_mlp_transpose(frozen, g, position), w.w_down_FD)
        mlp = _einsum(frozen, "RF,DF->RD", z * frozen.mlp.slope_up[position], w.w_up_DF)
        for slope_gate, w_gate_DF in _gate(frozen):
            mlp += _einsum(frozen, "RF,DF->RD", z * slope_gate[position], w_gate_DF)
        mlp = norm_transpose(w.norm_mlp, mlp, cfg=cfg) * seen.scale_mlp_T[position][:, None]
    with jax.named_scope("pull_heads"):
        carried = g if cfg.parallel else g + mlp
        scaled = carried * seen.scale_attn_post_T[position][:, None]
        out = norm_transpose(w.norm_attn_post, scaled, cfg=cfg)
        heads = _einsum(frozen, "RD,NHD->RNH", out, w.wo_NHD)
    const = jnp.einsum("RD,RD->R", carried, _attn_constant(frozen)[position], precision="highest")
    const += jnp.einsum("RD,RD->R", g, _mlp_bias(frozen)[position], precision="highest")
    const += jnp.einsum("RF,RF->R", z, _hidden_constant(frozen)[position], precision="highest")
    return Pulled(position=position, residual=g, mlp=mlp, heads=heads, constant=const)


@checked
def pull_stream(frozen: FrozenBlock, g: Float[Array, "R T D"]) -> PulledStream:
    """Covectors at every position of boundary b+1, carried back to every position of b."""
    w, seen = frozen.weights, frozen.seen
    R, T, D = g.shape
    pulled = jax.vmap(lambda one: pull(frozen, one, jnp.arange(T)))(g)
    with jax.named_scope("pull_patterns"):
        N, K = w.wo_NHD.shape[0], w.wv_DKH.shape[1]
        pattern = seen.pattern_NTS.reshape(K, N // K, T, T)
        heads = pulled.heads.reshape(R, T, K, N // K, -1)
        on_values = _einsum(frozen, "RTKGH,KGTS->RSKH", heads, pattern)
        on_normed = _einsum(frozen, "RSKH,DKH->RSD", on_values, w.wv_DKH)
        through = norm_transpose(w.norm_attn, on_normed, cfg=frozen.cfg)
        below = pulled.residual + pulled.mlp + through * seen.scale_attn_T[None, :, None]
    return PulledStream(below=below, heads=pulled.heads, constant=pulled.constant)


@checked
def head_reads(
    frozen: FrozenBlock, heads: Float[Array, "R Q N H"], x: Float[Array, "S D"]
) -> Float[Array, "R N Q S"]:
    """What covectors on the heads' outputs at Q positions read from each source through its value
    alone: `g[t] . O_n V_n N'(x_s)`, without the pattern.
    """
    R, T, N, H = heads.shape
    v_SKH = values(frozen, x) * frozen.seen.scale_attn_T[:, None, None]
    K = v_SKH.shape[1]
    grouped = jnp.transpose(heads.reshape(R, T, K, N // K, H), (2, 0, 3, 1, 4))
    # With both sides laid out for it, XLA's CPU backend takes a fifth of the time of
    # "RTKGH,SKH->RKGTS".
    reads = _einsum(frozen, "KRGTH,KHS->KRGTS", grouped, jnp.transpose(v_SKH, (1, 2, 0)))
    return jnp.moveaxis(reads, 0, 1).reshape(R, N, T, -1)


@checked
def values(frozen: FrozenBlock, directions: Float[Array, "... D"]) -> Float[Array, "... K H"]:
    """Directions projected to head values, before the norm's scale at their
    position (a factor to apply).
    """
    y = norm_direction(frozen.weights.norm_attn, directions, cfg=frozen.cfg)
    return _einsum(frozen, "...D,DKH->...KH", y, frozen.weights.wv_DKH)


@checked
def head_loadings(
    frozen: FrozenBlock,
    pulled: Pulled,
    v_QKH: Float[Array, "Q K H"],
    source: Int[Array, "Q"],
    chosen: Int[Array, "R E"],
) -> Float[Array, "R E N"]:
    """One number a head for E of Q sources, for every row: `A_n[t,s] (g + g~) . O_n v`.

    Args:
      v_QKH: the sources' values (`values`, times the norm's scale at their position).
      source: their positions.
      chosen: which E of them each row asks for.
    """
    R, N, H = pulled.heads.shape
    K = v_QKH.shape[1]
    covectors = pulled.heads.reshape(R, K, N // K, H)
    # One matmul a head over all Q, then a gather: cheaper than gathering values for every row.
    read = jnp.einsum("RKGH,QKH->KGRQ", covectors, v_QKH, precision=frozen.precision)
    read = jnp.take_along_axis(read.reshape(N, R, -1), chosen[None], axis=2)
    weight = frozen.seen.pattern_NTS[:, pulled.position[:, None], source[chosen]]
    return jnp.moveaxis(read * weight, 0, -1)


def _einsum(frozen: FrozenBlock, spec: str, x: Array, w: Array) -> Array:
    return jnp.einsum(spec, x, f32(w), precision=frozen.precision)


def _gate(frozen: FrozenBlock) -> list[tuple[Array, Array]]:
    """The gate's slope and weights; none where the hidden layer does not depend on the gate."""
    slope_gate, w_gate_DF = frozen.mlp.slope_gate, frozen.weights.w_gate_DF
    return [] if slope_gate is None or w_gate_DF is None else [(slope_gate, w_gate_DF)]


def _attn_out(frozen: FrozenBlock, v_SKH: Array) -> Array:
    heads = attend(frozen.seen.pattern_NTS, v_SKH, precision=frozen.precision)
    return _post_attn(frozen, _einsum(frozen, "TNH,NHD->TD", heads, frozen.weights.wo_NHD))


def _post_attn(frozen: FrozenBlock, out: Array) -> Array:
    scale = frozen.seen.scale_attn_post_T
    return norm_linear(frozen.weights.norm_attn_post, out, scale, cfg=frozen.cfg)


def _post_mlp(frozen: FrozenBlock, out: Array) -> Array:
    scale = frozen.seen.scale_mlp_post_T
    return norm_linear(frozen.weights.norm_mlp_post, out, scale, cfg=frozen.cfg)


def _post_mlp_transpose(frozen: FrozenBlock, g: Array, position: Array) -> Array:
    scaled = g * frozen.seen.scale_mlp_post_T[position][:, None]
    return norm_transpose(frozen.weights.norm_mlp_post, scaled, cfg=frozen.cfg)


def _mlp_push(frozen: FrozenBlock, x: Array) -> Array:
    w = frozen.weights
    y = norm_linear(w.norm_mlp, x, frozen.seen.scale_mlp_T, cfg=frozen.cfg)
    z = frozen.mlp.slope_up * _einsum(frozen, "TD,DF->TF", y, w.w_up_DF)
    for slope_gate, w_gate_DF in _gate(frozen):
        z += slope_gate * _einsum(frozen, "TD,DF->TF", y, w_gate_DF)
    return _post_mlp(frozen, _einsum(frozen, "TF,FD->TD", z, w.w_down_FD))


def _attn_constant(frozen: FrozenBlock) -> Float[Array, "T D"]:
    """Attention's output for a zero residual stream: the biases through V, O and the post-norm."""
    w, seen = frozen.weights, frozen.seen
    out = jnp.zeros((seen.scale_attn_T.shape[0], w.wo_NHD.shape[-1]))
    if w.norm_attn is not None and w.norm_attn.bias is not None:
        beta = _einsum(frozen, "D,DKH->KH", f32(w.norm_attn.bias), w.wv_DKH)
        shared = _per_query_head(frozen, beta)
        out += _einsum(frozen, "KGH,KGHD->D", shared, _grouped(frozen))[None]
    if w.bv_KH is not None:
        bias = _per_query_head(frozen, f32(w.bv_KH))
        out += _einsum(frozen, "KGH,KGHD->D", bias, _grouped(frozen))[None]
    if w.bo_D is not None:
        out += f32(w.bo_D)[None]
    return _post_attn(frozen, out) + lifted(norm_bias(w.norm_attn_post), out)


def _grouped(frozen: FrozenBlock) -> Array:
    wo, K = frozen.weights.wo_NHD, frozen.weights.wk_DKH.shape[1]
    return wo.reshape(K, wo.shape[0] // K, *wo.shape[1:])


def _per_query_head(frozen: FrozenBlock, v_KH: Array) -> Array:
    """A constant value of every key/value head as each query head sees it:
    patterns sum to 1 over keys.
    """
    K, G = v_KH.shape[0], frozen.weights.wo_NHD.shape[0] // v_KH.shape[0]
    return jnp.broadcast_to(v_KH[:, None], (K, G, v_KH.shape[1]))


def _hidden_constant(frozen: FrozenBlock) -> Float[Array, "T F"]:
    """The hidden layer's constant part: the linearisation's rest,
    and the norm's bias through gate and up.
    """
    w, mlp = frozen.weights, frozen.mlp
    rest = mlp.rest
    if w.norm_mlp is not None and w.norm_mlp.bias is not None:
        beta = f32(w.norm_mlp.bias)
        rest += mlp.slope_up * _einsum(frozen, "D,DF->F", beta, w.w_up_DF)[None]
        for slope_gate, w_gate_DF in _gate(frozen):
            rest += slope_gate * _einsum(frozen, "D,DF->F", beta, w_gate_DF)[None]
    return rest


def _mlp_bias(frozen: FrozenBlock) -> Float[Array, "T D"]:
    """The output bias through the post-norm, and the post-norm's own."""
    w = frozen.weights
    bias = jnp.zeros(w.w_down_FD.shape[-1]) if w.b_down_D is None else f32(w.b_down_D)
    out = jnp.broadcast_to(bias, (frozen.seen.scale_mlp_T.shape[0], bias.shape[0]))
    return _post_mlp(frozen, out) + lifted(norm_bias(w.norm_mlp_post), out)


def _mlp_constant(frozen: FrozenBlock) -> Float[Array, "T D"]:
    hidden = _einsum(frozen, "TF,FD->TD", _hidden_constant(frozen), frozen.weights.w_down_FD)
    return _post_mlp(frozen, hidden) + _mlp_bias(frozen)
