"""What the page and the terminal say of effects: the strongest heads, and the account."""

from __future__ import annotations

from typing import Any

import numpy as np

from qkattr.errors import quoted
from qkattr.export.summary import number
from qkattr.graph.accounts import main_weights
from qkattr.kinds import Kind
from qkattr.qk.rows import sink_name
from qkattr.result import PlaceRow, Traced

#: What the columns of the heads' tables are.
ABOUT_HEADS = (
    "Masking: how much the target falls, to first order, if the head may not look there and "
    "everything after it reacts; below zero it rises. Effect: the part of the target that the head "
    "brings from there, with everything frozen."
)


def away_from_sinks(result: Traced, rows: list[PlaceRow]) -> tuple[list[PlaceRow], str]:
    """The places of heads whose key is no sink, and the others in one line ("" where there are
    none): a head that looks at a sink says nothing about why it looked there."""
    sinks = result.sink_positions
    resting = [row for row in rows if row["key"] in sinks]
    if not resting:
        return rows, ""
    tokens = result.shown_tokens
    names = ", ".join(sink_name(tokens, t) for t in sinks)
    largest = max(resting, key=lambda row: abs(row["masking"]))
    return [row for row in rows if row["key"] not in sinks], (
        f"Not listed: {len(resting):,} places where a head looks at {names}; the largest masking "
        f"of these is {largest['masking']:+.3g}, of {largest['layer']}.{largest['head']} at "
        f"{quoted(tokens[largest['query']])} {largest['query']}."
    )


def strongest_heads(result: Traced, n: int = 15) -> tuple[list[dict[str, Any]], str]:
    """The places (head, query, key) that matter most (see `Result.head_effects`), and in one line
    those that look at a sink."""
    rows, folded = away_from_sinks(result, result.head_effects())
    most = max((abs(row["masking"]) for row in rows), default=1.0)
    return [
        dict(
            head=f"{row['layer']}.{row['head']}",
            query=row["query"],
            key=row["key"],
            source=result.shown_tokens[row["key"]],
            target=result.shown_tokens[row["query"]],
            masking=number(row["masking"]),
            effect=number(row["effect"]),
            negative=row["masking"] < 0,
            bar=abs(row["masking"]) / max(most, 1e-30),
            attention=row["probability"],
            influence=row["influence"],
        )
        for row in rows[:n]
    ], folded


#: What the account is said by: a name, and the columns that it sums.
ACCOUNTED = (
    ("features", ("feature",)),
    ("tokens", ("token", "position")),
    ("errors", ("error",)),
    ("sinks", ("sink",)),
    ("bias", ("bias",)),
    ("constants", ("const",)),
)


def accounts(result: Traced) -> list[dict[str, Any]]:
    """The account of the main target: its name and value, and of every boundary the share of it on
    each of `ACCOUNTED`. A score has two, one of each side."""
    account, graph = result.graph.account, result.graph
    weights = main_weights(graph.nodes.kind[graph.targets])
    found = []
    for node in graph.targets[weights != 0].tolist():
        at = np.flatnonzero(account.node == node)
        value = float(account.target[at[0]])
        parts = [sum(getattr(account, c)[at] for c in columns) for _, columns in ACCOUNTED]
        shares = (np.stack(parts, 1) / value).tolist() if value else np.stack(parts, 1).tolist()
        rows = [
            dict(boundary=int(b), shares=row)
            for b, row in zip(account.boundary[at], shares, strict=True)
        ]
        score = graph.nodes.kind[node] == Kind.SCORE  # which of its two sides, says its label
        name = result.label(node) if score else result.main_target
        found.append(dict(name=name, value=value, rows=rows))
    return found


def in_short(result: Traced, n: int = 3) -> list[str]:
    """What a person who reads nothing else should know: which heads moved the target, for and
    against, and how much of it is not explained by features."""
    rows, _ = away_from_sinks(result, result.head_effects())
    said = []
    for sign, moves in ((1, "fall"), (-1, "rise")):
        found = [row for row in rows if sign * row["masking"] > 0][:n]
        if found:
            heads = "; ".join(_head(result, row) for row in found)
            said.append(
                f"The {result.main_target} would {moves} most, to first order, if one of these "
                f"heads could not look where it does: {heads}."
            )
    middle = result.n_blocks // 2
    for account in accounts(result):
        row = next((row for row in account["rows"] if row["boundary"] == middle), None)
        if row is None:
            continue
        shares = zip(ACCOUNTED, row["shares"], strict=True)
        parts = ", ".join(f"{name} {100 * v:+.0f} %" for (name, _), v in shares if abs(v) >= 0.005)
        said.append(
            f"Half way through the model, at boundary {middle}, the {account['name']} "
            f"({account['value']:+.3g}) is made of {parts}."
        )
    return said


def _head(result: Traced, row: PlaceRow) -> str:
    key, query = (f"{quoted(result.shown_tokens[row[end]])} {row[end]}" for end in ("key", "query"))
    return f"{row['layer']}.{row['head']} from {key} to {query} (by {abs(row['masking']):.2g})"
