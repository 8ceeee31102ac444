"""Folders of every family against `transformers`: logits, patterns, scores, head loadings."""

from __future__ import annotations

import families
import jax
import numpy as np
import pytest
from families import LOGITS
from test_forward import PATTERN
from test_linear import check_parts
from test_terms import SCORE, every_pair
from tiny import within

from qkattr.kinds import NO_WINDOW
from qkattr.model.linear import freeze


@pytest.fixture(scope="module", params=list(families.MODELS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def made(name):
    return families.case(name)


def test_logits_and_patterns_equal_transformers(name, made):
    expected = families.reference(name)
    within(f"{name}: logits", made.logits, expected.logits, LOGITS)
    within(f"{name}: patterns", made.trace.patterns, expected.patterns, PATTERN)


def pattern_of(scores, window, softcap):
    """Attention of one head from its scores, by hand."""
    T = len(scores)
    capped = scores if softcap is None else softcap * np.tanh(scores / softcap)
    distance = np.arange(T)[:, None] - np.arange(T)
    seen = (distance >= 0) & (distance < window)
    weight = np.where(seen, np.exp(capped - np.where(seen, capped, -np.inf).max(1)[:, None]), 0.0)
    return weight / weight.sum(1, keepdims=True)


def test_terms_make_every_score_and_pattern_of_transformers(name, made):
    """Theirs, too: a key bias without rotary, say, shows in scores and nowhere else."""
    expected, T, cfg = families.reference(name), len(families.PROMPT), made.cfg.block
    causal = np.tril(np.ones((T, T)))
    for b in range(made.cfg.n_blocks):
        sums, _ = jax.device_get(every_pair(*made.block(b), cfg=cfg, sums=True))
        scores, theirs = np.asarray(made.trace.scores[b]) * causal, expected.scores[b] * causal
        largest = np.abs(theirs).max((1, 2), keepdims=True)
        within(f"{name}: sum of terms - score", sums * causal, scores, SCORE, largest)
        within(f"{name}: sum of terms - theirs", sums * causal, theirs, SCORE, largest)
        for n in range(made.cfg.n_heads):
            pattern = pattern_of(np.float64(sums[n]), made.cfg.windows[b], cfg.softcap)
            within(f"{name}: pattern of the terms", pattern, expected.patterns[b, n], PATTERN)


def test_head_loadings_equal_the_vjp(name, made):
    """To 1e-4 of the row's largest, as `check_parts` has it; two blocks, of both kinds if there
    are two."""
    cfg = made.cfg.block
    for b in range(2):
        weights, x, parts = made.block(b)
        frozen = freeze(weights, x, cfg=cfg)
        check_parts(frozen, weights, x, parts, cfg, "jacobian", range(made.cfg.n_heads))


def test_the_models_are_what_they_are_meant_to_be():
    """What the checks above lean on: windows shorter than the prompt, odd heads, caps that cap."""
    short = {n for n in families.MODELS if min(families.case(n).cfg.windows) != NO_WINDOW}
    assert short >= {"mistral", "qwen2-windowed", "gemma2", "gemma3-text", "gemma3", "phi3"}
    for name in short:
        assert min(families.case(name).cfg.windows) < len(families.PROMPT)
    gemma2 = families.case("gemma2")
    assert np.abs(gemma2.trace.scores).max() > gemma2.cfg.block.softcap
    assert np.ndim(families.case("olmo2").params.blocks.norm_q) == 3
    assert float(families.case("gemma3").params.embed_scale or 0) == 6.0  # sqrt(36)
