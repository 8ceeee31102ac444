"""Matrices as blockwise integers: 4 or 8 bits a weight and one float16 scale a block.

    w'[r, d] = gain[d] * scale[r, d // block] * (code[r, d] - 2^(bits - 1))      0 <= code < 2^bits

Blocks run along the last axis; a row that is no multiple of the block is padded with zeros. Two
4-bit codes lie in a byte, the earlier weight in its low half. A block's scale may be negative, so
that the end of the range that reaches further (-2^(bits - 1)) falls on its largest weight. The gain
keeps columns that are large in every row from setting the scale of their neighbours: the decoders
of residual streams have such columns, and without it their error is a third larger.
Axes: R rows, D columns, P bytes of a row's codes, G blocks of a row.
Exact: w' but for its rounding to float16, less than 1/16 of the step between two 8-bit codes. A
scale is the best of a grid around the block's largest weight, each refined once by least squares:
close to the least squared error of w / gain in the block, not proved to be it.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Float, Float16, Float32, UInt8

#: The scales tried, as shares of the one that just reaches the block's largest weight.
_RATIOS = tuple(np.linspace(0.6, 1.1, 11).tolist())
#: A gain is this power of its column's root mean square: of 0, 1/4, ... 1 the one of least error.
_POWER = 0.75
_ROWS = 256  # at a time: their blocks fit a processor's cache


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """A quantised matrix. See the equation above."""

    codes: UInt8[np.ndarray, "R P"]
    scales: Float16[np.ndarray, "R G"]
    gain: Float32[np.ndarray, "D"]


def shapes(rows: int, columns: int, *, bits: int, block: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a `Blockwise`'s arrays."""
    blocks = -(-columns // block)
    return {
        "codes": (rows, blocks * block * bits // 8),
        "scales": (rows, blocks),
        "gain": (columns,),
    }


def quantise(w: Float[np.ndarray, "R D"], *, bits: int = 4, block: int = 32) -> Blockwise:
    """The codes, scales and gains of a matrix of finite weights."""
    w = np.ascontiguousarray(w, np.float32)
    gain = _gain(w)
    padding = -w.shape[1] % block
    codes, scales = [], []
    for start in range(0, len(w), _ROWS):
        part = np.pad(w[start : start + _ROWS] / gain, ((0, 0), (0, padding)))
        q, scale = _fit_blocks(part.reshape(-1, block), bits)
        codes.append(_to_bytes(q.reshape(part.shape), bits))
        scales.append(scale.reshape(len(part), -1))
    return Blockwise(np.concatenate(codes), np.concatenate(scales), gain)


def on_grid(
    w: Float[np.ndarray, "R D"],
    scales: Float[np.ndarray, "R G"],
    gain: Float[np.ndarray, "D"],
    *,
    bits: int,
    block: int,
) -> Blockwise:
    """The codes of a matrix under given scales and gains: those that are nearest to it."""
    w = np.ascontiguousarray(w, np.float32) / gain
    part = np.pad(w, ((0, 0), (0, -w.shape[1] % block)))
    scales = scales.astype(np.float16)
    q = _rounded(part.reshape(*scales.shape, block), scales[..., None], bits)
    return Blockwise(_to_bytes(q.reshape(part.shape), bits), scales, gain.astype(np.float32))


def _gain(w: np.ndarray) -> np.ndarray:
    """One number a column, such that w / gain is about 1 in all: float16 scales always fit."""
    squares = np.square(w, dtype=np.float64).mean(0)
    column, whole = np.sqrt(squares), np.sqrt(squares.mean())
    return np.where(column > 0, column**_POWER * whole ** (1 - _POWER), 1).astype(np.float32)


def _fit_blocks(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers `[n, block]` and float16 scales `[n, 1]` of the least squared error tried."""
    reach = np.abs(x).max(axis=1, keepdims=True) / 2 ** (bits - 1)
    best_error = np.full(reach.shape, np.inf, np.float32)
    best_q, best_scale = np.zeros_like(x), np.zeros(reach.shape, np.float16)
    for ratio in (sign * r for sign in (1, -1) for r in _RATIOS):
        q = _rounded(x, (reach * np.float32(ratio)).astype(np.float16), bits)
        squares = np.maximum((q * q).sum(1, keepdims=True), 1)
        scale = ((x * q).sum(1, keepdims=True) / squares).astype(np.float16)
        q = _rounded(x, scale, bits)
        error = np.square(x - q * scale.astype(np.float32)).sum(1, keepdims=True)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_q, best_scale = np.where(better, q, best_q), np.where(better, scale, best_scale)
    return best_q, best_scale


def _rounded(x: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    half = 2 ** (bits - 1)
    step = np.where(scale == 0, 1, scale).astype(np.float32)
    return np.clip(np.rint(x / step), -half, half - 1)


def _to_bytes(q: np.ndarray, bits: int) -> np.ndarray:
    codes = (q + 2 ** (bits - 1)).astype(np.uint8)
    return codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)


@functools.cache
def _values(bits: int) -> np.ndarray:
    """What each byte stands for: `[256]` items of one or two float32 integers."""
    byte = np.arange(256)
    codes = [byte] if bits == 8 else [byte & 15, byte >> 4]
    pairs = np.stack(codes, axis=1).astype(np.float32) - 2 ** (bits - 1)
    return pairs.view(np.uint32 if bits == 8 else np.uint64).reshape(256)


def dequantise(matrix: Blockwise, *, bits: int) -> Float16[np.ndarray, "R D"]:
    """The matrix that the codes, scales and gains stand for; what float16 cannot hold is inf."""
    (rows, blocks), columns = matrix.scales.shape, len(matrix.gain)
    out = np.empty((rows, columns), np.float16)
    with np.errstate(over="ignore"):
        for start in range(0, rows, _ROWS):
            part = slice(start, start + _ROWS)
            codes = np.ascontiguousarray(matrix.codes[part])
            w = _values(bits)[codes].view(np.float32).reshape(len(codes), blocks, -1)
            w *= matrix.scales[part, :, None].astype(np.float32)
            out[part] = w.reshape(len(codes), -1)[:, :columns] * matrix.gain
    return out


def relative_error(w: np.ndarray, approximate: np.ndarray) -> float:
    """|w - w'| / |w| in the Frobenius norm; 0 for a matrix of zeros."""
    size = np.linalg.norm(w.astype(np.float64))
    return float(np.linalg.norm(w - approximate.astype(np.float64)) / size) if size else 0.0
