"""What the page and the terminal say of effects: the strongest heads, and the account."""

from __future__ import annotations

from typing import Any

import numpy as np

from qkattr.export.summary import number
from qkattr.graph.accounts import main_weights
from qkattr.result import Result


def strongest_heads(result: Result, n: int = 15) -> list[dict[str, Any]]:
    """The places (head, query, key) with the largest |effect| between two positions."""
    rows = result.head_effects(n)
    most = max((abs(row["effect"]) for row in rows), default=1.0)
    return [
        dict(
            head=f"{row['layer']}.{row['head']}",
            query=row["query"],
            key=row["key"],
            source=result.shown_tokens[row["key"]],
            target=result.shown_tokens[row["query"]],
            effect=number(row["effect"]),
            negative=row["effect"] < 0,
            bar=abs(row["effect"]) / max(most, 1e-30),
            attention=row["probability"],
            influence=row["influence"],
        )
        for row in rows
    ]


#: What the account is said by: a name, and the columns that it sums.
ACCOUNTED = (
    ("features", ("feature",)),
    ("tokens", ("token", "position")),
    ("errors", ("error",)),
    ("sinks", ("sink",)),
    ("bias", ("bias",)),
    ("constants", ("const",)),
)


def accounts(result: Result) -> list[dict[str, Any]]:
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
        name = result.label(node) if len(result.scores) else result.main_target
        found.append(dict(name=name, value=value, rows=rows))
    return found
