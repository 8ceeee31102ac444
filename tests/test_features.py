"""Feature cards: the scan against a loop, AUC against Mann-Whitney's count of pairs, files, CLI."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import re

import folders
import jax
import jsonschema
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType
from tiny import within

import qkattr
from qkattr.cli.main import main
from qkattr.errors import InputError
from qkattr.export.feature_json import export_features, feature_json, feature_number
from qkattr.features import Cards, ScanConfig, make_cards, with_cards
from qkattr.features.keep import priority
from qkattr.features.labels import FEWEST, NEVER, Half, choose, label_features, measure
from qkattr.features.logits import top_logits
from qkattr.features.norms import norm_scales
from qkattr.features.scan import held_out, scan
from qkattr.features.seen import BINS
from qkattr.features.views import NEAR, View, views_of
from qkattr.load.bundle import Bundle
from qkattr.model.forward import block, embed, forward
from qkattr.sharding import make_mesh, shard
from qkattr.sources.dictionary import activations

#: Float32, batched in another way than the loop.
SAME = 2e-5
#: An activation as a level of its feature's largest: half a level, 1/255 of it or 1/15.
LEVEL, COARSE = 0.5 / 255 + 1e-4, 0.5 / 15 + 1e-4
#: Histogram counts are kept to 3 %.
COUNT = 0.03
#: Shares of at most a few thousand positions, as float32 and as float64.
EXACT = 1e-6

N_ROWS, LENGTH = 37, 12
CONFIG = ScanConfig(top=3, samples=16, shown=4, before=3, after=2, batch=5)


def bundle_of(house: str = "llama", dictionaries=None) -> Bundle:
    params, config = tiny.house(house)
    return Bundle(
        config=config,
        read_params=lambda: params,
        tokenizer=None,
        dictionaries=tiny.dictionaries() if dictionaries is None else dictionaries,
        model="models/tiny",
        saes="saes",
        model_hash="model",
        saes_hash="saes",
    )


@functools.cache
def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = rng.integers(1, tiny.V, (N_ROWS, LENGTH))
    rows[:, 0] = 0
    return rows


def naive_sinks(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=-1)
    median = np.sort(norm[1:])[(len(norm) - 2) // 2]
    return (np.arange(len(x)) == 0) | (norm > 10 * median)


@functools.cache
def naive(house: str = "llama") -> dict[int, np.ndarray]:
    """Every activation `[rows, T, M]` of each boundary, 0 at sinks; row by row."""
    bundle = bundle_of(house)
    found = {b: [] for b, d in enumerate(bundle.dictionaries) if d is not None}
    for row in rows():
        _, trace = forward(bundle.params, row.astype(np.int32), cfg=bundle.config)
        for b, parts in found.items():
            x = np.asarray(trace.boundaries[b])
            a = np.asarray(activations(bundle.dictionaries[b], x))
            parts.append(np.where(naive_sinks(x)[:, None], 0, a))
    return {b: np.stack(parts) for b, parts in found.items()}


@functools.cache
def scanned():
    return scan(bundle_of(), rows(), config=CONFIG)


def same_scans(a, b, *, tolerance: float | None = None) -> None:
    """Equal to the bit, or within a tolerance where sums may add up in another order."""
    leaves = (jax.tree.leaves((scan.seen, scan.sinks)) for scan in (a, b))
    for x, y in zip(*leaves, strict=True):
        if tolerance is None or not np.issubdtype(x.dtype, np.floating):
            np.testing.assert_array_equal(x, y)
        else:
            finite = np.isfinite(x)
            np.testing.assert_array_equal(finite, np.isfinite(y))
            within("scan", y[finite], x[finite], tolerance, np.abs(x[finite]).max())


# The scan


def test_counts_sums_and_histograms_are_a_loops():
    seen, every = scanned().seen, naive()
    held = np.arange(N_ROWS) * 8 // N_ROWS % 2 == 1
    np.testing.assert_array_equal(held, held_out(N_ROWS))
    assert set(seen) == {1, 3}
    for b, a in every.items():
        assert (a > 0).any((0, 1)).sum() > 20
        counts = [(a[~held] > 0).sum((0, 1)), (a[held] > 0).sum((0, 1))]
        np.testing.assert_array_equal(seen[b].count, counts)
        within("sums", seen[b].total, a.sum((0, 1)), SAME, a.sum((0, 1)).max())
        for feature in range(a.shape[-1]):
            values = a[..., feature][a[..., feature] > 0].astype(np.float64)
            bins = np.floor(2 * np.log2(values)).astype(int) + BINS // 2
            expected = np.bincount(bins, minlength=BINS)
            np.testing.assert_array_equal(seen[b].histogram[feature], expected)


def test_top_contexts_and_their_windows_are_a_loops():
    for b, a in naive().items():
        top = scanned().seen[b].top
        for feature in range(a.shape[-1]):
            values = a[..., feature].ravel()
            order = [p for p in np.argsort(-values, kind="stable")[: CONFIG.top] if values[p] > 0]
            n = len(order)
            assert top.place[feature, :n].tolist() == order and (top.place[feature, n:] == -1).all()
            within("top", top.value[feature, :n], values[order], SAME, a.max())
            for c, place in enumerate(order):
                row, t = divmod(int(place), LENGTH)
                around = [
                    a[row, s, feature] if 0 <= s < LENGTH else 0
                    for s in range(t - CONFIG.before, t + CONFIG.after + 1)
                ]
                within("window", top.window[feature, c], around, SAME, a.max())


def test_the_sample_is_of_the_active_places_by_their_hash():
    chance = np.asarray(priority(np.arange(N_ROWS * LENGTH, dtype=np.int32)))
    full = 0
    for b, a in naive().items():
        sample, width = scanned().seen[b].sample, a.shape[-1]
        for split, held in enumerate((~held_out(N_ROWS), held_out(N_ROWS))):
            for feature in range(width):
                active = np.flatnonzero(((a[..., feature] > 0) & held[:, None]).ravel())
                expected = active[np.argsort(-chance[active], kind="stable")][: CONFIG.samples]
                full += len(active) > CONFIG.samples
                got = sample.place[split * width + feature]
                assert got[: len(expected)].tolist() == expected.tolist()
                assert (got[len(expected) :] == -1).all()
    assert full > 10


def test_priorities_are_as_good_as_random():
    chance = np.asarray(priority(np.arange(100_000, dtype=np.int32)))
    assert 0 <= chance.min() and chance.max() < 1
    counts = np.histogram(chance, bins=50, range=(0, 1))[0]
    chi_square = ((counts - 2000.0) ** 2 / 2000).sum()
    assert chi_square < 90  # 49 degrees of freedom: 1 in 3,000
    assert abs(np.corrcoef(chance[:-1], chance[1:])[0, 1]) < 0.01


def test_batches_do_not_matter():
    other = scan(bundle_of(), rows(), config=dataclasses.replace(CONFIG, batch=16))
    same_scans(scanned(), other, tolerance=SAME)


def test_more_active_features_than_slots_are_not_lost():
    dense = tiny.dictionary(7, activation="relu", width=150)
    bundle = bundle_of(dictionaries=(None, None, dense, None))
    found = scan(bundle, rows()[:9], config=CONFIG).seen[2]
    count = np.zeros(150, int)
    most = 0
    for row in rows()[:9]:
        _, trace = forward(bundle.params, row.astype(np.int32), cfg=bundle.config)
        x = np.asarray(trace.boundaries[2])
        a = np.asarray(activations(dense, x))[~naive_sinks(x)] > 0
        count, most = count + a.sum(0), max(most, a.sum(1).max())
    assert most > 64  # the slots that a scan begins with
    np.testing.assert_array_equal(found.count.sum(0), count)


class Stopped(Exception):
    pass


def test_an_interrupted_scan_resumes_and_ends_the_same(tmp_path):
    done = []

    def stop(stage, share):
        done.append(share)
        if len(done) == 5:
            raise Stopped

    how = dict(config=CONFIG, folder=tmp_path / "state", every=2)
    with pytest.raises(Stopped):
        scan(bundle_of(), rows(), progress=stop, **how)
    carried_on = []
    resumed = scan(bundle_of(), rows(), progress=lambda _, share: carried_on.append(share), **how)
    assert len(carried_on) == 8 - 4  # of 8 batches the first 4 were kept
    same_scans(scanned(), resumed)


def test_the_state_of_another_scan_is_refused(tmp_path):
    how = dict(folder=tmp_path, every=1)
    scan(bundle_of(), rows(), config=CONFIG, **how)
    with pytest.raises(InputError, match="another scan"):
        scan(bundle_of(), rows()[:-1], config=CONFIG, **how)
    other = dataclasses.replace(bundle_of(), saes_hash="other")
    with pytest.raises(InputError, match="another scan"):
        scan(other, rows(), config=CONFIG, **how)
    path = tmp_path / "scan.npz"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="damaged"):
        scan(bundle_of(), rows(), config=CONFIG, **how)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_equals_unsharded(kind):
    if kind == "auto":
        mesh = make_mesh(4, 2)
    else:
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    bundle, config = bundle_of(), dataclasses.replace(CONFIG, batch=8)
    params, dictionaries = shard((bundle.params, bundle.dictionaries), mesh)
    placed = dataclasses.replace(bundle, read_params=lambda: params, dictionaries=dictionaries)
    with jax.set_mesh(mesh):
        found = scan(placed, rows(), config=config, mesh=mesh)
    same_scans(scanned(), found, tolerance=SAME)


@pytest.mark.parametrize(
    "given,said",
    [
        (np.zeros((3, 5), int), "at least 8 rows"),
        (np.zeros(9, int), r"shape \[9\]"),
        (np.zeros((9, 5)), "float64"),
        (np.zeros((9, 500), int), "9 rows of 500"),
        (np.full((9, 5), 99), r"99\.\.99"),
        (np.full((9, 5), -1), r"-1\.\.-1"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(given, said):
    with pytest.raises(InputError, match=said):
        make_cards(bundle_of(), given)
    with pytest.raises(InputError, match="without SAEs"):
        scan(dataclasses.replace(bundle_of(), dictionaries=None), rows())


# Weights


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


# Labels

WORDS = [
    *(" aunt", " Aunt", " uncle", " Sally", " Bob", " the", " of", " opposite", "ing", " 12"),
    *(".", ",", "\n", ' "', " singing", " walking", "un", " and", "Ω", " ("),
]
TEXTS = dict(enumerate(["<s>", *WORDS]))
ID = {text: i for i, text in TEXTS.items()}


@functools.cache
def corpus() -> np.ndarray:
    """Rows of words; now and then a phrase."""
    rng = np.random.default_rng(3)
    rows = rng.integers(1, len(TEXTS), (80, 32))
    rows[:, 0] = 0
    for row in rows[::2]:
        at = rng.integers(1, 28)
        row[at : at + 2] = ID[" opposite"], ID[" of"]
    return rows


@functools.cache
def views() -> list[View]:
    return views_of(corpus(), TEXTS)


def strength(place: np.ndarray) -> np.ndarray:
    """An activation for each place, the same for every feature."""
    return np.random.default_rng(9).uniform(0.1, 1, corpus().size)[place]


def halves(active: np.ndarray, keep: np.ndarray, sampled: int | None = None) -> tuple[Half, Half]:
    """active: `[M, n, T]`. All active places of each half, or the first of a shuffle."""
    held, rng = held_out(len(keep)), np.random.default_rng(5)
    made = []
    for of in (~held, held):
        places = [np.flatnonzero((a & keep & of[:, None]).ravel()) for a in active]
        counts = np.array([len(p) for p in places])
        places = [rng.permutation(p)[:sampled] for p in places]
        padded = np.full((len(active), max(map(len, places))), -1)
        for f, p in enumerate(places):
            padded[f, : len(p)] = p
        value = strength(padded)
        made.append(Half(padded, np.where(padded < 0, 0, value), counts, keep & of[:, None]))
    return made[0], made[1]


def random_activity() -> tuple[np.ndarray, np.ndarray]:
    """Features of several densities that depend on tokens, in part; some positions are sinks."""
    rng, rows = np.random.default_rng(4), corpus()
    lift = rng.uniform(0, 4, (12, len(TEXTS)))
    chance = np.linspace(0.01, 0.4, 12)[:, None, None] * lift[:, rows] / 2
    keep = rng.random(rows.shape) > 0.02
    keep[:, 0] = False
    return rng.random(chance.shape) < chance, keep


def holds(view: View, ids: list[int], row: int, t: int) -> bool:
    return bool(set(ids) & set(view.ids[row * 32 + t, int(view.near) :].tolist()))


def mann_whitney(view: View, ids: list[int], active: np.ndarray, half: Half) -> float:
    """Pairs of an activating and another position: won, or half won where the rule says the same
    of both."""
    told = {True: [], False: []}
    for row, t in zip(*np.nonzero(half.keep), strict=True):
        told[bool(active[row, t])].append(holds(view, ids, row, t))
    won = sum((p > n) + 0.5 * (p == n) for p in told[True] for n in told[False])
    return won / (len(told[True]) * len(told[False]))


@pytest.mark.parametrize("number", range(len(views())))
def test_auc_is_mann_whitneys(number):
    view, (active, keep) = views()[number], random_activity()
    choosing, held = halves(active, keep)
    top = np.random.default_rng(6).integers(0, len(TEXTS), (12, 8))
    keys = np.sort((np.arange(12)[:, None] * view.n_ids + top + 1).ravel())
    allowed = keys if view.says else None
    ids, auc = choose(view, choosing, view.base(choosing.keep), allowed=allowed)
    held_auc = measure(view, ids, held, view.base(held.keep))
    ruled = np.flatnonzero(np.isfinite(auc))
    shown = view.base(keep)[1:]
    if shown.max(initial=0) in (0, keep.sum()):  # the view says the same everywhere
        assert len(ruled) == 0
        return
    assert len(ruled) > 0
    for f in ruled[:3]:
        rule = [i for i in ids[f].tolist() if i >= 0]
        assert not view.says or set(rule) <= set(top[f] + 1)
        assert abs(auc[f] - mann_whitney(view, rule, active[f], choosing)) < EXACT
        assert abs(held_auc[f] - mann_whitney(view, rule, active[f], held)) < EXACT


def test_auc_of_a_sample_is_near_that_of_all():
    active, keep = random_activity()
    _, every = halves(active, keep)
    _, some = halves(active, keep, sampled=60)
    view = views()[0]
    ids = np.tile(np.array([[1, 2]]), (12, 1))
    base = view.base(every.keep)
    exact, sampled = (measure(view, ids, half, base) for half in (every, some))
    assert (every.active > 60).any()
    standard_error = 0.25 / np.sqrt(60)
    assert np.abs(exact - sampled).max() < 4 * standard_error
    small = every.active <= 60
    np.testing.assert_array_equal(exact[small], sampled[small])


def test_a_rule_of_one_id_is_the_best_one():
    active, keep = random_activity()
    choosing, _ = halves(active, keep)
    view = dataclasses.replace(views()[0], most=1)
    ids, auc = choose(view, choosing, view.base(choosing.keep))
    for f in range(4):
        each = [mann_whitney(view, [i], active[f], choosing) for i in range(1, view.n_ids)]
        assert abs(max(each) - auc[f]) < EXACT and abs(each[ids[f, 0] - 1] - auc[f]) < EXACT


def test_views_look_back_only():
    """Other tokens after a position change nothing there, but for what a feature says."""
    other = corpus().copy()
    other[:, 20:] = np.roll(other[:, 20:], 1, axis=0)
    for view, changed in zip(views(), views_of(other, TEXTS), strict=True):
        before, after = (v.ids.reshape(80, 32, -1)[:, :20] for v in (view, changed))
        before, after = (x[:, :19] if view.says else x for x in (before, after))
        if view.n_ids == changed.n_ids and view.group is None:
            known = [view.phrase([i]) == changed.phrase([i]) for i in range(1, view.n_ids)]
            if all(known):
                np.testing.assert_array_equal(before, after)


def planted() -> dict[str, np.ndarray]:
    """Where features that a person could name are active."""
    rows, rng = corpus(), np.random.default_rng(8)
    is_ = lambda *texts: np.isin(rows, [ID[text] for text in texts])
    after = lambda mask, by=1: np.pad(mask, ((0, 0), (by, 0)))[:, : rows.shape[1]]
    before = np.pad(is_(" Bob")[:, 1:], ((0, 0), (0, 1)))
    aunt = is_(" aunt", " Aunt")
    near = np.any([after(is_(" uncle"), by) for by in range(1, NEAR + 1)], axis=0)
    return {
        "the word 'aunt'": aunt,
        "the token ' Aunt'": is_(" Aunt"),
        "the word 'aunt' / 'uncle'": aunt | is_(" uncle"),
        "numbers": is_(" 12"),
        "after 'sally'": after(is_(" Sally")),
        "after 'opposite of'": after(is_(" opposite"), 2) & after(is_(" of")),
        "the end of 'opposite of'": after(is_(" opposite")) & is_(" of"),
        "words ending in '-ing'": is_(" singing", " walking"),
        "says ' Bob'": before,
        "the first 8 tokens of a text": np.broadcast_to(np.arange(32) < 8, rows.shape),
        "shortly after 'uncle'": near,
        "unclear": rng.random(rows.shape) < 0.2,
        "rare": (np.arange(rows.size) % 1200 == 5).reshape(rows.shape),
        NEVER: np.zeros(rows.shape, bool),
    }


def test_labels_say_what_was_planted():
    found = planted()
    keep = np.ones(corpus().shape, bool)
    keep[:, 0] = False
    choosing, held = halves(np.stack(list(found.values())), keep)
    top = np.full((len(found), 8), ID[" Bob"])
    examples = [[TEXTS[i] for i in corpus()[a & keep][:3]] for a in found.values()]
    tokens = np.arange(len(TEXTS))
    labels = label_features(views(), choosing, held, top, examples, tokens)
    for f, expected in enumerate(found):
        said = set(re.findall("'.*?'", labels.text[f]))
        if expected in ("unclear", "rare"):
            assert labels.text[f].startswith(f"{expected}; e.g. '")
        elif "numbers" == expected:  # the word '12' is as good, and simpler
            assert labels.text[f] in ("numbers", "the word '12'")
        elif "/" in expected or "ending" in expected:
            assert said >= set(re.findall("'.*?'", expected)) or "singing" in labels.text[f]
        else:
            assert labels.text[f] == expected
        every = list(found.values())[f] & held.keep
        assert labels.n[0, f] == every.sum()
        measured = labels.n[:, f] >= FEWEST if expected not in ("rare", NEVER) else [False] * 2
        np.testing.assert_array_equal(np.isfinite(labels.auc[:, f]), measured)
        if measured[0] and expected != "unclear":
            assert labels.auc[0, f] > 0.95


def test_a_rule_for_strong_activations_says_so():
    """Faint anywhere, strong on one word."""
    rows, rng = corpus(), np.random.default_rng(11)
    uncle, faint = rows == ID[" uncle"], rng.random(rows.shape) < 0.4
    active = (uncle | faint)[None]
    value = np.where(uncle, 5.0, 1.0).ravel()
    keep = np.ones(rows.shape, bool)
    choosing, held = (
        dataclasses.replace(h, value=np.where(h.place < 0, 0, value[h.place]))
        for h in halves(active, keep)
    )
    level = choosing.strong_level()
    assert level[0] == np.quantile(value[choosing.place[0]], 0.8, method="inverted_cdf") == 1
    examples = [[" uncle"]]
    top = np.zeros((1, 8), int)
    labels = label_features(views(), choosing, held, top, examples, np.arange(len(TEXTS)))
    strong = held.above(level)
    is_strong = active[0] & (value.reshape(rows.shape) > level[0])
    rule = [i for i in range(1, views()[0].n_ids) if views()[0].phrase([i]) == "the word 'uncle'"]
    expected = [mann_whitney(views()[0], rule, of, held) for of in (active[0], is_strong)]
    assert labels.text[0] == "the word 'uncle' (when strong)"
    within("AUC", labels.auc[:, 0], expected, EXACT)
    assert labels.n[:, 0].tolist() == [held.n[0], strong.n[0]]


def test_labels_of_hostile_tokens_are_one_line():
    texts = {i: folders.HOSTILE[i % len(folders.HOSTILE)] + str(i) for i in TEXTS}
    active = corpus() == 5
    keep = np.ones(corpus().shape, bool)
    label = label_features(
        views_of(corpus(), texts), *halves(active[None], keep), np.zeros((1, 8), int), [[]],
        np.arange(len(TEXTS)),
    ).text[0]  # fmt: skip
    assert label.isprintable() and len(label) < 100


# Cards and files


@functools.cache
def cards() -> Cards:
    return make_cards(bundle_of(), rows(), text="rows", config=CONFIG)


def test_a_card_is_what_a_loop_finds():
    checked = 0
    for b, a in naive().items():
        for f in range(a.shape[-1]):
            card, values = cards().card(b, f), a[..., f]
            count = (values > 0).sum()
            assert (card.boundary, card.index, card.count) == (b, f, count)
            assert card.density == pytest.approx(count / (N_ROWS * (LENGTH - 1)), rel=EXACT)
            assert card.max == pytest.approx(values.max(), rel=SAME)
            mean = values.sum() / max(count, 1)
            within("mean", card.mean, mean, LEVEL, max(values.max(), 1e-9))
            assert sum(n for *_, n in card.histogram) == pytest.approx(count, rel=COUNT, abs=3)
            for low, high, n in card.histogram[1:]:
                inside = ((values >= low) & (values < high)).sum()
                assert n == pytest.approx(inside, abs=COUNT * (1 + inside) + 0.5)
            for e in card.examples:
                start = e.position - e.at
                expected = values[e.row, start : start + len(e.tokens)]
                assert e.tokens == [str(i) for i in rows()[e.row, start : start + len(e.tokens)]]
                within("own", e.activation, expected[e.at], LEVEL, values.max())
                within("window", e.activations, expected, COARSE, values.max())
                checked += 1
            top = [e for e in card.examples if e.quantile == "Top"]
            assert len(top) == min(CONFIG.top, count)
    assert checked > 200


def test_quantile_examples_are_near_their_quantile():
    several, ranks = 0, {name: [] for name in ("0.9", "0.7", "0.5", "0.3", "0.1")}
    for b, a in naive().items():
        for f in range(cards().width(b)):
            examples = [e for e in cards().card(b, f).examples if e.quantile != "Top"]
            several += len(examples) == 5
            values = [e.activation for e in examples]
            assert values == sorted(values, reverse=True)
            active = np.sort(a[..., f][a[..., f] > 0])
            for e in examples:
                rank = np.searchsorted(active, e.activation) / len(active)
                ranks[e.quantile.removeprefix("Quantile ")].append(rank)
    assert several > 10
    for name, found in ranks.items():  # one of eight sampled: 0.15 is its standard error
        assert abs(np.mean(found) - float(name)) < 0.1


def test_cards_come_back_from_their_file(tmp_path):
    path = cards().save(tmp_path / "sub" / "cards.npz")
    back = Cards.open(path)
    for field in dataclasses.fields(Cards):
        was, now = getattr(cards(), field.name), getattr(back, field.name)
        if field.name == "norms":
            jax.tree.map(np.testing.assert_array_equal, vars(was), vars(now))
        elif isinstance(was, np.ndarray):
            np.testing.assert_array_equal(was, now)
        else:
            assert was == now
    assert back.card(3, 7) == cards().card(3, 7)
    assert back.label(3, 7) == back.labels()[3, 7] != ""
    assert back.label(2, 0) == back.label(3, 999) == back.label(3, -1) == ""
    assert len(back.labels()) == len(back) == 40 + 56
    assert back.labels([(1, 2), (2, 2)]) == {(1, 2): back.label(1, 2)}


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = cards().save(tmp_path / "cards.npz")
    whole = path.read_bytes()

    def refused(content: bytes | None, said: str):
        path.write_bytes(content or b"")
        with pytest.raises(InputError, match=said):
            Cards.open(path)

    refused(b"", "no feature cards")
    refused(whole[: len(whole) // 2], "no feature cards")
    refused(b"hello", "no feature cards")

    def with_columns(**changed) -> bytes:
        path.write_bytes(whole)
        with np.load(path) as data:
            columns = {name: data[name] for name in data.files} | changed
        with path.open("wb") as file:
            np.savez(file, **{k: v for k, v in columns.items() if v is not None})
        return path.read_bytes()

    header = json.dumps({"schema": 99}).encode()
    refused(with_columns(header=np.frombuffer(header, np.uint8)), "schema 99")
    refused(with_columns(auc=None), "damaged feature cards")
    refused(with_columns(auc=np.zeros((3, 2), np.uint8)), "damaged feature cards")
    refused(with_columns(context_row=np.full((96, 8), 10**6)), "outside the rows")
    with pytest.raises(InputError, match="no such file"):
        Cards.open(tmp_path / "absent.npz")


#: FORMATS.md section 1.5.
SCHEMA = {
    "type": "object",
    "required": ["index", "examples_quantiles", "top_logits", "bottom_logits"],
    "properties": {
        "index": {"type": "integer"},
        "top_logits": {"type": "array", "items": {"type": "string"}},
        "bottom_logits": {"type": "array", "items": {"type": "string"}},
        "examples_quantiles": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["quantile_name", "examples"],
                "properties": {
                    "quantile_name": {"type": "string"},
                    "examples": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": [
                                "tokens",
                                "tokens_acts_list",
                                "train_token_ind",
                                "is_repeated_datapoint",
                            ],
                            "properties": {
                                "tokens": {"type": "array", "items": {"type": "string"}},
                                "tokens_acts_list": {
                                    "type": "array",
                                    "items": {"type": "number"},
                                },
                                "train_token_ind": {"type": "integer"},
                                "is_repeated_datapoint": {"type": "boolean"},
                            },
                        },
                    },
                },
            },
        },
        "act_min": {"type": "number"},
        "act_max": {"type": "number"},
        "histogram": {"type": "array", "items": {"type": "number"}},
        "quantile_values": {"type": "array", "items": {"type": "number"}},
        "activation_frequency": {"type": "number"},
    },
}


def test_feature_json_is_of_the_common_format():
    names = set()
    for f in range(cards().width(1)):
        value = json.loads(json.dumps(feature_json(cards().card(1, f))))
        jsonschema.validate(value, SCHEMA)
        for quantile in value["examples_quantiles"]:
            names.add(quantile["quantile_name"])
            for example in quantile["examples"]:
                assert len(example["tokens"]) == len(example["tokens_acts_list"])
                assert example["tokens_acts_list"][example["train_token_ind"]] > 0
    assert "Top" in names and len(names) == 6


def test_feature_files_are_found_by_the_graphs_numbers(tmp_path):
    folder = export_features(cards(), tmp_path, [3])
    assert folder == tmp_path / "features" / "tiny" and len(list(folder.iterdir())) == 56
    layer, index = 2, 9
    number = (layer + index) * (layer + index + 1) // 2 + index
    assert feature_number(3, 9) == number
    assert json.loads((folder / f"{number}.json").read_text())["index"] == 9


# In traces


def test_traces_name_their_features(tmp_path):
    bundle = with_cards(bundle_of(), cards())
    result = qkattr.trace(bundle, rows()[0].tolist(), qk=2)
    assert result.labels and set(result.labels.items()) <= set(cards().labels().items())
    active = {(b, int(f)) for b, a in naive().items() for f in np.flatnonzero((a[0] > 0).any(0))}
    assert set(result.labels) == active
    nodes = [n for n in result.to_json()["nodes"] if n["kind"] == "feature"]
    assert nodes and all(n["clerp"] == cards().label(n["boundary"], n["index"]) for n in nodes)
    table = next(iter(result.qk.values()))
    sides = [pair[side] for pair in table.pairs for side in ("query", "key")]
    assert all(side["label"] for side in sides if side["kind"] == "feature")
    result.save(tmp_path)
    assert qkattr.open(tmp_path).labels == result.labels
    assert not qkattr.trace(bundle_of(), rows()[0].tolist(), qk=0).labels


def test_cards_of_other_saes_are_refused():
    other = dataclasses.replace(bundle_of(), saes_hash="other")
    with pytest.raises(InputError, match="other SAEs"):
        with_cards(other, cards())


# The command


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("features")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_saes(root / "saes")
    rng = np.random.default_rng(1)
    ids = rng.integers(1, folders.VOCAB, (24, 16)).astype(np.uint16)
    ids[:, 0] = 0
    np.save(root / "rows.npy", ids)
    np.save(root / "floats.npy", ids.astype(float))
    code = main([str(a) for a in MAKE(root)])
    assert code == 0
    return root


def MAKE(root, out="cards.npz"):
    return [
        *("features", "--model", root / "model", "--saes", root / "saes"),
        *("--text", root / "rows.npy", "--length", 16, "--batch", 6, "--out", root / out),
    ]


@pytest.fixture
def run(root, capsys, monkeypatch):
    monkeypatch.chdir(root)

    def run(*arguments, code=0):
        found = main(["features", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert found == code, err
        if code:
            assert out == "" and re.fullmatch(r"qkattr: [^\n]+\n", err)
            assert err.rstrip("\n").isprintable()
            return err
        assert err == ""
        return out

    return run


def explanations(path, rows, compress=True):
    text = "\n".join(json.dumps(row) if isinstance(row, dict) else row for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if compress else text.encode())


def explained(layer="0-small-res-32", index="3", description="names of aunts", **rest):
    return dict(modelId="small", layer=layer, index=index, description=description, **rest)


def test_the_command_makes_cards(root):
    made = Cards.open(root / "cards.npz")
    assert made.boundaries.tolist() == [1, 2] and len(made) == 2 * folders.WIDTH
    assert made.meta["text"] == "rows.npy" and made.meta["text_rows"] == 24
    assert not (root / "cards.npz.scan").exists()
    assert made.norms.attn.shape == (2,) and made.norms.q.shape == (2, folders.HEADS)


def test_the_command_prints_a_card(run, root):
    card = Cards.open(root / "cards.npz").card(2, 5)
    out = run("--cards", "cards.npz", "--boundary", 2, "--index", 5)
    assert f"Feature 2:5  {card.label}"[:60] in out and "Top:" in out and "Quantile 0.9" in out
    assert all(c.isprintable() or c == "\n" for c in out)
    value = json.loads(run("--cards", "cards.npz", "--boundary", 2, "--index", 5, "--json"))
    assert value == json.loads(json.dumps(feature_json(card)))


def test_the_command_searches_and_sums_up(run, root):
    made = Cards.open(root / "cards.npz")
    found = json.loads(run("--cards", "cards.npz", "--search", "E.G.", "--json"))["features"]
    expected = [(b, i) for (b, i), text in made.labels().items() if "e.g." in text]
    assert [(r["boundary"], r["index"]) for r in found] == expected != []
    assert "64 features" in run("--cards", "cards.npz", "--search", "") or expected
    one = json.loads(run("--cards", "cards.npz", "--boundary", 2, "--json"))
    assert [row["boundary"] for row in one["boundaries"]] == [2]
    assert one["boundaries"][0]["features"] == folders.WIDTH
    assert "Feature cards of" in run("--cards", "cards.npz")


def test_the_command_exports(run, root, tmp_path):
    run("--cards", "cards.npz", "--export", tmp_path / "a")
    assert len(list((tmp_path / "a" / "features" / "model").iterdir())) == 2 * folders.WIDTH
    run("--cards", "cards.npz", "--export", tmp_path / "b", "--boundary", 1)
    assert len(list((tmp_path / "b" / "features" / "model").iterdir())) == folders.WIDTH


@pytest.mark.parametrize("compress", [True, False])
def test_explanations_become_labels(run, root, tmp_path, compress):
    rows = [explained(), explained(index="3", description="second"), explained(layer="1-x-res")]
    explanations(tmp_path / "e.jsonl.gz", rows, compress)
    run("--cards", "cards.npz", "--labels", tmp_path / "e.jsonl.gz", "--out", tmp_path / "new.npz")
    made = Cards.open(tmp_path / "new.npz")
    assert made.label(1, 3) == made.label(2, 3) == "names of aunts"
    given = made.card(1, 3)
    assert given.given and given.auc is given.strong_auc is None
    assert not made.card(1, 4).given
    assert made.label(1, 4) == Cards.open(root / "cards.npz").label(1, 4)
    assert "was given" in run("--cards", tmp_path / "new.npz", "--boundary", 1, "--index", 3)
    run("--cards", "cards.npz", "--labels", tmp_path / "e.jsonl.gz", "--out", tmp_path / "pre.npz",
        "--resid-pre", code=2)  # fmt: skip
    explanations(tmp_path / "pre.jsonl", [explained(layer="1-x-res-jb")], compress=False)
    run("--cards", "cards.npz", "--labels", tmp_path / "pre.jsonl", "--out", tmp_path / "pre.npz",
        "--resid-pre")  # fmt: skip
    assert Cards.open(tmp_path / "pre.npz").label(1, 3) == "names of aunts"


def test_own_labels_become_labels(run, root, tmp_path):
    (tmp_path / "own.json").write_text('{"2:7": "my label"}')
    run("--cards", "cards.npz", "--labels", tmp_path / "own.json", "--out", tmp_path / "o.npz")
    assert Cards.open(tmp_path / "o.npz").label(2, 7) == "my label"


@pytest.mark.parametrize(
    "row,said",
    [
        (explained(layer="9-small-res-32"), "boundary 10; expected boundaries 1..2"),
        (explained(layer="0-small-mlp-32"), "not a set of SAEs over the residual stream"),
        (explained(layer="final"), "not a set of SAEs over the residual stream"),
        (explained(index="32"), "boundary 1 has 0..31"),
        (explained(index="-1"), "boundary 1 has 0..31"),
        (explained(index="many\x1b[31m"), "boundary 1 has 0..31"),
        (explained(description=None), "expected text"),
        (dict(layer="0-x", index="1"), "has no description"),
        ("{", "is not JSON"),
        ("[1]", "expected an object"),
        ("", "holds no explanations"),
    ],
)
def test_bad_explanations_are_refused(run, root, tmp_path, row, said):
    explanations(tmp_path / "bad.jsonl.gz", [row])
    before = (root / "cards.npz").read_bytes()
    assert said in run("--cards", "cards.npz", "--labels", tmp_path / "bad.jsonl.gz", code=2)
    assert (root / "cards.npz").read_bytes() == before


def test_explanations_of_another_boundary_are_refused(run, tmp_path):
    explanations(tmp_path / "e.jsonl.gz", [explained()])
    given = ("--cards", "cards.npz", "--labels", tmp_path / "e.jsonl.gz", "--boundary", 2)
    assert "expected boundary 2" in run(*given, code=2)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(np.random.default_rng(0).bytes(999))[:-300])
    assert "damaged" in run("--cards", "cards.npz", "--labels", tmp_path / "e.jsonl.gz", code=2)


CARDS = ("--cards", "cards.npz")


@pytest.mark.parametrize(
    "arguments,said",
    [
        ((), "give one of the two"),
        (("--text", "rows.npy", *CARDS), "give one of the two"),
        (("--text", "rows.npy"), "--model is missing"),
        (("--text", "rows.npy", "--model", "model"), "--saes is missing"),
        (("--text", "rows.npy", "--model", "model", "--saes", "saes"), "--out is missing"),
        (("--text", "rows.npy", "--index", 3), "--index goes with --cards"),
        ((*CARDS, "--index", 3), "give --boundary too"),
        ((*CARDS, "--index", 3, "--boundary", 1, "--search", "x"), "expected one of them"),
        ((*CARDS, "--index", 99, "--boundary", 1), "give one of 0..31"),
        ((*CARDS, "--index", -1, "--boundary", 1), "give one of 0..31"),
        ((*CARDS, "--index", 1, "--boundary", 7), "boundaries 1..2"),
        ((*CARDS, "--boundary", 7), "boundaries 1..2"),
        ((*CARDS, "--search", "no such label"), "none of 64 labels"),
        ((*CARDS, "--resid-pre"), "give --labels"),
        ((*CARDS, "--labels", "absent.jsonl.gz"), "cannot read"),
        ((*CARDS, "--export", "rows.npy"), "cannot write"),
        (("--cards", "absent.npz"), "no such file"),
        (("--cards", "rows.npy"), "no feature cards"),
    ],
)
def test_the_command_refuses(run, arguments, said):
    assert said in run(*arguments, code=2)


@pytest.mark.parametrize(
    "change,said",
    [
        (("--text", "absent.npy"), "no such file"),
        (("--text", "floats.npy"), "expected integers"),
        (("--out", "saes"), "is a folder"),
        (("--length", 500), "expected rows of 500"),
        (("--saes", "model"), "SAE"),
    ],
)
def test_making_cards_refuses(run, root, change, said):
    assert said in run(*MAKE(root, "other.npz")[1:], *change, code=2)
    assert not (root / "other.npz").exists()


def test_trace_takes_cards(root, capsys, tmp_path):
    given = ["trace", "hi 12 hi", "-m", root / "model", "-s", root / "saes", "--json"]
    assert main([str(a) for a in [*given, "--cards", root / "cards.npz"]]) == 0
    made = Cards.open(root / "cards.npz")
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    features = [n for n in nodes if n["kind"] == "feature"]
    assert features
    assert all(n["clerp"] == made.label(n["boundary"], n["index"]) for n in features)
    assert main([str(a) for a in [*given, "--cards", root / "rows.npy"]]) == 2
