"""What is read off edited runs: tokens, probabilities, and where heads look.

Axes: B runs (scales), L block, N heads, S key position, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qkattr.experiments.edits import SIDES, Placed
from qkattr.result import ranked_heads
from qkattr.subject import Subject

#: Next tokens listed for every scale.
TOP = 10


def followed_keys(placed: Sequence[Placed], looked: np.ndarray) -> list[int]:
    """See `Steering.keys`; looked: `[heads, S]` clean rows of the heads that are changed."""
    at = {side: sorted({e.position for e in placed if e.side == side}) for side in SIDES}
    if not at["key"] and len(looked):
        return [int(looked.sum(0).argmax())]
    return at["key"] or at["residual"]


def followed(log_p: np.ndarray, clean: np.ndarray, track: list[int]) -> list[int]:
    """Tracked tokens, the likeliest one of the clean run and at every scale, and the next likeliest
    anywhere up to five in all."""
    best = [int(clean.argmax()), *log_p.argmax(-1).tolist()]
    followed = dict.fromkeys([*track, *best])
    others = [int(i) for i in np.argsort(-log_p.max(0))[:5] if int(i) not in followed]
    return [*followed, *others[: max(0, 5 - len(followed))]]


def by_text(subject: Subject, ids: list[int], p: np.ndarray) -> dict[str, list[float]]:
    """Two tokens may read the same; then the id tells them apart."""
    texts = [subject.bundle.token(i) for i in ids]
    return {
        text if texts.count(text) == 1 else f"{text} ({i})": p[:, i].tolist()
        for text, i in zip(texts, ids, strict=True)
    }


def likeliest(subject: Subject, log_p: np.ndarray) -> list[dict[str, Any]]:
    order = np.argsort(-log_p, kind="stable")[:TOP]
    return [
        dict(token=subject.bundle.token(int(i)), id=int(i), probability=float(np.exp(log_p[i])))
        for i in order
    ]


def rows(per_head: np.ndarray, heads: np.ndarray) -> dict[str, list[float]]:
    return {f"{layer}.{head}": per_head[layer, head].tolist() for layer, head in heads.tolist()}


def rose(
    clean: np.ndarray, patterns: np.ndarray, scales, changed, keys, n: int = 10
) -> list[dict[str, Any]]:
    """The unedited heads whose attention from the query to the keys changed most.

    clean: `[L, N, S]` the query's rows. patterns: `[B, L, N, S]` of the edited runs.
    """
    furthest = int(np.argmax(np.abs(np.asarray(scales) - 1)))
    before = clean[..., keys].sum(-1)
    change = patterns[furthest][..., keys].sum(-1) - before
    change = np.where(changed, 0.0, change)
    return [
        dict(
            head=f"{layer}.{head}",
            scale=scales[furthest],
            attention=float(before[layer, head]),
            change=float(change[layer, head]),
        )
        for layer, head in ranked_heads(np.abs(change), n)
        if abs(change[layer, head]) > 1e-6
    ]
