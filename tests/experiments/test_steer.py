"""`steer` against the model run otherwise, against QK attributions, and against itself."""

from __future__ import annotations

import folders
import jax.numpy as jnp
import numpy as np
import pytest
from steering import (
    BLOCKS,
    CLEAN,
    KEY,
    PROMPT,
    QUERY,
    SAME,
    SCORE,
    features_at,
    only,
    p_top,
    vector_of,
)

import qkattr
from qkattr.errors import InputError
from qkattr.experiments import runs as experiment_runs
from qkattr.experiments.edits import at_scales
from qkattr.experiments.hydra import with_heads
from qkattr.experiments.runs import run_edits
from qkattr.experiments.steer import make_edits, patterns_of
from qkattr.kinds import Kind
from qkattr.model.edits import Edits, ResidualEdits
from qkattr.model.transformer import forward

# steer --------------------------------------------------------------------------------------------


def test_a_subject_and_a_result_agree(bundle, result, edits):
    asked = dict(scales=[0, 2.5], track=[29], query=-2)
    of_result = qkattr.steer(result, edits, **asked).to_json()
    of_subject = qkattr.steer(qkattr.subject(bundle, PROMPT), edits, **asked).to_json()
    assert of_result == of_subject
    texts = [
        f"{e.boundary}:{e.component}@{e.position}:{e.side}:"
        + ",".join(f"{layer}.{head}" for layer, head in e.heads)
        for e in edits
    ]
    assert qkattr.steer(result, texts, **asked).to_json() == of_result


@pytest.mark.parametrize("frozen, live", [(False, False), (True, False), (False, True)])
def test_scale_1_is_the_clean_run(result, edits, frozen, live):
    steering = qkattr.steer(result, edits, scales=[1, 0], freeze_others=frozen, live_scales=live)
    assert steering.kl[0] < CLEAN < 1e-4 < steering.kl[1]
    assert [t["id"] for t in steering.top[0]] == [t["id"] for t in steering.clean]
    clean = [p["probability"] for p in result.predictions[:5]]
    assert np.allclose([t["probability"] for t in steering.clean[:5]], clean, atol=SAME)


def test_scale_1_leaves_every_bit(result, edits):
    """Against no heads at all, in the same program."""
    arrays, reached, _ = make_edits(result.subject, edits)
    shape = reached.shape
    at = [
        run_edits(
            result.subject, with_heads(at_scales(arrays, [scale]), mask[None]), queries=[QUERY]
        )
        for scale, mask in ((1.0, reached), (0.0, np.zeros(shape, bool)), (0.0, reached))
    ]
    np.testing.assert_array_equal(at[0].logits, at[1].logits)
    log_p = [np.asarray(runs.log_p[0], np.float64) for runs in at]
    assert (np.exp(log_p[1]) * (log_p[1] - log_p[0])).sum() == 0
    assert (np.exp(log_p[1]) * (log_p[1] - log_p[2])).sum() > 1e-4


def test_scales_keep_their_order(result, edits):
    scales = [2, -1, 0.5, -1]
    steering = qkattr.steer(result, edits, scales=scales)
    assert steering.scales == scales
    assert steering.kl[1] == pytest.approx(steering.kl[3], abs=SAME)
    for i, scale in enumerate(scales):
        alone = qkattr.steer(result, edits, scales=[scale, 1])
        assert alone.kl[0] == pytest.approx(steering.kl[i], abs=SAME)
        assert alone.top[0][0]["id"] == steering.top[i][0]["id"]
        assert p_top(result, alone)[0] == pytest.approx(p_top(result, steering)[i], abs=SAME)


def test_more_scales_than_one_call_takes(result, edits, monkeypatch):
    scales = [-2, 3, 0.5, 0]
    at_once = qkattr.steer(result, edits, scales=scales)
    monkeypatch.setattr(experiment_runs, "MOST", 2)
    in_parts = qkattr.steer(result, edits, scales=scales)
    assert len(in_parts.kl) == len(in_parts.top) == len(in_parts.patterns) == 4
    np.testing.assert_allclose(in_parts.kl, at_once.kl, atol=SAME)


@pytest.mark.parametrize("side", ["key", "query"])
def test_frozen_scores_move_by_the_marginal(result, side):
    """In the first edited block, at the paper's own setting."""
    position = KEY if side == "key" else QUERY
    feature = features_at(result, 1, position)[0]
    edit = f"1:{feature}@{position}:{side}:1.0,1.3"
    scales = [-1.0, 3.0]
    steering = qkattr.steer(result, [edit], scales=scales)
    for head in (0, 3):
        qk = qkattr.qk_attribution(result, layer=1, head=head, query=QUERY, key=KEY)
        marginal = next(
            m["value"] for m in getattr(qk, f"{side}_marginals") if m["index"] == feature
        )
        for i, scale in enumerate(scales):
            moved = steering.scores[i][f"1.{head}"][KEY] - qk.score
            assert moved == pytest.approx((scale - 1) * marginal, abs=SCORE)
    assert not steering.live_scales


def test_live_scales_move_scores_otherwise(result, edits):
    frozen, live = (
        qkattr.steer(result, edits, scales=[3, 1], live_scales=live) for live in (False, True)
    )
    for head, scores in live.scores[0].items():
        assert abs(scores[KEY] - frozen.scores[0][head][KEY]) > 1e-3
    assert (frozen.live_scales, live.live_scales) == (False, True)


def test_freeze_others_holds_all_unedited_patterns(result, edits):
    chosen = only(edits, [(1, 1), (2, 0)])
    clean = np.asarray(patterns_of(result.subject))[:, :, QUERY, : len(result.tokens)]
    patterns = {}
    for frozen in (False, True):
        held = patterns_of(result.subject) if frozen else None
        arrays, reached, _ = make_edits(result.subject, chosen, held=held)
        assert np.argwhere(reached).tolist() == [[1, 1], [2, 0]]
        runs = run_edits(result.subject, at_scales(arrays, [-3.0, 1.0]), queries=[QUERY])
        patterns[frozen] = runs.patterns[0, :, :, 0]
    np.testing.assert_allclose(patterns[True][~reached], clean[~reached], atol=SAME)
    assert np.abs(patterns[True] - clean)[reached].max(-1).min() > 1e-3
    assert np.abs(patterns[False] - clean)[2, 1:].max() > 1e-3
    np.testing.assert_allclose(patterns[False][:2], patterns[True][:2], atol=SAME)

    live = qkattr.steer(result, chosen, scales=[1, -3])
    held = qkattr.steer(result, chosen, scales=[1, -3], freeze_others=True)
    assert held.rose == [] and held.freeze_others
    assert {row["head"] for row in live.rose} <= {"2.1", "2.2", "2.3"} and live.rose
    row = live.rose[0]
    layer, head = map(int, row["head"].split("."))
    assert row["attention"] == pytest.approx(clean[layer, head, KEY], abs=SAME)
    change = (patterns[False] - clean)[layer, head, KEY]
    assert row["change"] == pytest.approx(change, abs=SAME)


def test_keys_that_are_followed(result):
    """Those of key-side edits; else what the heads look at most, clean; else residual edits'."""
    key, query = f"1:error@{KEY}:key:1.1", f"1:error@{QUERY}:query:1.1"
    clean = np.asarray(patterns_of(result.subject))[1, :, QUERY]
    both = clean[1] + clean[2]
    assert int(clean[1].argmax()) != 0  # or any other choice could look right
    for edits, ablated, keys in (
        ([key, query, "1:error@2:residual"], (), [KEY]),
        ([query, "1:error@2:residual"], (), [int(clean[1].argmax())]),
        ([query], ((1, 2),), [int(both.argmax())]),
        ([], ((1, 2),), [int(clean[2].argmax())]),
        (["1:error@2:residual", "1:error@5:residual"], (), [2, 5]),
    ):
        # At the first scale the pattern is another than the clean one.
        steering = qkattr.steer(result, edits, scales=[-9, 1], ablate=ablated)
        assert steering.keys == keys
        assert all(0 <= row["attention"] <= 1 for row in steering.rose)


def test_ablation_is_a_zeroed_output_matrix(result, root, tmp_path):
    ablated = [(0, 2), (2, 1)]
    size = folders.HEAD_DIM

    def zero(tensors):
        for layer, head in ablated:
            out = tensors[f"model.layers.{layer}.self_attn.o_proj.weight"]
            out[:, head * size : (head + 1) * size] = 0

    folders.write_model(tmp_path / "zeroed", blocks=BLOCKS, tokenizer=True, edit=zero)
    zeroed = qkattr.load(tmp_path / "zeroed", root / "saes")
    expected = qkattr.trace(zeroed, PROMPT, qk=0).predictions[:5]
    with_an_edit = [f"1:error@{KEY}:key:*"]
    for edits, scales in (([], [0.0, 3.0]), (with_an_edit, [1.0, 1.0])):
        steering = qkattr.steer(result, edits, scales=scales, ablate=ablated)
        assert steering.ablated == ["0.2", "2.1"] and min(steering.kl) > 1e-3
        for top in steering.top:
            assert [t["id"] for t in top[:5]] == [p["id"] for p in expected]
            assert np.allclose(
                [t["probability"] for t in top[:5]],
                [p["probability"] for p in expected],
                atol=SAME,
            )
    assert steering.n_heads == len({*ablated, *((1, n) for n in range(4))})
    assert steering.share_of_heads == steering.n_heads / (BLOCKS * folders.HEADS)


@pytest.mark.parametrize("boundary", [0, 1, BLOCKS])
def test_a_residual_edit_is_an_added_vector(result, boundary):
    kind = Kind.ERROR if boundary else Kind.TOKEN
    position = KEY if boundary < BLOCKS else QUERY
    vector = vector_of(result, boundary, position, kind)
    scales = [2.5, 1.0]
    edit = f"{boundary}:{kind.label}@{position}:residual"
    steering = qkattr.steer(result, [edit], scales=scales)
    for i, scale in enumerate(scales):
        added = ResidualEdits(
            jnp.array([boundary]), jnp.array([position]), (scale - 1) * jnp.array(vector)[None]
        )
        bundle = result.subject.bundle
        logits, _ = forward(
            bundle.params,
            jnp.array(result.subject.ids),
            cfg=bundle.config,
            edits=Edits(residual=added),
        )
        p = np.exp(logits[-1] - np.logaddexp.reduce(np.asarray(logits[-1], np.float64)))
        for token in steering.top[i]:
            assert token["probability"] == pytest.approx(p[token["id"]], abs=SAME)
    assert (steering.kl[0] > 1e-4) and steering.kl[1] < CLEAN
    assert steering.edits[0]["heads"] == [] and steering.patterns == [{}] * 2
    assert steering.n_heads == 0


def test_several_positions(result):
    named = qkattr.steer(result, ["1:error@5,-1:key:1.1"], scales=[0, 1])
    one_by_one = [f"1:error@{t}:key:1.1" for t in (5, 9)]
    assert named.to_json() == qkattr.steer(result, one_by_one, scales=[0, 1]).to_json()
    assert [edit["position"] for edit in named.edits] == [5, 9]

    active = [set(features_at(result, 1, t)) for t in range(len(result.tokens))]
    feature = next(f for f in range(folders.WIDTH) if sum(f in at for at in active) == 2)
    everywhere = qkattr.steer(result, [f"1:{feature}@*:key:*"], scales=[0, 1])
    where = [t for t, at in enumerate(active) if feature in at]
    assert [edit["position"] for edit in everywhere.edits] == where
    each = [f"1:{feature}@{t}:key:*" for t in where]
    assert everywhere.kl == qkattr.steer(result, each, scales=[0, 1]).kl
    assert everywhere.kl[0] > 0


def test_edits_of_one_component_merge(result):
    two = qkattr.steer(result, ["1:error@3:key:1.1", "1:error@3:key:1.2,1.1"], scales=[0, 1])
    one = qkattr.steer(result, ["1:error@3:key:1.1,1.2"], scales=[0, 1])
    assert two.to_json() == one.to_json() and len(one.edits) == 1


def test_positions_by_name(result):
    texts = ['1:error@" hi#1":key:1.0', "1:error@ hi#1:key:1.0", "1:error@2:key:1.0"]
    said = [qkattr.steer(result, [text], scales=[0, 1]).to_json() for text in texts]
    assert said[0] == said[1] == said[2]


def test_tracked_tokens(bundle, result, edits):
    steering = qkattr.steer(result, edits, scales=[0, 1], track=["hi", 40])
    names = list(steering.tracked)
    assert names[0] == "hi" and len(names) >= 5 and len(set(names)) == len(names)
    assert bundle.tokenizer.token(40) == names[1]
    for i in (0, 1):
        best = steering.top[i][0]
        assert steering.tracked[best["token"]][i] == pytest.approx(best["probability"])


def test_a_table_of_it(result, edits):
    steering = qkattr.steer(result, edits, scales=[0, 2])
    frame = steering.to_pandas()
    assert list(frame.columns) == ["scale", "token", "probability", "kl"]
    assert len(frame) == 2 * len(steering.tracked)
    token = next(iter(steering.tracked))
    assert frame[frame.token == token].probability.tolist() == steering.tracked[token]


def test_what_is_no_subject_is_refused(bundle, result, edits):
    for given in (bundle, PROMPT, None):
        with pytest.raises(InputError, match="the first argument should be a subject, as"):
            qkattr.steer(given, edits)
    with pytest.raises(InputError, match="nothing to edit"):
        qkattr.steer(result, [])


# On the real model --------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_aunt_sally(sally):
    edits = qkattr.choose_edits(sally, source=" Sally", target=-1, heads=7, features=4)
    heads = {head for edit in edits for head in edit.heads}
    assert len(heads) == 7 and (23, 2) in heads and {edit.position for edit in edits} == {6}
    live = qkattr.steer(sally, edits, scales=[0, 1, 2])
    frozen = qkattr.steer(sally, edits, scales=[0, 1, 2], freeze_others=True)
    for steering, most in ((live, 0.3), (frozen, 0.05)):
        p = steering.tracked[" Sally"]
        assert p[0] < most and p[1] > 0.98 and p[2] > 0.98
        assert steering.top[0][0]["token"] != " Sally" and steering.kl[1] < 1e-6
