"""The mathematics once more, in float64 NumPy with loops: slow, and written from the formulas,
not from the library.

A block is run position by position and head by head; frozen, it becomes an explicit matrix for
every pair of positions. Vectors are columns here: a matrix `[D_out, D_in]` acts from the left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from qkattr.config import BlockConfig
from qkattr.types import BlockWeights, Norm

_erf = np.vectorize(math.erf, otypes=[float])

ACTIVATIONS: dict[str, Callable] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0.0),
    "gelu": lambda x: x * (1 + _erf(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
}


def f64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def _or_zero(bias, size: int) -> np.ndarray:
    return np.zeros(size) if bias is None else f64(bias)


def _derivative(act, x):
    step = 1e-6
    return (act(x + step) - act(x - step)) / (2 * step)


# Norms --------------------------------------------------------------------------------------------


def inverse_norm(norm: Norm | None, x: np.ndarray, cfg: BlockConfig) -> float:
    """1 / rms, or 1 / std."""
    if norm is None:
        return 1.0
    variance = np.mean((x - x.mean()) ** 2) if cfg.norm == "layer" else np.mean(x**2)
    return 1 / np.sqrt(variance + cfg.eps)


def norm_matrix(norm: Norm | None, scale: float, d: int, cfg: BlockConfig) -> np.ndarray:
    """The norm with its scale frozen, as a matrix."""
    if norm is None:
        return np.eye(d)
    centre = np.eye(d) - np.full((d, d), 1 / d) if cfg.norm == "layer" else np.eye(d)
    return scale * np.diag(f64(norm.weight)) @ centre


def norm_constant(norm: Norm | None, d: int) -> np.ndarray:
    return np.zeros(d) if norm is None else _or_zero(norm.bias, d)


# One block ----------------------------------------------------------------------------------------


def rotation(position: int, inv_freq: np.ndarray, size: int) -> np.ndarray:
    """The rotary embedding at a position, as a matrix `[H, H]`."""
    out, pairs = np.eye(size), len(inv_freq)
    for i, frequency in enumerate(f64(inv_freq)):
        # The library's angles are float32 products; at these positions they differ from exact ones
        # by 1e-7.
        c, s = np.cos(position * frequency), np.sin(position * frequency)
        out[i, i], out[i, i + pairs], out[i + pairs, i], out[i + pairs, i + pairs] = c, -s, s, c
    return out


@dataclasses.dataclass
class Seen:
    """What a block computed. Arrays are indexed [head, query, key], [position, ...]."""

    x: np.ndarray
    out: np.ndarray
    scores: np.ndarray
    pattern: np.ndarray
    norm_attn: list  # matrices, one a position
    norm_mlp: list
    post_attn: list
    post_mlp: list
    head_q: np.ndarray  # [head, position] scale of the QK-norm
    head_k: np.ndarray
    gate: np.ndarray | None
    up: np.ndarray


def qk_scale(gain, y, weight, bias, head, cfg):
    """1 / rms of one head's query or key, or of those of all heads where the gain is theirs."""
    if gain is None:
        return 1.0
    heads = range(weight.shape[1]) if np.ndim(gain) == 2 else [head]
    raw = [y @ f64(weight[:, n]) + (0 if bias is None else f64(bias[n])) for n in heads]
    return 1 / np.sqrt(np.mean(np.square(raw)) + cfg.eps)


def gain_of(gain, head):
    return gain[head] if np.ndim(gain) == 2 else gain


def _head_matrix(gain, scale, position, inv_freq, size) -> np.ndarray:
    """QK-norm at a frozen scale, then rotary."""
    normed = np.eye(size) if gain is None else scale * np.diag(f64(gain))
    return rotation(position, inv_freq, size) @ normed


def group_of(w: BlockWeights) -> int:
    return w.wq_DNH.shape[1] // w.wk_DKH.shape[1]


def run_block(
    w: BlockWeights, x: np.ndarray, cfg: BlockConfig, pattern: np.ndarray | None = None
) -> Seen:
    """A block's forward pass; `pattern` overrides its own."""
    x = f64(x)
    T, d = x.shape
    n_heads, size = w.wq_DNH.shape[1:]
    n_mlp = w.w_up_DF.shape[1]
    beta = norm_constant(w.norm_attn, d)
    norm_attn = [
        norm_matrix(w.norm_attn, inverse_norm(w.norm_attn, x[t], cfg), d, cfg) for t in range(T)
    ]
    y = np.stack([norm_attn[t] @ x[t] + beta for t in range(T)])
    scores, own = np.zeros((n_heads, T, T)), np.zeros((n_heads, T, T))
    head_q, head_k = np.ones((n_heads, T)), np.ones((n_heads, T))
    attn = np.tile(_or_zero(w.bo_D, d), (T, 1))
    for n in range(n_heads):
        k = n // group_of(w)
        queries, keys, values = [], [], []
        for t in range(T):
            q = y[t] @ f64(w.wq_DNH[:, n]) + (0 if w.bq_NH is None else f64(w.bq_NH[n]))
            key = y[t] @ f64(w.wk_DKH[:, k]) + (0 if w.bk_KH is None else f64(w.bk_KH[k]))
            head_q[n, t] = qk_scale(w.norm_q, y[t], w.wq_DNH, w.bq_NH, n, cfg)
            head_k[n, t] = qk_scale(w.norm_k, y[t], w.wk_DKH, w.bk_KH, k, cfg)
            gain_q, gain_k = gain_of(w.norm_q, n), gain_of(w.norm_k, k)
            queries.append(_head_matrix(gain_q, head_q[n, t], t, w.inv_freq, size) @ q)
            keys.append(_head_matrix(gain_k, head_k[n, t], t, w.inv_freq, size) @ key)
            values.append(y[t] @ f64(w.wv_DKH[:, k]) + (0 if w.bv_KH is None else f64(w.bv_KH[k])))
        scores[n] = cfg.scale * np.stack(queries) @ np.stack(keys).T
        for t in range(T):
            seen = [s for s in range(t + 1) if t - s < int(w.window)]
            own[n, t, seen] = softmax(cap(scores[n, t, seen], cfg))
        used = own[n] if pattern is None else pattern[n]
        attn += used @ np.stack(values) @ f64(w.wo_NHD[n])
    post_attn = [
        norm_matrix(w.norm_attn_post, inverse_norm(w.norm_attn_post, attn[t], cfg), d, cfg)
        for t in range(T)
    ]
    middle = (
        x
        + np.stack([post_attn[t] @ attn[t] for t in range(T)])
        + norm_constant(w.norm_attn_post, d)
    )
    read = x if cfg.parallel else middle
    norm_mlp = [
        norm_matrix(w.norm_mlp, inverse_norm(w.norm_mlp, read[t], cfg), d, cfg) for t in range(T)
    ]
    y = np.stack([norm_mlp[t] @ read[t] for t in range(T)]) + norm_constant(w.norm_mlp, d)
    act = ACTIVATIONS[cfg.activation]
    up = y @ f64(w.w_up_DF) + _or_zero(w.b_up_F, n_mlp)
    gate = None if w.w_gate_DF is None else y @ f64(w.w_gate_DF) + _or_zero(w.b_gate_F, n_mlp)
    z = act(up) if gate is None else act(gate) * up
    mlp = z @ f64(w.w_down_FD) + _or_zero(w.b_down_D, d)
    post_mlp = [
        norm_matrix(w.norm_mlp_post, inverse_norm(w.norm_mlp_post, mlp[t], cfg), d, cfg)
        for t in range(T)
    ]
    out = (
        middle
        + np.stack([post_mlp[t] @ mlp[t] for t in range(T)])
        + norm_constant(w.norm_mlp_post, d)
    )
    return Seen(
        x, out, scores, own if pattern is None else pattern, norm_attn, norm_mlp, post_attn,
        post_mlp, head_q, head_k, gate, up,
    )  # fmt: skip


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def cap(scores: np.ndarray, cfg: BlockConfig) -> np.ndarray:
    return scores if cfg.softcap is None else cfg.softcap * np.tanh(scores / cfg.softcap)


# QK terms -----------------------------------------------------------------------------------------


def qk_vectors(
    w: BlockWeights, seen: Seen, cfg, vectors: np.ndarray, head: int, t: int, side: str
) -> np.ndarray:
    """Every component of position t in head space `[C, H]`; the constants are in the bias slot,
    the last but one.
    """
    d, size = vectors.shape[1], w.wq_DNH.shape[2]
    kv = head // group_of(w)
    if side == "query":
        weight, bias, gain, scale = w.wq_DNH[:, head], w.bq_NH, w.norm_q, seen.head_q[head, t]
        bias, gain = None if bias is None else bias[head], gain_of(gain, head)
    else:
        weight, bias, gain, scale = w.wk_DKH[:, kv], w.bk_KH, w.norm_k, seen.head_k[head, t]
        bias, gain = None if bias is None else bias[kv], gain_of(gain, kv)
    raw = np.stack([f64(weight).T @ seen.norm_attn[t] @ v for v in f64(vectors)])
    raw[-2] += f64(weight).T @ norm_constant(w.norm_attn, d) + _or_zero(bias, size)
    return raw @ _head_matrix(gain, scale, t, w.inv_freq, size).T


# The frozen block ---------------------------------------------------------------------------------


def mlp_slopes(
    seen: Seen, cfg: BlockConfig, linearisation: str
) -> tuple[np.ndarray | None, np.ndarray]:
    """dz/dg and dz/du `[T, F]` of the linearised hidden layer."""
    act = ACTIVATIONS[cfg.activation]
    if seen.gate is None:
        if linearisation == "jacobian":
            return None, _derivative(act, seen.up)
        return None, act(seen.up) / seen.up
    g, u = seen.gate, seen.up
    if linearisation == "jacobian":
        return _derivative(act, g) * u, act(g)
    if linearisation == "frozen-gate":
        return np.zeros_like(g), act(g)
    return act(g) / g * u / 2, act(g) / 2


@dataclasses.dataclass
class Linear:
    """A frozen block as matrices. heads: `[N, T, S, D, D]` each head's direct part;
    mlp: `[T, D, D]`.
    """

    heads: np.ndarray
    mlp: np.ndarray
    parallel: bool

    def matrix(self) -> np.ndarray:
        """`[T, D, S, D]`, everything together."""
        T, d = self.mlp.shape[:2]
        total = np.zeros((T, d, T, d))
        for t in range(T):
            through = np.eye(d) if self.parallel else np.eye(d) + self.mlp[t]
            total[t, :, t] += np.eye(d) + self.mlp[t]
            for s in range(T):
                total[t, :, s] += through @ self.heads[:, t, s].sum(0)
        return total


def linearise(w: BlockWeights, seen: Seen, cfg: BlockConfig, linearisation: str) -> Linear:
    T, d = seen.x.shape
    n_heads = w.wq_DNH.shape[1]
    slope_gate, slope_up = mlp_slopes(seen, cfg, linearisation)
    heads, mlp = np.zeros((n_heads, T, T, d, d)), np.zeros((T, d, d))
    for t in range(T):
        hidden = slope_up[t][:, None] * f64(w.w_up_DF).T
        if slope_gate is not None:
            hidden += slope_gate[t][:, None] * f64(w.w_gate_DF).T
        mlp[t] = seen.post_mlp[t] @ f64(w.w_down_FD).T @ hidden @ seen.norm_mlp[t]
        for n in range(n_heads):
            ov = f64(w.wo_NHD[n]).T @ f64(w.wv_DKH[:, n // group_of(w)]).T
            for s in range(t + 1):
                heads[n, t, s] = seen.pattern[n, t, s] * seen.post_attn[t] @ ov @ seen.norm_attn[s]
    return Linear(heads, mlp, cfg.parallel)
