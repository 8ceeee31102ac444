"""Labels: AUC against Mann-Whitney's count of pairs, and rules that were planted."""

from __future__ import annotations

import dataclasses
import functools
import re

import folders
import numpy as np
import pytest
from scans import EXACT
from tiny import within

from qkattr.features.labels import FEWEST, NEVER, Half, choose, label_features, measure
from qkattr.features.scan import held_out
from qkattr.features.views import NEAR, View, views_of

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
