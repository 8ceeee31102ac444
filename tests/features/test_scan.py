"""The scan against a loop, and however it is cut, stopped and spread."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType
from scans import (
    CONFIG,
    LENGTH,
    N_ROWS,
    SAME,
    bundle_of,
    naive,
    naive_sinks,
    rows,
    same_scans,
    scanned,
)
from tiny import within

from qkattr.errors import InputError
from qkattr.features import make_cards
from qkattr.features.keep import priority
from qkattr.features.scan import held_out, scan
from qkattr.features.seen import BINS
from qkattr.model.transformer import forward
from qkattr.sharding import make_mesh, shard
from qkattr.sources.dictionary import activations


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
