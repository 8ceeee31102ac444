"""Small scans and cards, and what a loop over positions finds."""

from __future__ import annotations

import functools

import jax
import numpy as np
import tiny
from tiny import within

from qkattr.features import Cards, ScanConfig, make_cards
from qkattr.features.scan import scan
from qkattr.load.bundle import Bundle
from qkattr.model.transformer import forward
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


@functools.cache
def cards() -> Cards:
    return make_cards(bundle_of(), rows(), text="rows", config=CONFIG)
