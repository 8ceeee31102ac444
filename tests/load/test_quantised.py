"""Q4_0 and Q8_0 with gains: what they stand for, and how far that is from the weights."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkattr.load.dictionaries.quantised import (
    BLOCK,
    Quantised,
    dequantise,
    on_grid,
    padded,
    quantise,
    relative_error,
)

#: A weight is rounded to float16 once, from a float32 product: half a unit in the last place of
#: each, and of the smallest float16 near 0.
FLOAT16 = dict(rtol=2**-11 + 2**-22, atol=2**-25)
#: Relative error of normally distributed weights at 4 bits in blocks of 32. The best 16 evenly
#: spaced levels have 0.107 for a whole matrix (Max 1960); a scale for every 32 makes it less.
FOUR_BITS, EIGHT_BITS = 0.09, 0.007


def integers(rows, bits):
    """`(q [R, D], scales [R, G])` of GGUF's bytes, a block at a time, as ggml's C code has them."""
    size = 2 + BLOCK * bits // 8
    q, scales = [], []
    for row in np.asarray(rows):
        for block in row.reshape(-1, size):
            scales.append(np.frombuffer(block[:2].tobytes(), "<f2")[0])
            for i in range(BLOCK):
                if bits == 8:
                    q.append(int.from_bytes(block[2 + i : 3 + i].tobytes(), signed=True))
                else:
                    q.append((int(block[2 + i % 16]) >> (4 if i >= 16 else 0) & 15) - 8)
    return np.reshape(q, (len(rows), -1)), np.reshape(scales, (len(rows), -1))


def naive(rows, gain, bits):
    """The equation at the top of `quantised`, in float64."""
    q, scales = integers(rows, bits)
    return (q * np.repeat(np.float64(scales), BLOCK, 1))[:, : len(gain)] * np.float64(gain)


matrices = dict(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
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
def test_dequantised_as_by_hand(rows, columns, bits, size, seed):
    packed = quantise(matrix(rows, columns, size, seed), bits=bits)
    kind = gguf.GGMLQuantizationType[packed.kind]
    assert gguf.quants.quant_shape_from_byte_shape(packed.rows.shape, kind) == (
        rows,
        padded(columns),
    )
    assert (packed.rows.dtype, packed.gain.dtype) == (np.uint8, np.float32)
    np.testing.assert_array_equal(packed.scales, integers(packed.rows, bits)[1])
    w = dequantise(packed)
    assert w.dtype == np.float16 and w.shape == (rows, columns)
    np.testing.assert_allclose(w, naive(packed.rows, packed.gain, bits), **FLOAT16)
    assert np.abs(w).max() <= packed.most() * (1 + FLOAT16["rtol"]) + FLOAT16["atol"]


@given(**matrices)
@settings(deadline=None, max_examples=60)
def test_no_weight_is_further_than_half_a_step(rows, columns, bits, size, seed):
    w = matrix(rows, columns, size, seed)
    packed = quantise(w, bits=bits)
    q, scales = integers(packed.rows, bits)
    q = q[:, :columns]
    step = np.abs(np.repeat(scales, BLOCK, axis=1)[:, :columns] * packed.gain)
    inside = (q > -(2 ** (bits - 1))) & (q < 2 ** (bits - 1) - 1)
    error = np.abs(w - dequantise(packed).astype(np.float64))
    slack = FLOAT16["atol"] + FLOAT16["rtol"] * np.abs(w) + 1e-6 * step  # w / gain is float32
    assert np.all(error[inside] <= (step / 2 + slack)[inside])


@pytest.mark.parametrize("bits", [4, 8])
def test_random_bytes_and_negative_scales(bits):
    """Every byte of codes occurs; the package's public function says the same."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (40, 3 * (2 + BLOCK * bits // 8)), np.uint8)
    blocks = rows.reshape(40, 3, -1)
    blocks[..., :2] = rng.normal(size=(40, 3, 1)).astype("<f2").view(np.uint8)
    packed = Quantised(rows, np.float32(rng.normal(size=90)), bits)
    np.testing.assert_allclose(dequantise(packed), naive(rows, packed.gain, bits), **FLOAT16)
    theirs = gguf.dequantize(rows, gguf.GGMLQuantizationType[packed.kind])[:, :90] * packed.gain
    np.testing.assert_array_equal(dequantise(packed), theirs.astype(np.float16))


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_on_a_grid_stays_there(bits):
    rng = np.random.default_rng(0)
    half = 2 ** (bits - 1)
    q = rng.integers(-half, half, (5, 70))
    scales, gain = np.float16(rng.normal(size=(5, 3))), np.float32(rng.uniform(0.5, 2, 70))
    w = (q * np.repeat(np.float64(scales), BLOCK, 1)[:, :70] * gain).astype(np.float32)
    packed = on_grid(w, scales, gain, bits=bits)
    found, kept = integers(packed.rows, bits)
    np.testing.assert_array_equal(found[:, :70], q)
    np.testing.assert_array_equal(kept, scales)
    assert not found[:, 70:].any()


@pytest.mark.parametrize("outliers", [1, 30])
@pytest.mark.parametrize("bits, most", [(4, FOUR_BITS), (8, EIGHT_BITS)])
def test_error_of_normal_weights(bits, most, outliers):
    """Also with columns that are large in every row, which alone fill their blocks' range."""
    w = np.random.default_rng(0).normal(size=(256, 576)).astype(np.float32)
    w[:, ::50] *= outliers
    approximate = dequantise(quantise(w, bits=bits))
    small = np.delete(np.arange(576), np.arange(0, 576, 50))
    assert relative_error(w, approximate) < most
    assert relative_error(w[:, small], approximate[:, small]) < 2 * most


@pytest.mark.parametrize("bits, share", [(4, 0.96), (8, 0.96)])
def test_better_than_the_quantiser_of_the_gguf_package(bits, share):
    """Which puts the largest weight at the end of the range; both with the same gains."""
    w = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    packed = quantise(w, bits=bits)
    kind = gguf.GGMLQuantizationType[packed.kind]
    theirs = gguf.dequantize(gguf.quantize(w / packed.gain, kind), kind) * packed.gain
    assert relative_error(w, dequantise(packed)) < share * relative_error(w, theirs)
