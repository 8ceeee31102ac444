"""Training on the grid of the packed form."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGUFReader
from tiny import within
from training import SETTINGS

from qkattr.load.dictionaries import load_saes
from qkattr.load.dictionaries.packing import pack_saes
from qkattr.load.dictionaries.quantised import BLOCK, dequantise, on_grid, quantise
from qkattr.sources.dictionary import reconstruct
from qkattr.train.config import TrainConfig
from qkattr.train.rounding import Grid, fit_grid, no_grid, rounded
from qkattr.train.run import train
from qkattr.train.sae import init_sae
from qkattr.train.stream import Stream

#: The packed file is read as float16.
HALF = 2**-10
L, M, D = 2, 24, 40


def config(**changes) -> TrainConfig:
    return TrainConfig(**{**SETTINGS, "bits": 4, **changes})


def stacked(cfg, d=D):
    keys = jax.random.split(jax.random.key(0), L)
    return jax.vmap(lambda key: init_sae(key, jnp.zeros(d), cfg=cfg))(keys)


def by_loop(w, scale, gain, half):
    out = np.zeros_like(w)
    for r in range(w.shape[0]):
        for c in range(w.shape[1]):
            unit = scale[r, c // BLOCK] * gain[c]
            out[r, c] = unit * min(max(np.rint(w[r, c] / unit), -half), half - 1)
    return out


def test_rounded_is_what_the_packer_writes():
    cfg = config(wide=[2])
    saes = stacked(cfg)
    grid = fit_grid(saes, cfg=cfg)
    np.testing.assert_array_equal(grid.half, [8, 128])
    for b, bits in ((0, 4), (1, 8)):
        sae, of = (jax.tree.map(lambda a, b=b: a[b], tree) for tree in (saes, grid))
        here = rounded(sae, of)
        w = np.asarray(sae.w_enc_MD)
        expected = by_loop(w, np.asarray(of.scale_enc_MG), np.asarray(of.gain_enc_D), of.half)
        within("rounded", here.w_enc_MD, expected, 1e-6)
        packed = on_grid(w, np.asarray(of.scale_enc_MG), np.asarray(of.gain_enc_D), bits=bits)
        within("packed", dequantise(packed), expected, HALF)
        np.testing.assert_array_equal(packed.rows, quantise(w, bits=bits).rows)


def test_gradients_pass_through_and_no_grid_rounds_nothing():
    cfg = config()
    saes = stacked(cfg)
    one, none = (jax.tree.map(lambda a: a[0], t) for t in (saes, no_grid(saes)))
    np.testing.assert_array_equal(rounded(one, none).w_dec_MD, one.w_dec_MD)
    grid: Grid = jax.tree.map(lambda a: a[0], fit_grid(saes, cfg=cfg))
    c = jnp.asarray(np.random.default_rng(0).normal(size=(M, D)), jnp.float32)
    gradient = jax.grad(lambda s: (rounded(s, grid).w_enc_MD * c).sum())(one)
    np.testing.assert_array_equal(gradient.w_enc_MD, c)


def test_a_run_ends_in_a_packed_file_of_its_own_weights(small, rows, tmp_path):
    cfg = config(tokens=32 * 60, wide=[2])
    trained = train(small, rows, cfg, out=tmp_path)
    packed = load_saes(tmp_path / "saes.gguf", small.config)
    folder = load_saes(tmp_path / "saes", small.config)
    for one, two, three in zip(trained, packed[1:], folder[1:], strict=True):
        for name in ("w_enc_DM", "w_dec_MD", "b_enc_M", "b_dec_D"):
            a, b, c = (np.float32(getattr(d, name)) for d in (one, two, three))
            within(name, b, a, HALF, np.abs(a).max())
            np.testing.assert_array_equal(a, c)
    stored = {t.name: t for t in GGUFReader(tmp_path / "saes.gguf").tensors}
    matrices = [stored[f"blocks.{b}.hook_resid_post.W_enc"] for b in range(2)]
    assert [m.tensor_type.name for m in matrices] == ["Q4_0", "Q8_0"]
    assert {m.shape[0] for m in matrices} == {BLOCK}  # 16 weights, padded to a block


def test_training_on_the_grid_beats_rounding_afterwards(small, rows, tmp_path):
    """On the positions it was trained on: the claim is that weights find their way on the grid."""
    train(small, rows, config(tokens=32 * 300, bits=0), out=tmp_path / "first")
    options = dict(start=str(tmp_path / "first" / "saes"), tokens=32 * 200, lr=2e-3, decay=0.8)
    train(small, rows, config(**options, bits=0), out=tmp_path / "after")
    pack_saes(tmp_path / "after" / "saes", tmp_path / "after.gguf", bits=4)
    train(small, rows, config(**options, round_from=0.0), out=tmp_path / "on")
    stream = Stream(small.params, rows[:-4], small.config, config(**options))
    stream.measure()
    x = stream.buffer(0).x_LBD
    errors = {}
    for name, path in (("after", "after.gguf"), ("on", "on/saes.gguf")):
        saes = load_saes(tmp_path / path, small.config)[1:]
        errors[name] = [
            float(jnp.square(x[b] - reconstruct(sae, x[b])[1]).sum()) for b, sae in enumerate(saes)
        ]
    assert all(on < after for on, after in zip(errors["on"], errors["after"], strict=True)), errors


@pytest.mark.parametrize("after", [5, 15])
def test_a_run_stopped_before_or_on_the_grid_goes_on_bit_for_bit(
    after, small, rows, tmp_path, monkeypatch
):
    from qkattr.train.checkpoints import Checkpoints

    train(small, rows, config(), out=tmp_path / "whole")
    save = Checkpoints.save

    def then_stop(self, step, *arguments):
        save(self, step, *arguments)
        if step == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", then_stop)
    with pytest.raises(KeyboardInterrupt):
        train(small, rows, config(), out=tmp_path / "broken")
    monkeypatch.undo()
    train(small, rows, config(), out=tmp_path / "broken")
    one, two = ((tmp_path / d / "saes.gguf").read_bytes() for d in ("whole", "broken"))
    assert one == two


def test_a_packed_file_is_a_start(small, rows, tmp_path):
    train(small, rows, config(), out=tmp_path / "one")
    packed = tmp_path / "one" / "saes.gguf"
    cfg = config(start=str(packed), tokens=32, lr=0.0, bits=0)
    again = train(small, rows, cfg, out=tmp_path / "two")
    for mine, theirs in zip(again, load_saes(packed, small.config)[1:], strict=True):
        a, b = np.asarray(mine.w_dec_MD), np.float32(theirs.w_dec_MD)
        b = b / np.linalg.norm(b, axis=1, keepdims=True)
        within("w_dec", a, b, 1e-5)


def test_the_config_says_what_is_wrong():
    from qkattr.errors import InputError

    for changes, said in (
        (dict(bits=3), "bits is 3; give 4 or 8"),
        (dict(wide=[0]), "wide should be a list of boundaries"),
    ):
        with pytest.raises(InputError, match=said):
            config(**changes)
    assert dataclasses.asdict(config(wide=[1]))["wide"] == (1,)
