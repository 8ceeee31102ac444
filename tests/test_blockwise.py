"""Blockwise integers: what they dequantise to, and how far that is from the weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkattr.load.dictionaries.blockwise import dequantise, quantise, relative_error, shapes

#: A weight is rounded to float16 once, from a float32 product: half a unit in the last place of
#: each, and of the smallest float16 near 0.
FLOAT16 = dict(rtol=2**-11 + 2**-22, atol=2**-25)
#: Relative error of normally distributed weights at 4 bits in blocks of 32. The best 16 evenly
#: spaced levels have 0.107 for a whole matrix (Max 1960); a scale for every 32 makes it less.
FOUR_BITS, EIGHT_BITS = 0.09, 0.007


def naive(codes, scales, gain, bits):
    """The equation at the top of `blockwise`, a weight at a time, in float64."""
    block = codes.shape[1] * 8 // bits // scales.shape[1]
    out = np.zeros((len(codes), len(gain)))
    for r in range(len(codes)):
        for d in range(len(gain)):
            if bits == 8:
                code = int(codes[r, d])
            else:
                code = int(codes[r, d // 2]) >> (4 if d % 2 else 0) & 15
            out[r, d] = float(gain[d]) * float(scales[r, d // block]) * (code - 2 ** (bits - 1))
    return out


def unpacked(codes, bits):
    return (
        codes if bits == 8 else np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    )


matrices = dict(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([2, 6, 32, 64]),
    size=st.sampled_from([1e-5, 1.0, 1e2]),
    seed=st.integers(0, 99),
)


def matrix(rows, columns, size, seed):
    """Columns differ in size, some are zero; so is a row."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(rows, columns)) * size * np.exp(rng.normal(size=columns))
    w[:, rng.random(columns) < 0.1] = 0
    w[0] *= rng.random() < 0.9
    return w.astype(np.float32)


@given(**matrices)
@settings(deadline=None, max_examples=60)
def test_dequantised_as_by_hand(rows, columns, bits, block, size, seed):
    packed = quantise(matrix(rows, columns, size, seed), bits=bits, block=block)
    arrays = vars(packed)
    assert {n: a.shape for n, a in arrays.items()} == shapes(rows, columns, bits=bits, block=block)
    assert [a.dtype for a in arrays.values()] == [np.uint8, np.float16, np.float32]
    w = dequantise(packed, bits=bits)
    assert w.dtype == np.float16 and w.shape == (rows, columns)
    np.testing.assert_allclose(w, naive(**arrays, bits=bits), **FLOAT16)


@given(**matrices)
@settings(deadline=None, max_examples=60)
def test_no_weight_is_further_than_half_a_step(rows, columns, bits, block, size, seed):
    w = matrix(rows, columns, size, seed)
    packed = quantise(w, bits=bits, block=block)
    codes = unpacked(packed.codes, bits)[:, :columns]
    step = np.abs(np.repeat(packed.scales, block, axis=1)[:, :columns] * packed.gain)
    inside = (codes > 0) & (codes < 2**bits - 1)
    error = np.abs(w - dequantise(packed, bits=bits).astype(np.float64))
    slack = FLOAT16["atol"] + FLOAT16["rtol"] * np.abs(w) + 1e-6 * step  # w / gain is float32
    assert np.all(error[inside] <= (step / 2 + slack)[inside])


def test_random_codes_and_negative_scales():
    rng = np.random.default_rng(0)
    packed = quantise(rng.normal(size=(7, 19)), bits=4, block=8)
    codes = rng.integers(0, 256, packed.codes.shape, np.uint8)
    packed = type(packed)(
        codes, rng.normal(size=packed.scales.shape).astype(np.float16), packed.gain
    )
    np.testing.assert_allclose(dequantise(packed, bits=4), naive(**vars(packed), bits=4), **FLOAT16)


@pytest.mark.parametrize("outliers", [1, 30])
@pytest.mark.parametrize("bits, most", [(4, FOUR_BITS), (8, EIGHT_BITS)])
def test_error_of_normal_weights(bits, most, outliers):
    """Also with columns that are large in every row, which alone fill their blocks' range."""
    w = np.random.default_rng(0).normal(size=(256, 576)).astype(np.float32)
    w[:, ::50] *= outliers
    approximate = dequantise(quantise(w, bits=bits), bits=bits)
    small = np.delete(np.arange(576), np.arange(0, 576, 50))
    assert relative_error(w, approximate) < most
    assert relative_error(w[:, small], approximate[:, small]) < 2 * most


def test_better_than_the_largest_weight_as_the_end_of_the_range():
    w = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    blocks = w.reshape(-1, 32)
    step = np.abs(blocks).max(1, keepdims=True) / 7
    plain = np.clip(np.rint(blocks / step), -8, 7) * step
    ours = relative_error(w, dequantise(quantise(w), bits=4))
    assert ours < 0.93 * relative_error(blocks, plain)
