"""Feature cards: what each feature of each boundary does on a text.

cards = make_cards(bundle, rows)        scan, logits, labels with their measured quality
cards.card(12, 345), cards.labels(), cards.save(path), Cards.open(path)
with_cards(bundle, cards)               traces then name their features
"""

from qkattr.card import Card, Example
from qkattr.features.build import make_cards
from qkattr.features.cards import Cards
from qkattr.features.seen import ScanConfig
from qkattr.features.sets import with_cards

__all__ = ["Card", "Cards", "Example", "ScanConfig", "make_cards", "with_cards"]
