"""A sparse dictionary (SAE) over one boundary: activations of features,
and the directions they write.

    y = (x - mean) * gain                          input normalisation, if the SAE has one
    p = (y - b_dec) @ W_enc + b_enc
    a = act(p)                                     relu, jumprelu, topk or gated
    x^ = sum_f (a_f * scale) * W_dec[f]  +  (b_dec * scale + mean)

so that a feature's component in residual units is `coefficient * W_dec[f]` with
`coefficient = a_f * scale`, and the reconstruction's constant part is `bias`. `scale` is 1 / gain,
but for layer_norm, whose epsilon is in the gain alone. A gated SAE has
a = relu((y - b_dec) @ W_enc * exp(r_mag) + b_enc) where (y - b_dec) @ W_enc + b_gate > 0.
Axes: T position, D d_model, M dictionary width, A slots.
Exact: every line above. A feature beyond the A largest of its position is left to the caller's
error slot.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from qkattr.errors import InputError
from qkattr.model.layers import f32
from qkattr.shapes import checked
from qkattr.sharding import on_any_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """How a dictionary encodes.

    activation: "relu", "jumprelu", "topk" (the k largest, then relu) or "gated".
    k: of topk.
    subtract_b_dec: encode x - b_dec.
    normalize: "none", "constant_norm_rescale" or "layer_norm", per token.
    centre: the input's mean over D is removed first and put back at the end, for SAEs of a model
      whose writing weights were centred.
    rescale_by_decoder_norm: topk features compete by, and jumprelu thresholds apply to,
      pre-activation times decoder norm; activations stay what multiplies the decoder row.
    prepend_bos: whether it was trained on text with a BOS (None: not said).
    """

    activation: str
    k: int | None = None
    subtract_b_dec: bool = True
    normalize: str = "none"
    centre: bool = False
    rescale_by_decoder_norm: bool = False
    prepend_bos: bool | None = None


@struct.dataclass
class Dictionary:
    """One SAE. Arrays may be memory-mapped NumPy arrays of any float type;
    they are read as float32.

    `factor` and `l0` are arrays, not settings, so that boundaries that differ in them share
    compiled code.

    w_enc_DM: `[D, M]` what each feature reads.
    w_dec_MD: `[M, D]` what each feature writes.
    b_enc_M: `[M]` added to what is read; of gated, the magnitudes' bias.
    b_dec_D: `[D]` the constant part of the reconstruction.
    threshold_M: `[M]` of jumprelu.
    b_gate_M, r_mag_M: `[M]` of gated.
    factor: what the input is multiplied by, the same for all tokens (None: 1).
    l0: features active at a position as its makers say (None: not said).
    config: how it encodes (static).
    """

    w_enc_DM: Float[Array | np.ndarray, "D M"]
    w_dec_MD: Float[Array | np.ndarray, "M D"]
    b_enc_M: Float[Array | np.ndarray, "M"]
    b_dec_D: Float[Array | np.ndarray, "D"]
    threshold_M: Float[Array | np.ndarray, "M"] | None = None
    b_gate_M: Float[Array | np.ndarray, "M"] | None = None
    r_mag_M: Float[Array | np.ndarray, "M"] | None = None
    factor: Float[Array | np.ndarray, ""] | None = None
    l0: Float[Array | np.ndarray, ""] | None = None
    config: DictionaryConfig = struct.field(pytree_node=False, kw_only=True)

    @property
    def width(self) -> int:
        return self.w_dec_MD.shape[0]

    def part(self, name: str) -> Float[Array, "M"]:
        """An array that dictionaries of its kind have, in float32.

        Raises:
          InputError: it is not there.
        """
        array = getattr(self, name)
        if array is None:
            raise InputError(f"a dictionary of activation {self.config.activation!r} needs {name}")
        return f32(array)


@struct.dataclass
class Encoding:
    """The features active at each position, the largest first.

    index: `[T, A]` feature.
    activation: `[T, A]` in the SAE's own units; 0 in unused slots.
    coefficient: `[T, A]` what multiplies the decoder row in residual units.
    bias: `[T, D]` the constant part of the reconstruction.
    left_out: `[T]` the share of the activation that found no slot.
    """

    index: Int[Array | np.ndarray, "T A"]
    activation: Float[Array | np.ndarray, "T A"]
    coefficient: Float[Array | np.ndarray, "T A"]
    bias: Float[Array | np.ndarray, "T D"]
    left_out: Float[Array | np.ndarray, "T"]


def _normalise(dictionary: Dictionary, x: Float[Array, "T D"]) -> tuple[Array, Array, Array]:
    """`(y [T, D], scale [T], mean [T])`: the input as it is encoded; x^ = y^ * scale + mean."""
    kind, ones = dictionary.config.normalize, jnp.ones(x.shape[:-1])
    centred = dictionary.config.centre or kind == "layer_norm"
    mean = x.mean(-1) if centred else 0 * ones
    x = x - mean[:, None]
    gain = ones if dictionary.factor is None else f32(dictionary.factor) * ones
    scale = 1 / gain
    if kind == "constant_norm_rescale":
        scale = jnp.linalg.norm(x, axis=-1) / jnp.sqrt(x.shape[-1])
        gain = 1 / scale
    elif kind == "layer_norm":
        scale = x.std(-1, ddof=1)  # SAELens uses torch.std: Bessel's correction
        gain = 1 / (scale + 1e-5)
    return x * gain[:, None], scale, mean


@checked
def activations(
    dictionary: Dictionary, x: Float[Array, "T D"], *, precision: str = "highest"
) -> Float[Array, "T M"]:
    """Every feature's activation at every position, in the SAE's own units; 0 where inactive."""
    y, _, _ = _normalise(dictionary, x)
    if dictionary.config.activation == "topk":
        value, index = _k_largest(dictionary, y, precision)
        rows = jnp.arange(x.shape[0])[:, None]
        return jnp.zeros((x.shape[0], dictionary.width)).at[rows, index].set(value)
    read = _read(dictionary, y, precision)
    if dictionary.config.activation == "gated":
        size = jax.nn.relu(
            read * jnp.exp(dictionary.part("r_mag_M"))[None] + f32(dictionary.b_enc_M)[None]
        )
        return jnp.where(read + dictionary.part("b_gate_M")[None] > 0, size, 0.0)
    pre = read + f32(dictionary.b_enc_M)[None]
    if dictionary.config.activation == "jumprelu":
        jumps = _competing(dictionary, pre) > dictionary.part("threshold_M")[None]
        return jnp.where(jumps, jax.nn.relu(pre), 0.0)
    return jax.nn.relu(pre)


def _read(dictionary: Dictionary, y: Array, precision: str) -> Float[Array, "T M"]:
    """What the encoder's directions read of the normalised input, without their biases."""
    if dictionary.config.subtract_b_dec:
        y = y - f32(dictionary.b_dec_D)[None]
    return jnp.einsum("TD,DM->TM", y, f32(dictionary.w_enc_DM), precision=precision)


def _competing(dictionary: Dictionary, pre: Array) -> Float[Array, "T M"]:
    """What thresholds and the choice of the k largest look at."""
    if not dictionary.config.rescale_by_decoder_norm:
        return pre
    return pre * jnp.linalg.norm(f32(dictionary.w_dec_MD), axis=-1)[None]


def _k_largest(dictionary: Dictionary, y: Array, precision: str) -> tuple[Array, Array]:
    """The k activations of a topk dictionary at every position, and their features."""
    pre = _read(dictionary, y, precision) + f32(dictionary.b_enc_M)[None]
    if dictionary.config.k is None:
        raise InputError("a dictionary of activation 'topk' needs k; give DictionaryConfig(k=...)")
    _, index = jax.lax.top_k(_competing(dictionary, pre), dictionary.config.k)
    return jax.nn.relu(jnp.take_along_axis(pre, index, axis=1)), index


def encoder_rows(dictionary: Dictionary, features: np.ndarray) -> np.ndarray:
    """`[R, D]`, on the host: the directions that R features read of the input, which is normalised
    but for its mean."""
    rows = np.asarray(dictionary.w_enc_DM[:, features].T, np.float32)
    if dictionary.config.activation == "gated":
        rows = rows * np.exp(np.asarray(dictionary.r_mag_M, np.float32)[features])[:, None]
    if dictionary.config.centre or dictionary.config.normalize == "layer_norm":
        rows = rows - rows.mean(-1, keepdims=True)  # the mean is removed before: not read at all
    return rows


@partial(jax.jit, static_argnames=("slots", "precision"))
@on_any_mesh
@checked
def encode(
    dictionary: Dictionary, x: Float[Array, "T D"], *, slots: int, precision: str = "highest"
) -> Encoding:
    """The `slots` largest activations of each position (all of them if `slots` is at least L0)."""
    y, scale, mean = _normalise(dictionary, x)
    if dictionary.config.activation == "topk":
        every, features = _k_largest(dictionary, y, precision)
    else:
        every, features = activations(dictionary, x, precision=precision), None
    activation, at = jax.lax.top_k(every, min(slots, every.shape[1]))
    index = at if features is None else jnp.take_along_axis(features, at, axis=1)
    left_out = 1 - activation.sum(-1) / jnp.maximum(every.sum(-1), 1e-30)
    bias = f32(dictionary.b_dec_D)[None] * scale[:, None] + mean[:, None]
    return Encoding(
        index=index,
        activation=activation,
        coefficient=activation * scale[:, None],
        bias=bias,
        left_out=jnp.where(left_out > 1e-6, left_out, 0.0),  # below it is rounding
    )


@checked
def reconstruct(
    dictionary: Dictionary, x: Float[Array, "T D"], *, precision: str = "highest"
) -> tuple[Float[Array, "T M"], Float[Array, "T D"]]:
    """Every activation, and the reconstruction of x in residual units."""
    _, scale, mean = _normalise(dictionary, x)
    a = activations(dictionary, x, precision=precision)
    y = jnp.einsum("TM,MD->TD", a, f32(dictionary.w_dec_MD), precision=precision)
    return a, (y + f32(dictionary.b_dec_D)[None]) * scale[:, None] + mean[:, None]
