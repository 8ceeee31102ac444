"""What needs no text: logits of features; and the norms' scales."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from scans import SAME, bundle_of, naive_sinks, rows
from tiny import within

from qkattr.features.logits import top_logits
from qkattr.features.norms import norm_scales
from qkattr.model.transformer import block, embed


@pytest.mark.parametrize("house", ["llama", "gpt2", "everything"])
def test_logits_are_the_models(house):
    bundle = bundle_of(house)
    params, w_dec = bundle.params, bundle.dictionaries[1].w_dec_MD
    weight = np.asarray(params.norm_final.weight, np.float64)
    unembed = params.embed_VD.T if params.unembed_DV is None else params.unembed_DV
    x = np.asarray(w_dec, np.float64)
    if bundle.config.block.norm == "layer":
        x = x - x.mean(1, keepdims=True)
    logits = 0.7 * (x * weight) @ np.asarray(unembed, np.float64)
    logits -= logits.mean(1, keepdims=True)
    tokens, values = top_logits(params, w_dec, n=5, scale=0.7, cfg=bundle.config)
    for f in range(len(x)):
        assert tokens[0, f].tolist() == np.argsort(-logits[f])[:5].tolist()
        assert tokens[1, f].tolist() == np.argsort(logits[f])[:5].tolist()
    for side in (0, 1):
        expected = np.take_along_axis(logits, tokens[side], 1)
        within("logits", values[side], expected, SAME, np.abs(logits).max())


@pytest.mark.parametrize("house", ["llama", "qwen3", "olmo2", "gpt2"])
def test_norm_scales_are_medians_over_positions(house):
    bundle = bundle_of(house)
    attn, q, k = [[[] for _ in range(tiny.L)] for _ in range(3)]
    last = []
    for row in rows():
        x = embed(bundle.params, row.astype(np.int32))
        for b in range(tiny.L):
            weights = tiny.block_weights(bundle.params, b)
            after, seen = block(weights, x, cfg=bundle.config.block)
            keep = ~naive_sinks(np.asarray(x))
            attn[b].append(np.asarray(seen.scale_attn_T)[keep])
            q[b].append(np.asarray(seen.scale_q_TN)[keep])
            k[b].append(np.asarray(seen.scale_k_SK)[keep])
            x = after
        x = np.asarray(x)[~naive_sinks(np.asarray(x))].astype(np.float64)
        x = x - x.mean(1, keepdims=True) if bundle.config.block.norm == "layer" else x
        last.append(1 / np.sqrt((x**2).mean(1) + bundle.config.block.eps))
    found = norm_scales(bundle, rows())
    for name, parts in (("attn", attn), ("q", q), ("k", k)):
        expected = np.stack([np.median(np.concatenate(part), axis=0) for part in parts])
        assert getattr(found, name).shape == expected.shape
        within(name, getattr(found, name), expected, SAME, np.abs(expected))
    within("final", found.final, np.median(np.concatenate(last)), SAME, found.final)
