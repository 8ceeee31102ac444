"""Cards joined with the SAEs that they are of."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qkattr.cards.columns import Cards
from qkattr.errors import InputError
from qkattr.load.bundle import Bundle


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
