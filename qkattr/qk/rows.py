"""Which rows of an attention score are shown: those that features explain.

Bias, error and sink say nothing about why a head looked somewhere. Rows that have one of them on
either side are folded into one line with their sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qkattr.characters import shown
from qkattr.errors import quoted
from qkattr.kinds import FOLDED_KINDS, Kind
from qkattr.qk.table import QKAttribution

_FOLDED = {kind.label for kind in FOLDED_KINDS}
SIDES = ("query", "key")
#: Rows of a QK attribution that are shown.
PAIRS_SHOWN, MARGINALS_SHOWN = 12, 5
#: With a smaller share of the absolute sum, features are said to explain nothing.
LEAST_EXPLAINED = 0.1


def unfolded(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs, or the components, without bias, error and sink."""
    return [
        row
        for row in rows
        if not any(side["kind"] in _FOLDED for side in (row.get("query", row), row.get("key", row)))
    ]


def folded_share(shares: Mapping[str, Mapping[str, float]]) -> tuple[float, float]:
    """`(signed, absolute)` of all pairs with bias, error or sink on either side."""
    folded = [share for name, share in shares.items() if _FOLDED & set(name.split("-"))]
    signed, absolute = (sum((s[of] for s in folded), 0.0) for of in ("signed", "absolute"))
    return signed, absolute


def folded_line(shares: Mapping[str, Mapping[str, float]], what: str = "the score") -> str:
    """The folded pairs in one line, and whether what is left explains anything."""
    signed, absolute = folded_share(shares)
    if not absolute:
        return ""
    said = (
        f"bias, sink and error: {signed:+.2f} of {what} ({100 * absolute:.0f} % of the absolute "
        "sum of its terms)"
    )
    if 1 - absolute >= LEAST_EXPLAINED:
        return said
    return (
        f"{said}. Pairs of features have {100 * (1 - absolute):.0f} % of it: they do not explain "
        f"{what}"
    )


def folded_marginal(rows: Iterable[dict[str, Any]]) -> dict[str, float] | None:
    """The sums of the folded components of one side; None where there are none."""
    folded = [row for row in rows if row["kind"] in _FOLDED]
    if not folded:
        return None
    names = ("value", "contrast", *(("effect",) if "effect" in folded[0] else ()))
    return {name: sum(row[name] for row in folded) for name in names}


def what_it_moves(table: QKAttribution) -> str:
    """What the place does to the target of the trace, in words; "" where nothing was traced."""
    if table.target is None or table.effect is None or table.derivative is None:
        return ""
    does = "adds to" if table.effect >= 0 else "takes from"
    return (
        f"What the head reads there {does} the {table.target}: an effect of {table.effect:+.3g}. "
        f"One more unit of score moves that by {table.derivative:+.3g}. The effect of a pair is "
        "what the match moves it by over all keys; both are to first order, with everything else "
        "frozen."
    )


def rests_on(table: QKAttribution) -> str:
    """What the head rests on where the key is a sink; "" elsewhere."""
    if all(m["kind"] != Kind.SINK.label for m in table.key_marginals):
        return ""
    return sink_name(shown(table.tokens), table.key)


def sink_name(tokens: list[str], position: int) -> str:
    """A sink in words."""
    if position == 0:
        return "the first token"
    return f"the sink {quoted(tokens[position])} {position}"


def enough_stored(table: QKAttribution, most: int) -> bool:
    """Whether the pairs that a saved table lists, the strongest of all, contain the `most`
    strongest unfolded ones."""
    if len(table.pairs) == table.n_pairs or rests_on(table):
        return True
    return len(unfolded(table.pairs)) >= most


def feature_in(layer: int, described: Mapping[str, Any]) -> tuple[int, int] | None:
    """The (boundary, index) of a component of a block's QK attribution that is a feature."""
    if described["kind"] != Kind.FEATURE.label:
        return None
    return layer, described["index"]


def shown_features(table: QKAttribution) -> set[tuple[int, int]]:
    """The (boundary, index) of the features in the rows that are shown."""
    shown = [pair[side] for pair in unfolded(table.pairs)[:PAIRS_SHOWN] for side in SIDES]
    for marginals in (table.query_marginals, table.key_marginals):
        shown += unfolded(marginals)[:MARGINALS_SHOWN]
    return {feature for side in shown if (feature := feature_in(table.layer, side))}
