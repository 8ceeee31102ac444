"""What the page and the terminal both say of a result, as rows: heads, edges."""

from __future__ import annotations

from typing import Any, NamedTuple

from qkattr.cards.card import Card, Example, strongest_tokens
from qkattr.characters import readable, whole
from qkattr.errors import clipped, printable, quoted
from qkattr.kinds import Kind
from qkattr.result import Traced


def number(x: float) -> str:
    """A signed number in four significant digits; large ones whole, with separators."""
    if x == 0:
        return "0"
    return f"{x:+,.0f}" if 1000 <= abs(x) < 1e9 else f"{x:+.4g}"


def visible(text: str, most: int = 100) -> str:
    """Text of a prompt or a label on one line, with what has no glyph written out."""
    for white, sign in (("\n", "⏎"), ("\t", "⇥")):
        text = text.replace(white, sign)
    return clipped(printable(readable(text)), most)


def name(result: Traced, node: int) -> str:
    """A node in words: what it is, where."""
    nodes = result.graph.nodes
    kind, t, b = Kind(nodes.kind[node]), int(nodes.position[node]), int(nodes.boundary[node])
    label, token = result.label(node), quoted(result.shown_tokens[t])
    if kind == Kind.FEATURE:
        said = f" {called(label)}" if label else ""
        return f"feature {b}:{nodes.index[node]}{said} on {token} {t}"
    if kind == Kind.LOGIT:
        return f"logit {quoted(readable(label))}"
    if kind == Kind.SCORE:
        return label
    if kind == Kind.TOKEN:
        return f"token {token} {t}"
    return f"{kind.label} {b} on {token} {t}"


def called(label: str) -> str:
    """What a feature is called. Where no rule describes it, by the tokens it is strongest on."""
    tokens = strongest_tokens(label)
    return visible(f"strongest on {tokens}" if tokens else label)


def component(described: dict[str, Any]) -> str:
    """A component of a QK attribution in words."""
    kind, index, label = described["kind"], described["index"], described.get("label", "")
    text = kind if index is None else f"{kind} {index}"
    if not label:
        return text
    return f"{text} {quoted(readable(label)) if kind == Kind.TOKEN.label else called(label)}"


def both_aucs(card: Card) -> str:
    """The AUC of the label's rule for all activations, and for strong ones."""
    measured = ((card.auc, "overall"), (card.strong_auc, "when strong"))
    said = [f"{auc:.2f} {which}" for auc, which in measured if auc is not None]
    return f"AUC {', '.join(said)}" if said else ""


def quality(card: Card) -> str:
    """How well the label's rule does."""
    if card.given:
        return "The label was given; its quality was not measured."
    if card.auc is None:
        return f"AUC not measured: {card.n} held-out positions activate it."
    said = (
        f"AUC {card.auc:.2f} of its rule overall: {card.n} held-out positions that activate it "
        f"against all others"
    )
    if card.strong_auc is not None:
        said += f"; {card.strong_auc:.2f} when strong, for its strongest fifth ({card.strong_n})"
    return f"{said}. 0.5 is chance; of an unclear label, the best rule found."


class Piece(NamedTuple):
    """Part of a context in which no character is cut: its text, the strongest activation on it, and
    whether the token that the context was found for is in it."""

    text: str
    activation: float
    at: bool


def pieces(example: Example) -> list[Piece]:
    """A context, token by token where a character is not on several."""
    return [
        Piece(text, max(example.activations[i] for i in tokens), example.at in tokens)
        for tokens, text in whole(example.tokens)
    ]


def strongest_edges(result: Traced) -> list[dict[str, Any]]:
    """The edges with most influence that did more than carry a feature on in place."""
    graph, edges = result.graph, result.graph.edges
    influence, rows = graph.edge_influence(), []
    for i in graph.strongest_edges().tolist():
        loadings = edges.heads[i].tolist()
        strongest = sorted(range(len(loadings)), key=lambda h: -abs(loadings[h]))[:3]
        carried = [f"{edges.block[i]}.{h} {number(loadings[h])}" for h in strongest if loadings[h]]
        ends = int(edges.source[i]), int(edges.target[i])
        rows.append(
            dict(
                source=name(result, ends[0]),
                target=name(result, ends[1]),
                features=[graph.feature(end) for end in ends],
                influence=float(influence[i]),
                weight=number(float(edges.weight[i])),
                residual=number(float(edges.residual[i])),
                mlp=number(float(edges.mlp[i])),
                heads=", ".join(carried),
            )
        )
    return rows
