"""The forward pass against `transformers`, and what padding, tracing and edits do to it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real
import tiny
import torch
from families import LOGITS
from tiny import within
from tracing import traced_at_most

from qkattr.model.edits import Edits, ResidualEdits
from qkattr.model.transformer import block, embed, forward, unembed

PATTERN = 1e-5  # of probabilities
REAL_LOGITS = 1e-3  # thirty blocks, logits of order 20
SAME = 1e-5  # the same arithmetic in other shapes, relative to the largest


def reference(model, ids):
    """Logits `[T, V]` and attentions `[L, N, T, S]` of a `transformers` model."""
    with torch.no_grad():
        out = model(torch.tensor(np.asarray(ids))[None].long(), output_attentions=True)
    return out.logits[0].numpy(), np.stack([a[0].numpy() for a in out.attentions])


@pytest.mark.parametrize("name", tiny.HF_MODELS)
def test_equals_transformers(name, tmp_path):
    model, cfg, params = tiny.hf_params(name, tmp_path)
    ids = np.random.default_rng(1).integers(0, cfg.vocab, 13)
    logits, trace = forward(params, jnp.asarray(ids), cfg=cfg)
    expected, attentions = reference(model, ids)
    within("logits", logits, expected, LOGITS)
    within("patterns", trace.patterns, attentions, PATTERN)


def test_padding_changes_nothing_before_it(case):
    n = len(case.tokens)
    padded = np.pad(case.tokens, (0, 5))
    logits, trace = forward(case.params, padded, cfg=case.cfg)
    size = np.abs(case.logits).max()
    within("logits", logits[:n], case.logits, SAME, size)
    within("patterns", trace.patterns[:, :, :n, :n], case.trace.patterns, SAME)


def test_a_second_prompt_of_the_length_compiles_nothing():
    params, cfg = tiny.house("llama")
    once = traced_at_most(1, forward, "cfg", "capture", "precision")
    for seed in (3, 4):
        once(params, jnp.asarray(tiny.tokens(10, seed)), cfg=cfg, capture=())


@pytest.mark.parametrize("b", range(tiny.L + 1))
def test_an_edited_residual_stream_runs_on_from_there(case, b):
    """An edit at a boundary equals running the remaining blocks by hand from the edited stream."""
    rng = np.random.default_rng(b)
    n, d = case.trace.boundaries.shape[1:]
    position = np.array([2, n - 1])
    delta = rng.normal(size=(2, d)).astype(np.float32)
    edits = Edits(ResidualEdits(jnp.full(2, b), jnp.asarray(position), jnp.asarray(delta)))
    logits, _ = forward(case.params, case.tokens, cfg=case.cfg, edits=edits, capture=())
    x = case.trace.boundaries[b].at[position].add(delta)
    for later in range(b, tiny.L):
        x, _ = block(tiny.block_weights(case.params, later), x, cfg=case.cfg.block)
    expected = unembed(case.params, x, cfg=case.cfg)
    within("logits", logits, expected, SAME, np.abs(expected).max())
    assert np.abs(logits - case.logits).max() > 100 * SAME * np.abs(expected).max()


def test_edits_outside_the_model_do_nothing(case):
    d = case.trace.boundaries.shape[2]
    edits = Edits(ResidualEdits(jnp.array([-1, 99]), jnp.array([0, 1]), jnp.ones((2, d))))
    logits, _ = forward(case.params, case.tokens, cfg=case.cfg, edits=edits, capture=())
    within("logits", logits, case.logits, SAME, np.abs(case.logits).max())


def test_boundary_0_is_the_embedding_and_capture_keeps_what_is_asked(case):
    _, trace = forward(case.params, case.tokens, cfg=case.cfg, capture=("boundaries",))
    assert trace.scores is None and trace.patterns is None
    np.testing.assert_array_equal(trace.boundaries[0], embed(case.params, case.tokens))


@pytest.mark.slow
def test_real_model_equals_transformers(real_case):
    expected, attentions = reference(real.transformers_model(), real_case.tokens)
    within("logits", real_case.logits, expected, REAL_LOGITS)
    within("patterns", real_case.trace.patterns, attentions, PATTERN)


@pytest.mark.slow
def test_real_model_says_sally(bundle):
    ids, _ = bundle.tokenize(real.PROMPTS["sally"])
    logits, _ = forward(bundle.params, jnp.asarray(ids), cfg=bundle.config, capture=())
    probability = np.asarray(jax.nn.softmax(logits[-1]))
    assert bundle.tokenizer.token(int(probability.argmax())) == " Sally"
    assert probability.max() == pytest.approx(0.992, abs=0.002)
