"""The MLP, and its three linearisations.

    gated      z = act(g) * u,  g = y W_gate + b_gate,  u = y W_up + b_up    out = z W_down + b_down
    ungated    z = act(u)

Each linearisation replaces z by `slope_gate * g + slope_up * u + rest` with the slopes measured at
the prompt (marked 0):

                  slope_gate          slope_up      rest
    jacobian      act'(g0) u0         act(g0)       z0 - slope_gate g0 - slope_up u0
    frozen-gate   0                   act(g0)       0
    half          act(g0)/g0 u0 / 2   act(g0) / 2   0      (the LRP half rule)

For an ungated MLP, jacobian has slope act'(u0), and the other two act(u0)/u0, whose limit at 0 is
act'(0). All three reproduce z0 at the prompt. Axes: T position, D d_model, F MLP hidden.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from qkattr.config import BlockConfig
from qkattr.model.layers import ACTIVATIONS, f32
from qkattr.types import BlockWeights


@struct.dataclass
class MLPSlopes:
    """z = slope_gate * g + slope_up * u + rest, with g and u without their biases.

    slope_gate: `[T, F]` of g; None: z does not depend on g.
    slope_up: `[T, F]` of u.
    rest: `[T, F]` all constants.
    """

    slope_gate: Float[Array, "T F"] | None
    slope_up: Float[Array, "T F"]
    rest: Float[Array, "T F"]


def _bias(b: Array | None) -> Array | float:
    return 0.0 if b is None else f32(b)[None]


def hidden(
    weights: BlockWeights, y: Float[Array, "T D"], *, precision: str
) -> tuple[Float[Array, "T F"] | None, Float[Array, "T F"]]:
    """`(g, u)`: the pre-activations of the gate (None when ungated) and of the up projection."""
    up = jnp.einsum("TD,DF->TF", y, f32(weights.w_up_DF), precision=precision)
    up = up + _bias(weights.b_up_F)
    if weights.w_gate_DF is None:
        return None, up
    gate = jnp.einsum("TD,DF->TF", y, f32(weights.w_gate_DF), precision=precision)
    return gate + _bias(weights.b_gate_F), up


def mlp_out(
    weights: BlockWeights,
    gate: Array | None,
    up: Float[Array, "T F"],
    *,
    cfg: BlockConfig,
    precision: str,
) -> Float[Array, "T D"]:
    """The MLP's output from its pre-activations."""
    act = ACTIVATIONS[cfg.activation]
    z = act(up) if gate is None else act(gate) * up
    return jnp.einsum("TF,FD->TD", z, f32(weights.w_down_FD), precision=precision) + _bias(
        weights.b_down_D
    )


def _derivative(act, x: Array) -> Array:
    return jax.jvp(act, (x,), (jnp.ones_like(x),))[1]


def _quotient(act, x: Array) -> Array:
    """act(x) / x, and its limit act'(0) at 0."""
    safe = jnp.where(x == 0, 1.0, x)
    return jnp.where(x == 0, _derivative(act, jnp.zeros_like(x)), act(safe) / safe)


def slopes(
    weights: BlockWeights,
    gate: Array | None,
    up: Float[Array, "T F"],
    *,
    cfg: BlockConfig,
    linearisation: str,
) -> MLPSlopes:
    """The linearisation of the hidden layer at the pre-activations of the prompt."""
    act = ACTIVATIONS[cfg.activation]
    jacobian = linearisation == "jacobian"
    if gate is None:
        slope_gate, slope_up = None, (_derivative if jacobian else _quotient)(act, up)
        rest = act(up) - slope_up * up
    elif linearisation == "frozen-gate":
        slope_gate, slope_up, rest = None, act(gate), jnp.zeros_like(up)
    elif jacobian:
        slope_gate, slope_up = _derivative(act, gate) * up, act(gate)
        rest = -slope_gate * gate
    else:
        slope_gate, slope_up, rest = (
            _quotient(act, gate) * up / 2,
            act(gate) / 2,
            jnp.zeros_like(up),
        )
    rest = rest + slope_up * _bias(weights.b_up_F)
    if slope_gate is not None:
        rest = rest + slope_gate * _bias(weights.b_gate_F)
    return MLPSlopes(slope_gate=slope_gate, slope_up=slope_up, rest=rest)
