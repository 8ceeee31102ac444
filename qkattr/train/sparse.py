"""Products of sparse activations with the rows of a matrix, and their gradients.

    write    y[b] = sum_a v[b, a] W[i[b, a]]           decode; also the gradient of x through a read
    read     r[b, a] = x[b] . W[i[b, a]]               the gradient of v through `write`
    scatter  G[m] = sum_{b, a: i[b, a] = m} v[b, a] x[b]       the gradient of W through both

The sparse form touches only the A rows that a position uses, and suits a CPU: a loop whose body is
one gather or scatter of rows, since XLA would otherwise build the [B, A, D] array. The dense form
is a plain matmul with a [B, M] matrix of mostly zeros, and suits accelerators. Both are exact; they
differ in the order of the sums.
Axes: B positions of the batch, A slots, M dictionary width, D d_model.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def densify(v: Float[Array, "B A"], index: Int[Array, "B A"], width: int) -> Float[Array, "B M"]:
    """The activations as a matrix with a column for every feature."""
    rows = jnp.arange(v.shape[0])[:, None]
    return jnp.zeros((v.shape[0], width), v.dtype).at[rows, index].add(v)


def _write(v, index, w, sparse):
    if not sparse:
        return densify(v, index, w.shape[0]) @ w

    def slot(total, of_slot):
        v_B, index_B = of_slot
        return total + v_B[:, None] * w[index_B], None

    return jax.lax.scan(slot, jnp.zeros((v.shape[0], w.shape[1]), v.dtype), (v.T, index.T))[0]


def _read(x, index, w, sparse):
    if not sparse:
        return jnp.take_along_axis(x @ w.T, index, axis=1)
    ones = jnp.ones(
        x.shape[1], x.dtype
    )  # a product with it is faster than a sum over the last axis
    return jax.lax.map(lambda index_B: (x * w[index_B]) @ ones, index.T).T


def _scatter(v, index, x, width, sparse):
    if not sparse:
        return densify(v, index, width).T @ x

    def position(b, total):
        rows = total.at[index[b]]
        update = v[b][:, None] * x[b]
        return rows.add(
            update, unique_indices=True, mode="promise_in_bounds", wrap_negative_indices=False
        )

    return jax.lax.fori_loop(0, v.shape[0], position, jnp.zeros((width, x.shape[1]), v.dtype))


def write(
    v: Float[Array, "B A"], index: Int[Array, "B A"], w: Float[Array, "M D"], *, sparse: bool
) -> Float[Array, "B D"]:
    """Sum of the rows `w[index]`, each times its activation. A position's features differ."""
    return cast(Array, _write_with_gradient(v, index, w, sparse))


_write_with_gradient = jax.custom_vjp(_write, nondiff_argnums=(3,))


def _write_forward(v, index, w, sparse):
    return _write(v, index, w, sparse), (v, index, w)


def _write_backward(sparse, kept, g):
    v, index, w = kept
    return _read(g, index, w, sparse), None, _scatter(v, index, g, w.shape[0], sparse)


_write_with_gradient.defvjp(_write_forward, _write_backward)


def largest(
    x: Float[Array, "B D"],
    w: Float[Array, "M D"],
    b: Float[Array, "M"],
    *,
    slots: int,
    sparse: bool,
) -> tuple[Float[Array, "B A"], Int[Array, "B A"]]:
    """The `slots` largest of `x @ w.T + b` at each position, and their features.

    The product itself is a matmul either way; its gradient is that of the slots alone.
    """
    return cast(tuple[Array, Array], _largest_with_gradient(x, w, b, slots, sparse))


def _largest(x, w, b, slots, sparse):
    v, index = jax.lax.top_k(x @ w.T + b, slots)
    return v, index


_largest_with_gradient = jax.custom_vjp(_largest, nondiff_argnums=(3, 4))


def _largest_forward(x, w, b, slots, sparse):
    v, index = _largest(x, w, b, slots, sparse)
    return (v, index), (x, w, index)


def _largest_backward(slots, sparse, kept, g):
    x, w, index = kept
    g = g[0]
    bias = jnp.zeros(w.shape[0], g.dtype).at[index].add(g)
    return _write(g, index, w, sparse), _scatter(g, index, x, w.shape[0], sparse), bias


_largest_with_gradient.defvjp(_largest_forward, _largest_backward)
