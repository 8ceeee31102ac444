"""Matrices as GGUF's Q4_0 or Q8_0, and one gain a column.

    w'[r, d] = gain[d] * scale[r, d // 32] * q[r, d]      -h <= q < h, h = 8 (Q4_0) or 128 (Q8_0)

The gguf package reads the blocks. Their scales are chosen here: its own quantiser, which puts a
block's largest weight at the end of the range, leaves 6 % more error (docs/formats.md), and cannot
round to given scales, on which SAEs are trained. The gain keeps columns that are large in every row
from setting the scale of their neighbours: the decoders of residual streams have such columns. A
row that is no multiple of 32 is padded with zeros.
Axes: R rows, D columns, P bytes of a row, G blocks of a row.
Exact: w' but for its rounding to float16, less than 1/16 of the step between two 8-bit integers. A
scale is the best of a grid around the block's largest weight, each refined once by least squares:
close to the least squared error of w / gain in the block, not proved to be it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Float16, Float32, UInt8

BLOCK = 32
#: The bits of a weight, by the type's name.
KINDS = {"Q4_0": 4, "Q8_0": 8}

_SCALE = 2  # bytes of a block's float16 scale, which come first
#: The scales tried, as shares of the one that just reaches the block's largest weight.
_RATIOS = tuple(np.linspace(0.6, 1.1, 11).tolist())
#: A gain is this power of its column's root mean square: of 0, 1/4, ... 1 the one of least error.
_POWER = 0.75
_ROWS = 256  # at a time: their blocks fit a processor's cache


@dataclasses.dataclass(frozen=True)
class Quantised:
    """A quantised matrix. See the equation above.

    rows: their bytes, as GGUF has them. gain: one a column. bits: of a weight.
    """

    rows: UInt8[np.ndarray, "R P"]
    gain: Float32[np.ndarray, "D"]
    bits: int

    @property
    def kind(self) -> str:
        return f"Q{self.bits}_0"

    @property
    def scales(self) -> Float16[np.ndarray, "R G"]:
        blocks = self.rows.reshape(len(self.rows), -1, _SCALE + BLOCK * self.bits // 8)
        return np.ascontiguousarray(blocks[:, :, :_SCALE]).view("<f2")[:, :, 0]

    def most(self) -> float:
        """No weight is larger; nan if a scale or a gain is."""
        scale, gain = (float(np.abs(part).max()) for part in (self.scales, self.gain))
        return scale * gain * 2 ** (self.bits - 1)


def padded(columns: int) -> int:
    """The length of a row in whole blocks."""
    return -(-columns // BLOCK) * BLOCK


def quantise(w: Float[np.ndarray, "R D"], *, bits: int = 4) -> Quantised:
    """The scales, integers and gains of a matrix of finite weights."""
    w = np.ascontiguousarray(w, np.float32)
    gain = _gain(w)
    parts = (_blocks(w[start : start + _ROWS], gain) for start in range(0, len(w), _ROWS))
    rows = [_to_bytes(*_fit(x, bits), bits) for x in parts]
    return Quantised(np.concatenate(rows), gain, bits)


def on_grid(
    w: Float[np.ndarray, "R D"],
    scales: Float[np.ndarray, "R G"],
    gain: Float[np.ndarray, "D"],
    *,
    bits: int,
) -> Quantised:
    """A matrix under given scales and gains: the integers that are nearest to it."""
    x = _blocks(np.ascontiguousarray(w, np.float32), gain)
    scale = scales[..., None].astype(np.float16)
    return Quantised(
        _to_bytes(_rounded(x, scale, bits), scale, bits), np.asarray(gain, np.float32), bits
    )


def dequantise(matrix: Quantised) -> Float16[np.ndarray, "R D"]:
    """The matrix that the blocks and gains stand for; what float16 cannot hold is infinite."""
    from gguf import quants  # here: folders of SAEs are read without it

    kind = getattr(quants, matrix.kind)
    out = np.empty((len(matrix.rows), len(matrix.gain)), np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(out), _ROWS):
            part = slice(start, start + _ROWS)
            w = kind.dequantize_rows(np.ascontiguousarray(matrix.rows[part]))[:, : out.shape[1]]
            w *= matrix.gain
            out[part] = w
    return out


def _blocks(w: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """w / gain `[R, G, 32]`, padded."""
    x = np.pad(w / gain, ((0, 0), (0, padded(w.shape[1]) - w.shape[1])))
    return x.reshape(len(w), -1, BLOCK)


def _gain(w: np.ndarray) -> np.ndarray:
    """One number a column, such that w / gain is about 1 in all: float16 scales always fit."""
    squares = np.square(w, dtype=np.float64).mean(0)
    column, whole = np.sqrt(squares), np.sqrt(squares.mean())
    return np.where(column > 0, column**_POWER * whole ** (1 - _POWER), 1).astype(np.float32)


def _fit(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers `[R, G, 32]` and float16 scales `[R, G, 1]` of the least squared error tried."""
    reach = np.abs(x).max(-1, keepdims=True) / 2 ** (bits - 1)
    best_error = np.full(reach.shape, np.inf, np.float32)
    best_q, best_scale = np.zeros_like(x), np.zeros(reach.shape, np.float16)
    for ratio in (sign * r for sign in (1, -1) for r in _RATIOS):
        q = _rounded(x, (reach * np.float32(ratio)).astype(np.float16), bits)
        squares = np.maximum((q * q).sum(-1, keepdims=True), 1)
        scale = ((x * q).sum(-1, keepdims=True) / squares).astype(np.float16)
        q = _rounded(x, scale, bits)
        error = np.square(x - q * scale.astype(np.float32)).sum(-1, keepdims=True)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_q, best_scale = np.where(better, q, best_q), np.where(better, scale, best_scale)
    return best_q, best_scale


def _rounded(x: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    half = 2 ** (bits - 1)
    step = np.where(scale == 0, 1, scale).astype(np.float32)
    return np.clip(np.rint(x / step), -half, half - 1)


def _to_bytes(q: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """Rows as GGUF has them: a block's scale, then its integers. In Q4_0 weight i lies in the low
    half of a byte, beside weight i + 16 in the high half."""
    if bits == 8:
        codes = q.astype(np.int8).view(np.uint8)
    else:
        low, high = np.split((q + 8).astype(np.uint8), 2, axis=-1)
        codes = low | high << 4
    scale = np.ascontiguousarray(scale, "<f2").view(np.uint8)
    return np.concatenate([scale, codes], axis=-1).reshape(len(q), -1)


def relative_error(w: np.ndarray, approximate: np.ndarray) -> float:
    """|w - w'| / |w| in the Frobenius norm; 0 for a matrix of zeros."""
    size = np.linalg.norm(w.astype(np.float64))
    return float(np.linalg.norm(w - approximate.astype(np.float64)) / size) if size else 0.0
