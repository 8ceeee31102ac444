"""Edited runs whose norm scales are held at those of another run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import tiny
from editing import (
    MODEL,
    assert_identical,
    block_of,
    full,
    moved,
    of_block,
    reference_block,
    run,
    vector,
    within_largest,
    within_scores,
)
from test_edits import at_scale
from tiny import within

from qkattr.model.edits import (
    BlockEdits,
    batched_axes,
)
from qkattr.model.transformer import block, forward


def activations(case):
    """Of every block of the clean run; outside `jit`, one operation at a time, so that the same
    numbers come out bit for bit whatever else is computed."""
    return [block(*block_of(case, b)[:2], cfg=case.cfg.block) for b in range(tiny.L)]


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "everything_parallel_ungated"])
def test_held_scales(name):
    case, rng = tiny.case(name), np.random.default_rng(0)
    cfg = case.cfg.block
    for b, (clean, seen) in enumerate(activations(case)):
        weights, x, _ = block_of(case, b)
        out, again = block(weights, x, cfg=cfg, edits=BlockEdits(frozen=seen))
        assert_identical(jax.device_get((out, again)), jax.device_get((clean, seen)))

        changed = np.asarray(x + 0.5 * np.std(x) * rng.normal(size=x.shape), np.float32)
        out, got = block(weights, changed, cfg=cfg, edits=BlockEdits(frozen=seen))
        _, _, _, held = reference_block(weights, x, cfg)
        expected, scores, pattern, _ = reference_block(weights, changed, cfg, held=held)
        within_scores(
            "scores", np.asarray(got.scores_NTS), scores, np.asarray(case.trace.scores)[b]
        )
        within("pattern", got.pattern_NTS, pattern, MODEL)
        within_largest("next boundary", out, expected, MODEL)
        own, *_ = reference_block(weights, changed, cfg)
        assert moved(out, own), "its own scales give something else"


@pytest.mark.parametrize("name,live", [("everything", False), ("qwen3", True)])
def test_held_scales_of_all_blocks(name, live):
    """Stacked, through the whole model, together with other edits; shared by a batch of them."""
    case = tiny.case(name)
    seen = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one for _, one in activations(case)))
    delta, made = vector(case, 1), at_scale(case, 0.0)
    edits = full(case, residual=[(1, 2, delta)], query=made, key=made, live=live)
    none = full(case, live=live)
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), none, edits)
    batch = batch.replace(blocks=batch.blocks.replace(frozen=seen))
    go = lambda e: forward(case.params, case.tokens, cfg=case.cfg, edits=e)
    logits, trace = jax.device_get(jax.vmap(go, in_axes=(batched_axes(batch),))(batch))
    within_largest("logits of the clean run", logits[0], case.logits)
    x = naive.f64(case.trace.boundaries[0])
    for b in range(tiny.L):
        x[2] += delta * (b == 1)
        weights, clean, _ = block_of(case, b)
        _, _, _, held = reference_block(weights, clean, case.cfg.block)
        x, scores, *_ = reference_block(weights, x, case.cfg.block, of_block(edits.blocks, b), held)
        within_scores("scores", trace.scores[1, b], scores, np.asarray(case.trace.scores)[b])
    within_largest("last boundary", trace.boundaries[1, -1], x, MODEL)
    assert moved(logits[1], run(case, edits)[0]), "its own scales give something else"
