"""A feature card on the terminal. Tokens and labels are hostile: nothing of them is markup."""

from __future__ import annotations

from itertools import groupby

from rich.text import Text

from qkattr.cards.card import Card, Example
from qkattr.cli.show import bar, console, percent, say
from qkattr.errors import printable, quoted
from qkattr.export.summary import pieces, quality, visible


def show_card(card: Card) -> None:
    """Label with its quality, numbers, logits, contexts with tokens shaded by activation."""
    out = console()
    out.print(Text(printable(f"Feature {card.boundary}:{card.index}  {card.label}"), style="bold"))
    say(out, quality(card))
    say(
        out,
        f"Active at {percent(card.density)} of positions ({card.count}); activation at most "
        f"{card.max:.4g}, {card.mean:.4g} in the mean.",
    )
    if card.histogram:
        most = max(n for _, _, n in card.histogram)
        say(out, "Activations (counts to 3 %):")
        for low, high, n in card.histogram:
            say(out, f"  {low:8.3g} to {high:<8.3g} {n:8d}  {bar(n, most, 30)}")
    for name, logits in (("raises", card.top_logits), ("lowers", card.bottom_logits)):
        said = "  ".join(f"{quoted(token, 24)} {value:+.3g}" for token, value in logits)
        say(out, f"By the direct path it {name} {said}")
    for name, examples in groupby(card.examples, key=lambda e: e.quantile):
        say(out, f"{name}:")
        for example in examples:
            out.print(context(example, card.max))


def context(example: Example, most: float) -> Text:
    """One line; the token it was found for is between angles."""
    line = Text(f"  {example.activation:8.3g}  ", end="\n")
    for text, activation, at in pieces(example):
        shade = round(255 - 150 * min(activation / max(most, 1e-30), 1))
        style = f"black on rgb(255,{shade},{max(shade - 60, 40)})" if activation > 0 else ""
        said = visible(text, 40)
        line.append(f"‹{said}›" if at else said, style=style)
    return line
