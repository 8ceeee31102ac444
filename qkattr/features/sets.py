"""Cards as a whole: what a set of them says of its boundaries, and joining one with a bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from qkattr.card import strongest_tokens
from qkattr.errors import InputError
from qkattr.features.cards import Cards
from qkattr.features.labels import NEVER, WHEN_STRONG
from qkattr.features.levels import NOT_MEASURED
from qkattr.load.bundle import Bundle

#: What the packaged set and its cards were made from, and what follows. The share is counted by
#: `docs/near.py`.
ABOUT_PACKAGED = (
    "About a quarter of the text each is Jane Austen's novels and State of the Union addresses; "
    "the rest is Moby Dick, an FAQ, fortunes, glosses, the Debian handbook, and a tenth of it "
    "short sentences from templates in the manner of the method's case studies (names with titles, "
    "antonyms, multiple choice, gifts). Prompts like these lie near the training text, so that "
    "their features look cleaner than those of other text."
)


def packaged_cards() -> Cards:
    """The cards in the package, with what is known of their text."""
    from qkattr.load import smollm2

    cards = Cards.open(smollm2.cards_path())
    return dataclasses.replace(cards, meta=cards.meta | dict(about=ABOUT_PACKAGED))


def origin(cards: Cards) -> str:
    """What text the cards were made from, in a sentence or more."""
    meta = cards.meta
    rows = f"{meta['text_rows']:,} rows of {meta['text_length']} tokens"
    text = f" of {meta['text']}" if meta["text"] else ""
    about = meta.get("about", "")
    return f"The cards were made from {rows}{text}. {about}".strip()


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


def with_cards(bundle: Bundle, cards: Cards | str | Path) -> Bundle:
    """The bundle with cards of its SAEs: whatever is traced with it names its features.

    Raises:
      InputError: the cards are of other SAEs, or the file cannot be read.
    """
    cards = cards if isinstance(cards, Cards) else Cards.open(cards)
    was, now = cards.meta["saes_hash"], bundle.saes_hash
    if was != now:
        raise InputError(
            f"the cards are of other SAEs ({cards.meta['saes']}, fingerprint {str(was)[:12]}) than "
            f"the ones given ({str(now)[:12]}); make cards of these, or load those"
        )
    return dataclasses.replace(bundle, read_cards=lambda: cards)
