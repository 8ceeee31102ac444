"""The `effects` measure: ablations against NumPy loops and `transformers`, derivatives against
float64 autodiff, and a linear model in which effects are all the truth there is."""

from __future__ import annotations

import dataclasses
import types

import editing
import folders
import frozen
import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import scipy.stats
import tiny
import torch
from tiny import within

import qkattr
from qkattr.config import LINEARISATIONS
from qkattr.experiments.ablations import (
    ABLATIONS,
    Ablations,
    clean_heads,
    without_key,
)
from qkattr.experiments.faithfulness import faithfulness
from qkattr.experiments.faithfulness.agreement import agreement, name_and_derivative
from qkattr.experiments.faithfulness.effects import PLACES, choose_places, measure_effects
from qkattr.experiments.rankings import (
    derivatives,
    head_measures,
    logit_effects,
    of_graph,
    place_measures,
)
from qkattr.model.edits import BlockEdits, Edits, PatternEdits
from qkattr.sharding import pad_tokens

LOST = 2e-4  # of the logits: float32 against float64, two runs and a difference
SAME = 2e-5  # the same arithmetic in other shapes, relative to the largest
DERIVATIVE = 1e-4  # of the largest: float32 through three blocks and a norm, against float64
IDS = [0, 40, 41, 42, 40, 41, 43]


def padded(params, cfg, saes=None):
    """A prompt, padded to its bucket."""
    ids = tiny.tokens()
    saes = tiny.dictionaries() if saes is None else saes
    return tiny.case_of(params, cfg, pad_tokens(ids), saes, n_real=len(ids))


def subject_of(case):
    """What the measures read of a subject."""
    bundle = types.SimpleNamespace(params=case.params, config=case.cfg)
    return types.SimpleNamespace(
        bundle=bundle, ids=tuple(int(i) for i in case.tokens[: tiny.T]), precision="highest",
        boundaries=jnp.asarray(case.trace.boundaries), components=case.components,
        padded=np.asarray(case.tokens), facts=case.cfg,
        logits=case.logits[tiny.T - 1],
    )  # fmt: skip


def tried_of(case):
    """A case as a subject, with its clean heads and the ablations of its likeliest token."""
    subject = subject_of(case)
    heads, token = clean_heads(subject), int(np.argmax(subject.logits))
    return subject, heads, Ablations(subject, heads, token)


HOUSES = ("llama", "gemma2", "everything")


@pytest.fixture(scope="module", params=HOUSES)
def tried(request):
    case = padded(*tiny.house(request.param))
    return case, *tried_of(case)


def edits_of(case, subject, ablation: str, b: int, n: int) -> Edits:
    """An ablation by the words of the docstring, for the NumPy model."""
    T, real = len(case.tokens), len(subject.ids)
    scale = np.ones((tiny.L, T, tiny.N), np.float32)
    add = np.zeros((tiny.L, T, tiny.N, tiny.H), np.float32)
    pattern = np.array(case.trace.patterns, np.float64)
    rows = np.zeros(pattern.shape[:3], bool)
    weights, x, _ = editing.block_of(case, b)
    seen = naive.run_block(weights, x, case.cfg.block)
    if ablation == "zero":
        scale[b, :, n] = 0
    elif ablation == "mean":
        own = np.stack([output(weights, seen, n, t) for t in range(T)])
        scale[b, 1:real, n] = 0
        add[b, 1:real, n] = own[1:real].mean(0)
    else:
        for t in range(1, T):  # position 0 is the sink
            keys = [s for s in range(1, t + 1) if seen.pattern[n, t, s] > 0]
            if (seen.pattern[n, t] > 0).sum() > 1:
                strongest = max(keys, key=lambda s: seen.pattern[n, t, s])
                pattern[b, n, t, strongest] = 0
                pattern[b, n, t] /= pattern[b, n, t].sum()
                rows[b, n, t] = True
    blocks = BlockEdits(patterns=PatternEdits(pattern, rows), head_scale_TN=scale, head_add_TNH=add)
    return Edits(blocks=blocks)


def output(weights, seen, n: int, t: int) -> np.ndarray:
    """A head's output before W_O, by hand."""
    k = n // naive.group_of(weights)
    beta = naive.norm_constant(weights.norm_attn, tiny.D)
    bias = 0 if weights.bv_KH is None else naive.f64(weights.bv_KH[k])
    values = [
        (seen.norm_attn[s] @ seen.x[s] + beta) @ naive.f64(weights.wv_DKH[:, k]) + bias
        for s in range(t + 1)
    ]
    return sum(seen.pattern[n, t, s] * value for s, value in enumerate(values))


def losses(case, subject, token: int, edits: Edits, others: str) -> tuple[float, float]:
    """What the token's logit and log probability lose, in NumPy."""

    def read(edits):
        logits = editing.reference_model(case, edits)[0][len(subject.ids) - 1]
        return logits[token] - logits.mean(), logits[token] - np.logaddexp.reduce(logits)

    if others == "frozen":
        held = edits.blocks.patterns
        where = np.where(held.rows_NT[..., None], held.pattern_NTS, case.trace.patterns)
        held = PatternEdits(where, np.ones_like(held.rows_NT))
        edits = dataclasses.replace(edits, blocks=dataclasses.replace(edits.blocks, patterns=held))
    return tuple(np.subtract(read(Edits()), read(edits)))


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablated_heads_lose_what_numpy_says(tried, ablation):
    case, subject, _, ablations = tried
    lost = ablations.of_heads()
    x = ABLATIONS.index(ablation)
    size = np.abs(np.asarray(subject.logits)).max()
    for b, n in ((0, 1), (1, 3), (2, 0)):
        edits = edits_of(case, subject, ablation, b, n)
        for others in ("frozen", "live"):
            expected = losses(case, subject, ablations.token, edits, others)
            got = [lost[f"{others} {read}"][x, b, n] for read in ("logit", "log_p")]
            within(f"{ablation} {others}", got, expected, LOST, size)
    assert all(np.abs(values[x]).max() > 100 * LOST for values in lost.values())


def test_masked_places_lose_what_numpy_says(tried):
    case, subject, _, ablations = tried
    places = np.array([[0, 1, 5, 2], [1, 3, 8, 8], [2, 0, 8, 7], [1, 0, 1, 0], [2, 2, 0, 0]])
    lost = ablations.of_places(places)
    size = np.abs(np.asarray(subject.logits)).max()
    for i, (b, n, t, s) in enumerate(places.tolist()):
        pattern = np.array(case.trace.patterns, np.float64)
        rows = np.zeros(pattern.shape[:3], bool)
        rows[b, n, t] = True
        if pattern[b, n, t].max() < 1:
            pattern[b, n, t, s] = 0
            pattern[b, n, t] /= pattern[b, n, t].sum()
        edits = Edits(blocks=BlockEdits(patterns=PatternEdits(pattern, rows)))
        for others in ("frozen", "live"):
            expected = losses(case, subject, ablations.token, edits, others)
            got = [lost[f"{others} {read}"][i] for read in ("logit", "log_p")]
            within(f"masked {others}", got, expected, LOST, size)
    assert np.abs(lost["live logit"][-1]) < LOST  # a query with one key keeps it


def test_a_zeroed_head_is_that_of_transformers(tmp_path):
    """A hook that takes the head out of what o_proj reads."""
    model, cfg, params = tiny.hf_params("gqa", tmp_path)
    ids = np.random.default_rng(1).integers(0, cfg.vocab, tiny.T).astype(np.int32)
    subject, _, ablations = tried_of(tiny.case_of(params, cfg, ids, (None,) * (tiny.L + 1)))
    token, lost = ablations.token, ablations.of_heads()
    read = lambda out: (out.logits[0, -1, token] - out.logits[0, -1].mean()).item()
    for b, n in ((0, 1), (1, 3), (2, 2)):
        layer = model.model.layers[b].self_attn.o_proj
        keep = torch.ones(layer.in_features)
        keep[n * cfg.head_dim : (n + 1) * cfg.head_dim] = 0
        hook = layer.register_forward_pre_hook(lambda _, args, keep=keep: (args[0] * keep,))
        with torch.no_grad():
            without = read(model(torch.tensor(ids)[None].long()))
            hook.remove()
            clean = read(model(torch.tensor(ids)[None].long()))
        size = np.abs(np.asarray(subject.logits)).max()
        within("transformers", lost["live logit"][0, b, n], clean - without, LOST, size)


# Derivatives --------------------------------------------------------------------------------------


def test_the_models_derivatives_are_finite_differences(tried):
    """In NumPy, of a head's output, patterns moving and held."""
    case, subject, heads, ablations = tried
    token, step = ablations.token, 1e-5
    g = derivatives(subject, heads, token)
    for b, n, t, h in ((0, 1, 4, 2), (2, 3, 8, 5)):
        for by in ("live", "held"):
            ends = []
            for sign in (1, -1):
                add = np.zeros((tiny.L, len(case.tokens), tiny.N, tiny.H))
                add[b, t, n, h] = sign * step
                held = None
                if by == "held":
                    clean = np.array(case.trace.patterns, np.float64)
                    held = PatternEdits(clean, np.ones(clean.shape[:3], bool))
                edits = Edits(blocks=BlockEdits(head_add_TNH=add, patterns=held))
                logits = editing.reference_model(case, edits)[0][tiny.T - 1]
                ends.append(logits[token] - logits.mean())
            expected = (ends[0] - ends[1]) / (2 * step)
            size = np.abs(np.asarray(g[by])).max()
            within(by, g[by][b, t, n, h], expected, DERIVATIVE, size)
        assert np.abs(g["live"] - g["held"]).max() > 100 * DERIVATIVE * size


def test_frozen_derivatives_are_autodiff_of_the_frozen_model():
    """In float64, of what a head adds at a place: its effect is that of `graph.effects`."""
    case = padded(*tiny.house("llama"))
    subject, heads, ablations = tried_of(case)
    token, n = ablations.token, tiny.T
    for linearisation in LINEARISATIONS:
        g = derivatives(subject, heads, token)
        found = logit_effects(subject, token, linearisation, heads=True)
        names = f"effect {linearisation}", f"derivative {linearisation}"
        empty = _no_graph(case)
        measures = place_measures(subject, heads, g, empty)
        size = np.abs(found.head).max()
        two = (np.asarray(case.trace.patterns) > 0).sum(-1, keepdims=True)[:, :, :n] > 1
        for name, expected in zip(names, (found.head, found.derivative), strict=True):
            within(name, measures[name], np.where(two, expected[:, 0, :, :n, :n], 0), SAME, size)
    b = 1
    above = np.asarray(logit_effects(subject, token).covector[b + 1, 0], np.float64)
    with jax.enable_x64(True):
        weights = tiny.block_weights(case.params, b)
        x = np.asarray(case.trace.boundaries[b], np.float64)
        made = frozen.frozen_block(weights, x, case.cfg.block, "jacobian")
        mask = frozen.of_head(2, tiny.N, len(x), len(x))
        _, vjp = jax.vjp(lambda x: made(x, only=mask), jnp.asarray(x))
        expected = (np.asarray(vjp(jnp.asarray(above))[0]) * x).sum()
    effect = head_measures(subject, heads, g, _no_graph(case))["effect jacobian"][b, 2]
    within("effect of a head", effect, expected, DERIVATIVE, np.abs(found.head).max())


def _no_graph(case):
    edges = types.SimpleNamespace(
        block=np.zeros(0, int), source=np.zeros(0, int), target=np.zeros(0, int),
        heads=np.zeros((0, case.cfg.n_heads)),
    )  # fmt: skip
    nodes = types.SimpleNamespace(position=np.zeros(0, int))
    return types.SimpleNamespace(
        edges=edges, nodes=nodes, head_influence=lambda: np.zeros((0, case.cfg.n_heads))
    )


def linear_case():
    """No norms, no MLP: with patterns held the model is linear in every head."""
    params, cfg = tiny.house("llama")
    blocks = dataclasses.replace(
        params.blocks, norm_attn=None, norm_mlp=None, w_down_FD=0 * params.blocks.w_down_FD
    )
    params = dataclasses.replace(params, blocks=blocks, norm_final=None)
    return padded(params, cfg)


def test_in_a_linear_model_effects_are_what_is_lost():
    case = linear_case()
    subject, heads, ablations = tried_of(case)
    g = derivatives(subject, heads, ablations.token)
    measures = head_measures(subject, heads, g, _no_graph(case))
    lost = ablations.of_heads()["frozen logit"]
    size = np.abs(lost).max()
    for by in (*LINEARISATIONS, "held"):
        for i, name in enumerate(("effect", "less mean", "masking")):
            said = measures[f"{name} {by}"]
            within(f"{name} {by}", said, lost[i], SAME, size)
            assert agreement(said.ravel(), lost[i].ravel(), 30) == dict(rank=1, sign=1, top=1)
    of_places = place_measures(subject, heads, g, _no_graph(case))
    places = choose_places({"effect": of_places["effect jacobian"]}, 20)
    masked = ablations.of_places(places)["frozen logit"]
    within("masking", of_places["masking jacobian"][tuple(places.T)], masked, SAME, size)
    # Live, attribution patching is another first order: patterns move.
    live = ablations.of_heads()["live logit"]
    assert np.abs(live - lost).max() > 0.01 * size


# What is kept and said ----------------------------------------------------------------------------


def test_a_masked_key_leaves_a_softmax_over_the_others():
    pattern = jnp.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    got = without_key(pattern, jnp.array([0, 0, -1]))
    np.testing.assert_allclose(got, [[0, 0.5, 0.5], [1, 0, 0], [0.2, 0.3, 0.5]])


def test_places_come_one_of_each_measure_in_turn():
    a, b = np.zeros((2, 1, 1, 3, 3))
    a[0, 0, 2], b[0, 0, 2] = [-3, 2, 1], [-9, 0, 5]
    got = choose_places(dict(a=a, b=b), 3)
    assert got.tolist() == [[0, 0, 2, 0], [0, 0, 2, 1], [0, 0, 2, 2]]


def test_agreement_is_that_of_scipy():
    rng = np.random.default_rng(0)
    lost = rng.normal(size=60)
    said = lost + rng.normal(size=60)
    got = agreement(said, lost, 30)
    assert got["rank"] == pytest.approx(scipy.stats.spearmanr(abs(said), abs(lost))[0])
    order = sorted(range(60), key=lambda i: -abs(lost[i]))
    assert got["sign"] == np.mean([said[i] * lost[i] > 0 for i in order[:30]])
    first = sorted(range(60), key=lambda i: -abs(said[i]))[:15]
    assert got["top"] == pytest.approx(len(set(first) & set(order[:15])) / 15)
    assert agreement(-said, lost, 30)["sign"] == pytest.approx(1 - got["sign"])


@pytest.mark.parametrize(
    "measure, said",
    [
        ("effect frozen-gate", ("effect", "frozen-gate")),
        ("less mean live", ("less mean", "live")),
        ("derivative jacobian", ("derivative", "jacobian")),
        ("|effect|", ("|effect|", "")),
        ("attention last", ("attention last", "")),
    ],
)
def test_measures_are_named_with_their_derivative(measure, said):
    assert name_and_derivative(measure) == said


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("effects")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_saes(root / "saes")
    return qkattr.load(root / "model", root / "saes")


def test_influence_and_loadings_by_place_add_up(small):
    result = qkattr.trace(small, IDS, qk=0)
    shape = (small.config.n_blocks, small.config.n_heads, len(IDS), len(IDS))
    influence, loading = of_graph(result.graph, shape)
    for source, target in ((2, 6), (4, 4), (0, 5)):
        found = result.head_loadings(source=source, target=target)
        np.testing.assert_allclose(influence[:, :, target, source], found.influence, atol=1e-9)
        np.testing.assert_allclose(loading[:, :, target, source], found.loadings, atol=1e-6)


def test_a_report_with_effects(small):
    prompts = [qkattr.subject(small, ids) for ids in (IDS, [*IDS[:-1], 44])]
    report = faithfulness(prompts, measures=("effects", "heads"), draws=4)
    rows = report.tables["effects"]
    assert len(rows) == 3 * 2 * 2 * (3 * 5 + 6) and all(row["rank"]["n"] == 2 for row in rows)
    assert len(report.tables["places"]) == 2 * 2 * (3 * 5 + 3)
    assert {row["others"] for row in report.tables["misled"]} == {"frozen", "live"}
    assert len(report.prompts[0]["effects"]["places"]["places"]) == PLACES
    assert {"influence", "loading", "effect", "effect_anywhere"} <= set(report.tables["heads"][0])
    said = [line for line in report.tables["failures"] if "influence ranks zeroed heads" in line]
    assert len(said) == 2 and "of 2 prompts" in said[0]


def test_a_prompt_of_one_token_has_no_effects(small):
    result = qkattr.trace(small, [0], qk=0)
    assert measure_effects(result.subject, result.graph) == {}
