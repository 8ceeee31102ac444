"""Feature cards: what each feature of each boundary does on a text.

cards = make_cards(bundle, rows)        scan, logits, labels with their measured quality
cards.card(12, 345), cards.labels(), cards.save(path), Cards.open(path)
with_cards(bundle, cards)               traces then name their features
"""

from qkattr.cards.card import Card, Example
from qkattr.cards.columns import Cards
from qkattr.features.build import make_cards
from qkattr.features.seen import ScanConfig
from qkattr.labels.read import with_cards

__all__ = ["Card", "Cards", "Example", "ScanConfig", "make_cards", "with_cards"]
