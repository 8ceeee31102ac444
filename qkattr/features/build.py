"""From a corpus to cards: scan, norm scales, logits, labels, columns.

    rows -> scan -> { labels (choose on half, measure on the other), contexts } -> Cards
    weights ------> { top and bottom logits }                                 /

Contexts of a feature: its strongest, then one of each fifth of its activations, the middle one by
activation of those sampled with a window. The sample is uniform over active positions, so "the
middle of the lowest fifth" is the 10 % quantile up to sampling.
Axes: M features of one boundary, C contexts, W window, Q tokens listed.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from qkattr.cards.columns import AUTOMATIC, HISTOGRAM, Cards
from qkattr.cards.levels import auc_level, level_of
from qkattr.features.labels import FeatureLabels, Half, label_features
from qkattr.features.logits import top_logits
from qkattr.features.norms import norm_scales
from qkattr.features.scan import Scan, ScanProgress, check_rows, scan
from qkattr.features.seen import ScanConfig, Seen
from qkattr.features.views import View, views_of
from qkattr.load.bundle import Bundle
from qkattr.version import __version__

#: Tokens listed of the top and of the bottom logits; fifths of the activations; features labelled
#: at a time.
RAISED, LOWERED, FIFTHS, CHUNK = 6, 3, 5, 4096


def make_cards(
    bundle: Bundle,
    rows: np.ndarray,
    *,
    text: str = "",
    config: ScanConfig = ScanConfig(),  # noqa: B008  (frozen)
    folder: Path | None = None,
    every: int = 32,
    mesh: Mesh | None = None,
    progress: ScanProgress = lambda stage, done: None,
) -> Cards:
    """The cards of every feature of a bundle's SAEs, from rows of token ids.

    Args:
      rows: `[n, T]`. text: what they are, for the record.
      config, folder, every, mesh, progress: see `scan`.

    Raises:
      InputError: as `scan`.
    """
    rows = check_rows(bundle, rows)
    progress("norm scales", 0.0)
    norms = norm_scales(bundle, rows, precision=config.precision)
    how: dict[str, Any] = dict(
        config=config, folder=folder, every=every, mesh=mesh, progress=progress
    )
    found = scan(bundle, rows, **how)
    used = np.unique(rows)
    texts = {int(i): bundle.token(int(i)) for i in used}
    views = views_of(rows, texts)
    columns: dict[str, list] = defaultdict(list)
    for done, (b, seen) in enumerate(found.seen.items()):
        progress("logits and labels", done / len(found.seen))
        dictionary = (bundle.dictionaries or ())[b]
        assert dictionary is not None  # it was scanned
        tokens, values = top_logits(
            bundle.params, dictionary.w_dec_MD, n=RAISED, scale=norms.final, cfg=bundle.config
        )
        labels = _labels(views, found, b, tokens[0], used, texts)
        parts = _seen(seen) | _contexts(seen, found) | _logits(tokens, values)
        parts |= dict(label_text=labels.text, auc=auc_level(labels.auc).T, n=labels.n.T)
        parts |= dict(positions=[(~found.sinks[b]).sum()], width=[len(seen.total)])
        for name, column in parts.items():
            columns[name].append(column)
    progress("logits and labels", 1.0)
    return _assembled(bundle, found, columns, norms, texts, text)


def _labels(views: list[View], found: Scan, b: int, top, used, texts) -> FeatureLabels:
    seen, T = found.seen[b], found.rows.shape[1]
    width = len(seen.total)
    keep = ~found.sinks[b]
    halves = []
    for split, rows in enumerate((~found.held_out, found.held_out)):
        of = slice(split * width, (split + 1) * width)
        sample = seen.sample.place[of], seen.sample.value[of]
        place, value, active = (np.asarray(a) for a in (*sample, seen.count[split]))
        halves.append(Half(place, value, active, keep & rows[:, None]))
    parts = []
    for start in range(0, width, CHUNK):
        at = slice(start, start + CHUNK)
        choosing, held = (Half(h.place[at], h.value[at], h.active[at], h.keep) for h in halves)
        place = seen.top.place[at]
        examples = [
            [texts[int(i)] for i in found.rows[row[row >= 0] // T, row[row >= 0] % T]]
            for row in place
        ]
        parts.append(label_features(views, choosing, held, top[at], examples, used))
    return FeatureLabels(
        text=[text for part in parts for text in part.text],
        auc=np.concatenate([part.auc for part in parts], axis=1),
        n=np.concatenate([part.n for part in parts], axis=1),
    )


def _seen(seen: Seen) -> dict[str, np.ndarray]:
    """Counts, maximum, mean and histogram."""
    count, largest = seen.count.sum(0), np.maximum(seen.top.value[:, 0], 0)
    sizes = np.asarray(seen.histogram)
    bins = np.where(sizes > 0, np.arange(sizes.shape[1]), 0).max(1)
    at = bins[:, None] - np.arange(HISTOGRAM)[::-1]
    histogram = np.take_along_axis(sizes, np.maximum(at, 0), axis=1) * (at >= 0)
    mean = seen.total / np.maximum(count, 1)
    histogram[:, 0] += count - histogram.sum(1)  # what is weaker still
    return dict(
        count=count,
        max=largest,
        mean_level=np.round(255 * mean / np.maximum(largest, 1e-30)).astype(np.uint8),
        bin=bins.astype(np.uint8),
        histogram=level_of(histogram),
        source=np.full(len(count), AUTOMATIC, np.uint8),
    )


def _contexts(seen: Seen, found: Scan) -> dict[str, np.ndarray]:
    """Places and windows of the contexts, as levels of each feature's largest activation."""
    width, shown = len(seen.total), seen.sample.window.shape[1]
    sample = [
        np.concatenate([x[:width, :shown], x[width:, :shown]], axis=1)
        for x in (seen.sample.value, seen.sample.place, seen.sample.window)
    ]
    order = np.argsort(-sample[0], axis=1, kind="stable")
    n = (sample[0] > 0).sum(1)[:, None]
    middle = (np.arange(FIFTHS) * 2 + 1) * n // (2 * FIFTHS)
    # Fewer than five sampled: the same one would show twice.
    again = np.pad(middle[:, 1:] == middle[:, :-1], ((0, 0), (1, 0))) | (middle >= n)
    at = np.take_along_axis(order, np.minimum(middle, sample[0].shape[1] - 1), axis=1)
    value, place = (np.where(again, 0, np.take_along_axis(x, at, axis=1)) for x in sample[:2])
    window = np.take_along_axis(sample[2], at[..., None], axis=1)
    value = np.concatenate([seen.top.value, value], axis=1)
    place = np.concatenate([seen.top.place, place], axis=1)
    window = np.concatenate([seen.top.window, window], axis=1)
    largest = np.maximum(seen.top.value[:, :1], 1e-30)
    level = np.where(value > 0, np.maximum(np.round(255 * value / largest), 1), 0)
    window = np.round(15 * window / largest[..., None]).astype(np.uint8)
    window[:, :, found.config.before] = 0  # the context's own, which has its level
    window[level == 0] = 0
    return dict(
        place=np.where(level > 0, place, 0), context_level=level.astype(np.uint8), window=window
    )


def _logits(tokens: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    both = np.concatenate([values[0], values[1, :, :LOWERED]], axis=1)
    scale = np.abs(both).max(1)
    level = np.round(127 * both / np.maximum(scale, 1e-30)[:, None]).astype(np.int8)
    return dict(
        logit_token=np.concatenate([tokens[0], tokens[1, :, :LOWERED]], axis=1),
        logit_level=level,
        logit_scale=scale.astype(np.float32),
    )


def _assembled(bundle: Bundle, found: Scan, columns, norms, texts, text: str) -> Cards:
    joined = {
        name: np.concatenate(parts) for name, parts in columns.items() if name != "label_text"
    }
    place, T = joined.pop("place"), found.rows.shape[1]
    level = joined["context_level"]
    row_number = np.unique(place[level > 0] // T) if level.any() else np.zeros(0, int)
    row = np.searchsorted(row_number, place // T) * (level > 0)
    logit_tokens = {int(i): bundle.token(int(i)) for i in np.unique(joined["logit_token"])}
    first = np.concatenate([[0], np.cumsum(joined.pop("width"))])
    return Cards(
        meta=_meta(bundle, found, text),
        boundaries=np.array(list(found.seen)),
        first=first,
        rows=found.rows[row_number],
        row_number=row_number,
        context_row=row,
        context_position=place % T * (level > 0),
        label_text=[label for part in columns["label_text"] for label in part],
        vocabulary={int(i): texts[int(i)] for i in np.unique(found.rows[row_number])}
        | logit_tokens,
        norms=norms,
        **joined,
    )


def _meta(bundle: Bundle, found: Scan, text: str) -> dict[str, Any]:
    config = found.config
    return dict(
        model=bundle.model,
        saes=bundle.saes,
        model_hash=bundle.model_hash,
        saes_hash=bundle.saes_hash,
        neuronpedia=bundle.source and bundle.source.to_json(),
        dtype=bundle.dtype,
        qkattr=__version__,
        text=text,
        text_rows=len(found.rows),
        text_length=found.rows.shape[1],
        top=config.top,
        samples=config.samples,
        raised=min(RAISED, bundle.config.vocab),
        before=config.before,
        after=config.after,
    )
