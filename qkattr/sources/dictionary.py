"""A sparse dictionary (SAE) over one boundary: activations of features,
and the directions they write.

    y = (x - mean) * gain                          per-token input normalisation, if the SAE has one
    a = act((y - b_dec) @ W_enc + b_enc)           relu, jumprelu or topk
    x^ = sum_f (a_f / gain) * W_dec[f]  +  (b_dec / gain + mean)

so that a feature's component in residual units is `coefficient * W_dec[f]` with
`coefficient = a_f / gain`, and the reconstruction's constant part is `bias`.
Axes: T position, D d_model, M dictionary width, A slots.
Exact: every line above. A feature beyond the A largest of its position is left to the caller's
error slot.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from qkattr.model.layers import f32
from qkattr.sharding import on_any_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """How a dictionary encodes.

    activation: "relu", "jumprelu" or "topk" (the k largest, then relu). subtract_b_dec: encode
    x - b_dec.
    normalize: "none", "constant_norm_rescale" or "layer_norm", per token. rescale_by_decoder_norm:
    features compete by activation times decoder norm. prepend_bos: whether it was trained on text
    with a BOS (None: not said).
    """

    activation: str
    k: int | None = None
    subtract_b_dec: bool = True
    normalize: str = "none"
    rescale_by_decoder_norm: bool = False
    prepend_bos: bool | None = None


@struct.dataclass
class Dictionary:
    """One SAE. Arrays may be memory-mapped NumPy arrays of any float type;
    they are read as float32.
    """

    w_enc_DM: Float[Array, "D M"]
    w_dec_MD: Float[Array, "M D"]
    b_enc_M: Float[Array, "M"]
    b_dec_D: Float[Array, "D"]
    threshold_M: Float[Array, "M"] | None = None
    config: DictionaryConfig = struct.field(pytree_node=False, kw_only=True)

    @property
    def width(self) -> int:
        return self.w_dec_MD.shape[0]


@struct.dataclass
class Encoding:
    """The features active at each position, the largest first.

    index: `[T, A]` feature, activation: `[T, A]` in the SAE's own units (0 in unused slots),
    coefficient: `[T, A]` what multiplies the decoder row in residual units, bias: `[T, D]` the
    constant part of the reconstruction, left_out: `[T]` the share of the activation that found no
    slot.
    """

    index: Int[Array, "T A"]
    activation: Float[Array, "T A"]
    coefficient: Float[Array, "T A"]
    bias: Float[Array, "T D"]
    left_out: Float[Array, "T"]


def _normalisation(dictionary: Dictionary, x: Float[Array, "T D"]) -> tuple[Array, Array]:
    """`(gain [T], mean [T])` of the per-token input normalisation (1 and 0 without one)."""
    kind, d = dictionary.config.normalize, x.shape[-1]
    if kind == "constant_norm_rescale":
        return jnp.sqrt(d) / jnp.linalg.norm(x, axis=-1), jnp.zeros(x.shape[:-1])
    if kind == "layer_norm":
        mean = x.mean(-1)
        return 1 / (x.std(-1, ddof=1) + 1e-5), mean  # SAELens uses torch.std: Bessel's correction
    return jnp.ones(x.shape[:-1]), jnp.zeros(x.shape[:-1])


def activations(
    dictionary: Dictionary, x: Float[Array, "T D"], *, precision: str = "highest"
) -> Float[Array, "T M"]:
    """Every feature's activation at every position, in the SAE's own units; 0 where inactive."""
    if dictionary.config.activation == "topk":
        value, index = _k_largest(dictionary, x, precision)
        rows = jnp.arange(x.shape[0])[:, None]
        return jnp.zeros((x.shape[0], dictionary.width)).at[rows, index].set(value)
    pre = _pre_activations(dictionary, x, precision)
    if dictionary.config.activation == "jumprelu":
        return jnp.where(pre > f32(dictionary.threshold_M), jax.nn.relu(pre), 0.0)
    return jax.nn.relu(pre)


def _pre_activations(dictionary: Dictionary, x: Array, precision: str) -> Float[Array, "T M"]:
    gain, mean = _normalisation(dictionary, x)
    y = (x - mean[:, None]) * gain[:, None]
    if dictionary.config.subtract_b_dec:
        y = y - f32(dictionary.b_dec_D)
    pre = jnp.einsum("TD,DM->TM", y, f32(dictionary.w_enc_DM), precision=precision)
    return pre + f32(dictionary.b_enc_M)


def _k_largest(dictionary: Dictionary, x: Array, precision: str) -> tuple[Array, Array]:
    """The k activations of a topk dictionary at every position, and their features."""
    pre = _pre_activations(dictionary, x, precision)
    if not dictionary.config.rescale_by_decoder_norm:
        value, index = jax.lax.top_k(pre, dictionary.config.k)
        return jax.nn.relu(value), index
    norm = jnp.linalg.norm(f32(dictionary.w_dec_MD), axis=-1)
    value, index = jax.lax.top_k(pre * norm, dictionary.config.k)
    return jax.nn.relu(value) / norm[index], index


@partial(jax.jit, static_argnames=("slots", "precision"))
@on_any_mesh
def encode(
    dictionary: Dictionary, x: Float[Array, "T D"], *, slots: int, precision: str = "highest"
) -> Encoding:
    """The `slots` largest activations of each position (all of them if `slots` is at least L0)."""
    gain, mean = _normalisation(dictionary, x)
    if dictionary.config.activation == "topk":
        every, features = _k_largest(dictionary, x, precision)
    else:
        every, features = activations(dictionary, x, precision=precision), None
    activation, at = jax.lax.top_k(every, min(slots, every.shape[1]))
    index = at if features is None else jnp.take_along_axis(features, at, axis=1)
    left_out = 1 - activation.sum(-1) / jnp.maximum(every.sum(-1), 1e-30)
    bias = f32(dictionary.b_dec_D) / gain[:, None] + mean[:, None]
    return Encoding(
        index=index,
        activation=activation,
        coefficient=activation / gain[:, None],
        bias=bias,
        left_out=jnp.where(left_out > 1e-6, left_out, 0.0),  # below it is rounding
    )


@partial(jax.jit, static_argnames=("precision",))
@on_any_mesh
def count_active(
    dictionary: Dictionary, x: Float[Array, "T D"], *, precision: str = "highest"
) -> Int[Array, "T"]:
    """How many features are active at each position."""
    return (activations(dictionary, x, precision=precision) > 0).sum(-1)


def reconstruct(
    dictionary: Dictionary, x: Float[Array, "T D"], *, precision: str = "highest"
) -> tuple[Float[Array, "T M"], Float[Array, "T D"]]:
    """Every activation, and the reconstruction of x in residual units."""
    gain, mean = _normalisation(dictionary, x)
    a = activations(dictionary, x, precision=precision)
    y = jnp.einsum("TM,MD->TD", a, f32(dictionary.w_dec_MD), precision=precision)
    return a, (y + f32(dictionary.b_dec_D)) / gain[:, None] + mean[:, None]
