"""Counts how near a prompt lies to the text behind the packaged set.

    python docs/near.py [FOLDER]

A tenth of the rows that the packaged cards were made from are sentences from templates, in the
manner of the method's case studies. A row counts as one when at least two of `TEMPLATES` match in
it. A feature lies in such a row when its strongest context does. Printed are the shares of rows, of
all features, and of the features on the page of the result in FOLDER (`qkattr demo` writes one).
"""

from __future__ import annotations

import re
import sys

import numpy as np

from qkattr.cards.columns import Cards
from qkattr.load.smollm2 import packaged_cards

TEMPLATES = re.compile(
    r'Le contraire de "|An antonym of "|A synonym of "|The opposite of |Q: Is |True or false\?|'
    r"Assistant: Answer: \(|gave a gift to|I always loved visiting|Whenever I was feeling|"
    r"We asked why|lives near the|met \w+ at the"
)


def made_rows(cards: Cards) -> np.ndarray:
    """`[rows]`: which rows of the cards' text are from templates."""
    texts = ("".join(cards.token(i) for i in row) for row in cards.rows)
    return np.array([len(TEMPLATES.findall(text)) >= 2 for text in texts])


def strongest_is_made(cards: Cards) -> np.ndarray:
    """`[features]`: whose strongest context lies in such a row (silent features: not)."""
    return made_rows(cards)[cards.context_row[:, 0]] & (cards.count > 0)


def main() -> None:
    cards = packaged_cards()
    rows, near = made_rows(cards), strongest_is_made(cards)
    active = cards.count > 0
    print(f"rows: {rows.sum()} of {len(rows)} ({100 * rows.mean():.0f} %)")
    print(f"all features: {near.sum()} of {active.sum()} ({100 * near[active].mean():.0f} %)")
    for folder in sys.argv[1:]:
        import qkattr

        shown = [near[cards.row_of(*feature)] for feature in qkattr.open(folder).cards]
        print(f"{folder}: {sum(shown)} of {len(shown)} ({100 * np.mean(shown):.0f} %)")


if __name__ == "__main__":
    main()
