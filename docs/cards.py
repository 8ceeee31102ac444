"""Writes docs/features.md: random features of three boundaries, with labels and contexts.

    python docs/cards.py [CARDS.npz] [--boundaries 6,15,24] [--n 20] [--seed 0] > docs/features.md

The features are drawn with a fixed seed from all of a boundary's, silent ones included; none is
left out or picked.
"""

from __future__ import annotations

import argparse
import html

import numpy as np

from qkattr.export.summary import visible
from qkattr.features import Card, Cards, Example
from qkattr.features.overview import overview
from qkattr.load.smollm2 import packaged_cards

# What markdown would act on inside of <code>.
_ENTITIES = {c: f"&#{ord(c)};" for c in "[]()`|*_\\~"}

#: Contexts shown of each feature: the strongest, and all by quantile.
TOP = 3


def code(text: str, most: int = 60) -> str:
    """A token or label as code that neither markdown nor a browser acts on."""
    said = html.escape(visible(text, most))
    return f"<code>{''.join(_ENTITIES.get(c, c) for c in said)}</code>"


def context(example: Example) -> str:
    before, own, after = (
        "".join(visible(token, 30) for token in part)
        for part in (
            example.tokens[: example.at],
            example.tokens[example.at : example.at + 1],
            example.tokens[example.at + 1 :],
        )
    )
    return f"{code(before, 200)}**{code(own)}**{code(after, 200)}"


def lines(card: Card) -> list[str]:
    """One feature."""
    auc = "not measured" if card.auc is None else f"{card.auc:.2f} overall ({card.n})"
    strong = "" if card.strong_auc is None else f", {card.strong_auc:.2f} when strong"
    made = [
        f"### {card.boundary}:{card.index} {code(card.label, 160)}",
        "",
        f"AUC {auc}{strong}. Active at {100 * card.density:.2f} % of positions, at most "
        f"{card.max:.4g}. Raises {', '.join(code(t) for t, _ in card.top_logits[:5])}.",
        "",
    ]
    top = [e for e in card.examples if e.quantile == "Top"]
    others = [e for e in card.examples if e.quantile != "Top"]
    for example in top[:TOP] + others:
        made.append(f"- {example.quantile}, {example.activation:.3g}: {context(example)}")
    return [*made, ""]


def page(cards: Cards, boundaries: list[int], n: int, seed: int) -> str:
    """The whole page."""
    rows, meta = overview(cards), cards.meta
    total, silent = (sum(r[name] for r in rows) for name in ("features", "silent"))
    labelled, strong = (sum(r[name] for r in rows) for name in ("labelled", "of_strong"))
    made = [
        "# Feature cards",
        "",
        f"{n} features of each of the boundaries {', '.join(map(str, boundaries))}, drawn at "
        f"random with seed {seed}: not picked. Written by `docs/cards.py`.",
        "",
        f"The set has {total} features of {len(rows)} boundaries, scanned on {meta['text_rows']} "
        f"rows of {meta['text_length']} tokens. {silent} were silent there. {labelled} have a "
        f"label whose rule separates held-out positions that activate the feature from all others "
        f"with an AUC of at least 0.7; {strong} of these only where the feature is strong (above "
        f"its 80 % quantile), which the label says.",
        "",
        cards.origin() + " [How this was counted](training.md#the-text-behind-the-packaged-set).",
        "",
        "A rule looks at the token and what comes before it, or at the next token where that is "
        "among the feature's top logits. It is chosen on half of the rows and its AUC measured on "
        "the other half, with the number of activating positions in brackets.",
        "",
    ]
    for b in boundaries:
        made += [f"## Boundary {b}", ""]
        drawn = np.random.default_rng((seed, b)).choice(cards.width(b), n, replace=False)
        for index in np.sort(drawn).tolist():
            made += lines(cards.card(b, index))
    return "\n".join(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cards", nargs="?")
    parser.add_argument("--boundaries", default="6,15,24")
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    boundaries = [int(b) for b in given.boundaries.split(",")]
    cards = packaged_cards() if given.cards is None else Cards.open(given.cards)
    print(page(cards, boundaries, given.n, given.seed), end="")


if __name__ == "__main__":
    main()
