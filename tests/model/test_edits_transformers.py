"""Edits of the forward pass against the same edits made in `transformers` by hooks."""

from __future__ import annotations

import contextlib
import sys
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import real
import tiny
import torch
from editing import (
    LIVE,
    LOGITS,
    PATTERN,
    REAL_LOGITS,
    SIDES,
    Read,
    block_of,
    reads,
    run,
)
from tiny import within

from qkattr.kinds import Kind
from qkattr.model.edits import (
    BlockEdits,
    Edits,
)


@contextlib.contextmanager
def edited_transformers(model, made: dict[str, list[Read]], *, live: bool):
    """The same edits in `transformers`: queries and keys are un-grouped, and those of the edited
    heads projected and rotated anew by the model's own modules, from an edited residual stream.
    """
    source = sys.modules[type(model.model.layers[0].self_attn).__module__]
    read, rotary, layers = {}, {}, model.model.layers

    def keep_rotary(_, args, kwargs):
        rotary["at"] = kwargs["position_embeddings"]

    hooks = [layers[0].self_attn.register_forward_pre_hook(keep_rotary, with_kwargs=True)]
    for i, layer in enumerate(layers):
        keep_read = lambda _, args, i=i: read.update({i: args[0][0]})
        hooks.append(layer.input_layernorm.register_forward_pre_hook(keep_read))

    def project(module, side, x):
        w = module.q_proj if side == "query" else module.k_proj
        heads = w(x).view(1, len(x), -1, module.head_dim).transpose(1, 2)
        return source.apply_rotary_pos_emb(heads, heads, *rotary["at"])[0][0]

    def attention(module, query, key, value, mask, scaling, dropout=0.0, **_):
        i, group = module.layer_idx, module.num_key_value_groups
        norm, x = layers[i].input_layernorm, read[i]
        states = {"query": query.clone(), "key": key.repeat_interleave(group, 1)}
        for side, edits in made.items():
            here = [one for one in edits if one.block == i]
            for t, n in {(one.position, n) for one in here for n in one.heads}:
                edited = x.clone()
                for one in here:
                    if one.position == t and n in one.heads:
                        edited[t] += (one.scale - 1) * torch.tensor(one.vector)
                rms = (edited if live else x).pow(2).mean(-1, keepdim=True)
                normed = edited * torch.rsqrt(rms + norm.variance_epsilon) * norm.weight
                head = n if side == "query" else n // group
                states[side][0, n, t] = project(module, side, normed)[head, t]
        scores = states["query"] @ states["key"].transpose(2, 3) * scaling
        pattern = torch.softmax(scores if mask is None else scores + mask, -1)
        out = pattern @ value.repeat_interleave(group, 1)
        return out.transpose(1, 2).contiguous(), pattern

    with mock.patch.object(source, "eager_attention_forward", attention):
        yield
    for hook in hooks:
        hook.remove()


def check_transformers(model, case, made, tolerance, *, live) -> None:
    edits = lambda **sides: Edits(
        blocks=BlockEdits(
            **{side: reads(case.cfg, *sides.get(side, ())) for side in SIDES}, live_scales=live
        )
    )
    logits, trace = run(case, edits(**made))
    clean, _ = run(case, edits())
    with edited_transformers(model, made, live=live), torch.no_grad():
        out = model(torch.tensor(case.tokens)[None].long(), output_attentions=True)
    within("logits of transformers", logits, out.logits[0], tolerance)
    attentions = np.stack([a[0] for a in out.attentions])
    within("patterns of transformers", trace.patterns, attentions, PATTERN)
    assert np.abs(logits - clean).max() > 100 * tolerance


LIVE_TOO = ("gqa", "biases", "mistral")  # the norm, all that this changes, is that of all models


@pytest.mark.parametrize(
    "name,live", [(name, False) for name in tiny.HF_MODELS] + [(name, True) for name in LIVE_TOO]
)
def test_equals_transformers(name, live, tmp_path):
    model, cfg, params = tiny.hf_params(name, tmp_path)
    ids = np.random.default_rng(1).integers(0, cfg.vocab, 13).astype(np.int32)
    case = tiny.Case(params, cfg, ids, None, None, None)
    rng = np.random.default_rng(2)
    size = [1.0, 1.5, 2.0]  # about the residual stream's, at boundaries 0 to 2
    place = lambda b, t, scale, *heads: Read(
        b, t, np.asarray(size[b] * rng.normal(size=cfg.d_model), np.float32), scale, heads
    )
    made = dict(
        query=[
            place(0, 5, 3.0, 1), place(1, 9, 0.0, 0, 3), place(1, 9, 2.0, 3), place(2, 12, -1.0, 2)
        ],
        key=[
            place(0, 3, -1.0, 0, 1), place(1, 8, 0.0, 3), place(2, 11, 3.0, 2), place(2, 0, 2.0, 1)
        ],
    )  # fmt: skip
    check_transformers(model, case, made, LOGITS, live=live)


# The real model -----------------------------------------------------------------------------------


def feature(case, b: int, t: int, rank: int = 0) -> np.ndarray:
    """The SAE feature of a position whose component is the largest, or the next ones."""
    parts = block_of(case, b)[2]
    slots = np.flatnonzero(np.asarray(parts.kind[t]) == Kind.FEATURE)
    vectors = np.asarray(parts.at(jnp.full(len(slots), t), jnp.asarray(slots)))
    return vectors[np.argsort(-np.linalg.norm(vectors, axis=1))[rank]]


@pytest.mark.slow
@LIVE
def test_real_model_equals_transformers(bundle, live):
    """SAE features of both Aunts and of Sally, scaled in some heads' queries and keys."""
    case = real.case(bundle, "sally")
    sally = next(i for i, t in enumerate(case.tokens) if bundle.tokenizer.token(int(t)) == " Sally")
    last, every = len(case.tokens) - 1, tuple(range(case.cfg.n_heads))
    with_sae = [b for b, one in enumerate(bundle.dictionaries[:-1]) if one is not None]
    low, middle, high = (with_sae[i * (len(with_sae) - 1) // 2] for i in range(3))
    key = [
        Read(b, sally, feature(case, b, sally, rank), scale, heads)
        for b, rank, scale, heads in [
            (low, 0, 0.0, (0, 4)), (middle, 0, 0.0, every), (middle, 1, -1.0, (5,)),
            (high, 0, 0.0, every),
        ]
    ]  # fmt: skip
    query = [
        Read(b, last, feature(case, b, last), scale, heads)
        for b, scale, heads in [(low, 2.0, (1, 8)), (middle, 0.0, every), (high, -1.0, (2, 3))]
    ]
    made = dict(query=query, key=key)
    model = real.transformers_model()
    check_transformers(model, case, made, REAL_LOGITS, live=live)
