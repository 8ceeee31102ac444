"""Many prompts' measures as one table: means with 95 % intervals, and where attribution fails.

Intervals are over prompts: they, not edges or heads, are what was sampled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from qkattr.experiments.faithfulness.agreement import effect_failures, effect_tables
from qkattr.experiments.faithfulness.statistics import Table


def summarise(prompts: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> dict:
    """Tables over prompts; a measure that was not taken is left out."""
    tables = dict(
        scores=_scores(prompts),
        features=_features(prompts),
        heads=_heads(prompts),
        **effect_tables(list(prompts)),
        edges=_edges(prompts),
        blocks=_blocks(prompts),
        nodes=_nodes(prompts),
        paraphrases=_paraphrases(groups),
    )
    tables = {name: rows for name, rows in tables.items() if rows}
    return dict(**tables, failures=failures(prompts, tables))


def _mean(values) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def _scores(prompts) -> list[dict[str, Any]]:
    """Predicted against actual change of the score from single features."""
    table = Table()
    for prompt in prompts:
        for side, found in prompt.get("qk", {}).items():
            for mode in ("frozen", "live"):
                one = found["single"][mode]
                table.add((side, mode), worst=one["worst"], correlation=one["correlation"],
                          slope=one["slope"])  # fmt: skip
    return table.rows("side", "scales")


def _features(prompts) -> list[dict[str, Any]]:
    """What removing the k strongest features does, against controls."""
    table = Table()
    for prompt in prompts:
        for side, found in prompt.get("qk", {}).items():
            for attention, token in zip(found["groups"], found["next_token"], strict=True):
                for mode in ("frozen", "live"):
                    a, t = attention[mode], token[mode]
                    table.add(
                        (side, attention["k"], mode),
                        worst=a["worst"],
                        attention_lost=a["attention_lost"],
                        attention_control=a["control_lost"],
                        log_p_lost=t["lost"],
                        log_p_control=t["control_lost"],
                    )
    return table.rows("side", "k", "scales")


def _heads(prompts) -> list[dict[str, Any]]:
    table = Table()
    for prompt in prompts:
        for row in prompt.get("heads", ()):
            table.add((row["n"],), **{k: v for k, v in row.items() if k != "n"})
    return table.rows("n")


def _edges(prompts) -> list[dict[str, Any]]:
    """By linearisation, read and comparison: the mean over a prompt's blocks."""
    table = Table()
    for prompt in prompts:
        blocks = prompt.get("edges", ())
        for name in blocks[0] if blocks else ():
            if not isinstance(blocks[0][name], dict):
                continue
            linearisation, read = name.split()
            for against in blocks[0][name]:
                values = [row[name][against] for row in blocks]
                means = {
                    k: _mean(v[k] for v in values)
                    for k in ("correlation", "crossing", "sign", "rank")
                }
                means["slope"] = np.median([v["slope"] for v in values])
                table.add((linearisation, read, against), **means)
    return table.rows("linearisation", "read", "against")


def _blocks(prompts) -> list[dict[str, Any]]:
    """By block: the default edges against the actual change, whole sources taken away."""
    table = Table()
    for prompt in prompts:
        for row in prompt.get("edges", ()):
            default = row["jacobian decoder"]
            table.add(
                (row["block"],),
                held=default["held 1"]["correlation"],
                live=default["live 1"]["correlation"],
                crossing=default["live 1"]["crossing"],
                sign=default["live 1"]["sign"],
                activation=row["jacobian encoder"]["activation"]["rank"],
                stability=row["rank of 1 % and 100 %"],
            )
    return sorted(table.rows("block"), key=lambda row: row["block"])


def _nodes(prompts) -> list[dict[str, Any]]:
    """By error handling and order: areas under the deletion and insertion curves (mean over the
    counts and boundaries of a prompt; sharing clipped to 0..1)."""
    table = Table()
    for prompt in prompts:
        by_choice: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
        for row in prompt.get("nodes", ()):
            for kind in ("deletion", "insertion"):
                for order, curve in row[kind].items():
                    by_choice[row["choice"], order][kind].append(np.clip(curve, 0, 1).mean())
        for key, found in by_choice.items():
            table.add(key, **{kind: float(np.mean(values)) for kind, values in found.items()})
    return table.rows("choice", "order")


def _paraphrases(groups) -> list[dict[str, Any]]:
    table = Table()
    for group in groups:
        for pair in group["pairs"]:
            table.add(("all",), **pair)
            table.add((group["group"],), **pair)
    return table.rows("group")


def failures(prompts, tables) -> list[str]:
    """Where attribution fails, in words."""
    said = []
    for prompt in prompts:
        name = prompt["text"]
        if "qk" in prompt:
            said += [
                f"{name!r}: the {side} side of these heads holds no feature, so it is not tested"
                for side in ("key", "query")
                if side not in prompt["qk"]
            ]
        for side, found in prompt.get("qk", {}).items():
            token = next(row for row in found["next_token"] if row["k"] == 4)["live"]
            if token["lost"] <= token["control_lost"]:
                said.append(
                    f"{name!r}: removing the 4 strongest {side} features of each head costs "
                    f"{token['lost']:.2f} nats, no more than controls ({token['control_lost']:.2f})"
                )
        for row in prompt.get("heads", ()):
            if row["n"] == 8 and row["influence"] <= row["random"]:
                said.append(
                    f"{name!r}: ablating the 8 heads with the most influence costs "
                    f"{row['influence']:.2f} nats, no more than random heads ({row['random']:.2f})"
                )
    said += effect_failures(list(prompts), tables)
    for row in tables.get("blocks", ()):
        if row["live"]["mean"] < 0.5:
            said.append(
                f"block {row['block']}: edges correlate with live changes at "
                f"{row['live']['mean']:.2f} only"
            )
    for row in tables.get("nodes", ()):
        if row["order"] != "influence":
            continue
        # With errors as leaves the nodes are the same, and so are the other orders.
        choice = "kept" if row["choice"] == "kept" else "through"
        others = {r["order"]: r for r in tables["nodes"] if r["choice"] == choice}
        if row["insertion"]["mean"] <= others["size"]["insertion"]["mean"]:
            said.append(
                f"nodes ({row['choice']}): influence restores the prediction no faster than the "
                f"size of the vectors ({row['insertion']['mean']:.2f} against "
                f"{others['size']['insertion']['mean']:.2f})"
            )
    return said
