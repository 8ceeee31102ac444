"""Every published format: files in its exact layout give what its own code computes."""

import dataclasses

import layouts
import numpy as np
import pytest
from layouts import CASES, D, M

from qkattr.config import BlockConfig, ModelConfig, Rotary
from qkattr.kinds import NO_WINDOW
from qkattr.load.dictionaries import load_saes
from qkattr.load.dictionaries.packing import pack_saes
from qkattr.sources.components import decompose
from qkattr.sources.dictionary import (
    Dictionary,
    DictionaryConfig,
    encode,
    encoder_rows,
    reconstruct,
)

#: Of the largest value: float32 sums of 24 terms against float64.
CLOSE = 1e-5
MODEL = ModelConfig(
    family="llama",
    n_blocks=2,
    d_model=D,
    n_heads=1,
    n_kv_heads=1,
    head_dim=D,
    d_mlp=4,
    vocab=8,
    context=8,
    block=BlockConfig(scale=1.0),
    rotary=Rotary(base=1e4, dims=D),
    windows=(NO_WINDOW,) * 2,
)


def near(got, expected, share=CLOSE):
    np.testing.assert_allclose(got, expected, rtol=0, atol=share * np.abs(expected).max())


def stream(seed=3):
    return np.random.default_rng(seed).normal(size=(7, D)) * 2 + 0.5


@pytest.mark.parametrize("name", CASES)
def test_computes_what_its_publisher_computes(tmp_path, name):
    pipeline = CASES[name](tmp_path, np.random.default_rng(1))
    saes = load_saes(tmp_path, MODEL, missing="raw")
    boundary = 0 if name.endswith("embedding") else 2
    assert [sae is not None for sae in saes] == [b == boundary for b in range(3)]
    x = stream()
    acts, rebuilt = pipeline(x)
    assert 0 < (acts > 0).mean() < 1
    got_acts, got = reconstruct(saes[boundary], np.float32(x))
    near(got_acts, acts)
    near(got, rebuilt)


@pytest.mark.parametrize("name", CASES)
def test_slots_sum_to_the_residual(tmp_path, name):
    CASES[name](tmp_path, np.random.default_rng(1))
    sae = next(filter(None, load_saes(tmp_path, MODEL, missing="raw")))
    x = np.float32(stream())
    parts = decompose(sae, x, slots=M)
    near(parts.vectors().sum(1), x)
    features = np.asarray(parts.vectors()[:, :-1].sum(1))[1:]  # position 0 is a sink
    near(features, np.asarray(reconstruct(sae, x)[1])[1:])


@pytest.mark.parametrize("name", ["gemma scope", "llama scope", "sparsify", "qwen scope",
                                  "dictionary_learning, GatedAutoEncoder"])  # fmt: skip
def test_any_format_can_be_packed(tmp_path, name):
    CASES[name](tmp_path, np.random.default_rng(1))
    pack_saes(tmp_path, tmp_path / "packed.gguf", bits=8)
    whole = load_saes(tmp_path, MODEL, missing="raw")[2]
    packed = load_saes(tmp_path / "packed.gguf", MODEL, missing="raw")[2]
    assert packed.config == whole.config
    for field in ("factor", "l0", "threshold_M", "b_gate_M", "r_mag_M", "b_enc_M", "b_dec_D"):
        a, b = getattr(packed, field), getattr(whole, field)
        assert (a is None) == (b is None), field
        if a is not None:
            np.testing.assert_array_equal(a, np.float32(b))
    near(packed.w_dec_MD, whole.w_dec_MD, 0.02)  # 8 bits


def test_large_files_stay_on_disk(tmp_path):
    for name in ("gemma scope", "qwen scope", "dictionary_learning, AutoEncoder"):
        CASES[name](tmp_path / name, np.random.default_rng(1))
        sae = load_saes(tmp_path / name, MODEL, missing="raw")[2]
        base = sae.w_enc_DM
        while isinstance(base, np.ndarray):
            assert not base.flags.owndata, name
            base = base.base


def random_sae(**config):
    w = layouts.weights(np.random.default_rng(2))
    return Dictionary(
        w_enc_DM=w["W_enc"],
        w_dec_MD=w["W_dec"],
        b_enc_M=w["b_enc"],
        b_dec_D=w["b_dec"],
        r_mag_M=w["b_enc"] * 2,
        b_gate_M=w["threshold"],
        config=DictionaryConfig(**config),
    )


@pytest.mark.parametrize("normalize", ["none", "constant_norm_rescale", "layer_norm"])
def test_a_centred_sae_never_sees_the_mean(normalize):
    """As encoding the centred stream and adding the mean afterwards."""
    sae = random_sae(activation="relu", centre=True, normalize=normalize)
    plain = dataclasses.replace(sae, config=dataclasses.replace(sae.config, centre=False))
    x = np.float32(stream())
    mean = x.mean(-1, keepdims=True)
    acts, rebuilt = reconstruct(plain, x - mean)
    got_acts, got = reconstruct(sae, x)
    near(got_acts, acts)
    near(got, rebuilt + mean)
    shifted = reconstruct(sae, x + 3)
    near(shifted[0], acts, 1e-4)  # rounding of x + 3
    encoding = encode(sae, x, slots=M)
    near(encoding.bias - encode(plain, x - mean, slots=M).bias, np.broadcast_to(mean, x.shape))
    near(decompose(sae, x, slots=4).vectors().sum(1), x)


@pytest.mark.parametrize("activation", ["relu", "gated"])
@pytest.mark.parametrize("centre", [True, False])
def test_encoder_rows_are_the_slopes_of_activations(activation, centre):
    sae = random_sae(activation=activation, centre=centre)
    x = np.float32(stream())
    acts = np.asarray(reconstruct(sae, x)[0])
    t, feature = np.unravel_index(acts.argmax(), acts.shape)
    row = encoder_rows(sae, np.array([feature]))[0]
    step = np.float32(1e-2) * np.eye(D, dtype=np.float32)
    up, down = (np.asarray(reconstruct(sae, x[t] + sign * step)[0]) for sign in (1, -1))
    slopes = (up - down)[:, feature] / 2e-2
    near(slopes, row, 1e-3)  # finite differences in float32
