"""What a set of cards says of its boundaries, a row each."""

from __future__ import annotations

from typing import Any

import numpy as np

from qkattr.cards.card import strongest_tokens
from qkattr.cards.columns import Cards
from qkattr.cards.levels import NOT_MEASURED
from qkattr.features.labels import NEVER, WHEN_STRONG


def overview(cards: Cards) -> list[dict[str, Any]]:
    """Each boundary: features, how many were silent, mean density, how many have a label whose rule
    separates on held-out rows all of its activations, or strong ones; median AUC (None: none)."""
    rows = []
    for at, b in enumerate(cards.boundaries.tolist()):
        part = slice(cards.first[at], cards.first[at + 1])
        texts = cards.label_text[part]
        strong = np.array([text.endswith(WHEN_STRONG) for text in texts])
        vague = np.array([text == NEVER or bool(strongest_tokens(text)) for text in texts])
        known_of = np.where(strong, cards.auc[part, 1], cards.auc[part, 0]) != NOT_MEASURED
        labelled = ~vague & known_of
        auc = np.where(cards.auc[part] == NOT_MEASURED, np.nan, cards.auc[part] / 254)
        known = auc[~np.isnan(auc[:, 0]), 0]
        rows.append(
            dict(
                boundary=b,
                features=len(texts),
                silent=int((cards.count[part] == 0).sum()),
                density=float(cards.count[part].mean() / cards.positions[at]),
                labelled=int(labelled.sum()),
                of_strong=int((labelled & strong).sum()),
                median_auc=float(np.median(known)) if len(known) else None,
            )
        )
    return rows
