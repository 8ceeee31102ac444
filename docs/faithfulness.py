"""Writes the tables of docs/faithfulness.md from the JSON of the runs that it names.

    python docs/faithfulness.py

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`. What comes of the first set of prompts
is in faithfulness.json, of the other in faithfulness-other.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE / "faithfulness.md"

Report = dict[str, Any]
Rows = list[dict[str, Any]]
SETS = ("first", "other")


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def number(value: dict | float | None, digits: int = 2, *, interval: bool = True) -> str:
    """A mean with its interval, or a number; nothing where there is none."""
    if value is None:
        return ""
    if not isinstance(value, dict):
        return f"{value:.{digits}f}"
    mean, low, high = (f"{value[k]:.{digits}f}" for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" if interval else mean


def found(rows: Rows, **wanted) -> dict[str, Any]:
    """The row with these values, or an empty one."""
    return next((r for r in rows if all(r[k] == v for k, v in wanted.items())), {})


def in_both(reports: list[Report], table: str, keys: tuple[str, ...]) -> Iterable[tuple]:
    """Values of the keys, and the rows of both sets that have them, in the order of the first."""
    for row in reports[0][table]:
        wanted = {key: row[key] for key in keys}
        yield tuple(wanted.values()), [found(r.get(table, []), **wanted) for r in reports]


def scores(reports: list[Report]) -> str:
    columns = ("worst", "correlation", "slope")
    head = ["side", "scales", *(f"{c}, {s}" for c in columns for s in SETS)]
    rows = [
        [*keys, *(_score(r.get(c), c) for c in columns for r in both)]
        for keys, both in in_both(reports, "scores", ("side", "scales"))
    ]
    return markdown(head, rows)


def _score(value, column: str) -> str:
    tiny = value and column == "worst" and value["mean"] < 1e-4
    return f"{value['mean']:.1e}" if tiny else number(value, 3)


def features(reports: list[Report]) -> str:
    columns = ("attention_lost", "attention_control", "log_p_lost", "log_p_control")
    names = ("attention lost", "controls", "log probability lost", "controls")
    head = ["side", "k", *(f"{n}, {s}" for s in SETS for n in names)]
    rows = [
        [side, str(k), *(number(r.get(c)) for r in both for c in columns)]
        for (side, k, scales), both in in_both(reports, "features", ("side", "k", "scales"))
        if scales == "live"
    ]
    return markdown(head, rows)


ORDERS = ("influence", "loading", "effect", "attention", "influence_anywhere", "effect_anywhere",
          "random")  # fmt: skip


def heads(reports: list[Report], which: int) -> str:
    head = ["heads", *(name.replace("_", " ") for name in ORDERS)]
    rows = [[str(r["n"]), *(number(r[c]) for c in ORDERS)] for r in reports[which]["heads"]]
    return markdown(head, rows)


#: What stands in the first table: a measure of heads, and of places, with its derivative.
GLANCE = (
    ("attention", ""), ("|loading|", ""), ("influence", ""), ("|effect|", ""),
    ("effect", "jacobian"), ("effect", "half"), ("first order", "jacobian"),
    ("first order", "half"), ("first order", "held"), ("first order", "live"),
)  # fmt: skip
FIRST_ORDER = dict(zero="effect", mean="less mean", pattern="masking")


def glance(reports: list[Report]) -> str:
    """Rank, sign and top of measures, others live, by what is ablated and by set."""
    whats = (*FIRST_ORDER, "places")
    head = ["measure", "derivative", *(f"{what}, {s}" for what in whats for s in SETS)]
    rows = []
    for measure, by in GLANCE:
        cells = [_at_a_glance(r, measure, by, what) for what in whats for r in reports]
        rows.append([escaped(measure), by, *cells])
    return markdown(head, rows)


def _at_a_glance(report: Report, measure: str, by: str, what: str) -> str:
    same = dict(others="live", read="logit", by=by)
    if what == "places":
        name = "masking" if measure == "first order" else measure.replace("|loading|", "loading")
        row = found(report["places"], measure=name, **same)
    else:
        name = FIRST_ORDER[what] if measure == "first order" else measure
        row = found(report["effects"], measure=name, ablation=what, **same)
    return " · ".join(f"{row[c]['mean']:.2f}" for c in ("rank", "sign", "top")) if row else ""


def effects(reports: list[Report], ablation: str) -> str:
    columns = ("rank", "sign", "top")
    head = ["measure", "derivative", *(f"{c}, {s}" for c in columns for s in SETS),
            "rank, frozen", "rank, log p"]  # fmt: skip
    keys = ("ablation", "others", "read", "measure", "by")
    rows = []
    for (a, others, read, measure, by), both in in_both(reports, "effects", keys):
        if (a, others, read) == (ablation, "live", "logit"):
            same = dict(ablation=ablation, measure=measure, by=by)
            frozen = found(reports[0]["effects"], others="frozen", read="logit", **same)
            log_p = found(reports[0]["effects"], others="live", read="log_p", **same)
            cells = [number(r.get(c)) for c in columns for r in both]
            cells += [number(r.get("rank"), interval=False) for r in (frozen, log_p)]
            rows.append([escaped(measure), by, *cells])
    return markdown(head, rows)


def places(reports: list[Report]) -> str:
    columns = ("rank", "sign", "top")
    head = ["measure", "derivative", *(f"{c}, {s}" for c in columns for s in SETS), "rank, frozen"]
    rows = []
    keys = ("others", "read", "measure", "by")
    for (others, read, measure, by), both in in_both(reports, "places", keys):
        if (others, read) == ("live", "logit"):
            frozen = found(
                reports[0]["places"], others="frozen", read="logit", measure=measure, by=by
            )
            cells = [number(r.get(c)) for c in columns for r in both]
            rows.append([measure, by, *cells, number(frozen.get("rank"), interval=False)])
    return markdown(head, rows)


def misled(reports: list[Report], of: str) -> str:
    columns = ("share", "sign jacobian", "sign live", "size jacobian", "size live")
    head = ["ablation" if of == "heads" else "measure", "group",
            *(f"{c}, {s}" for c in columns for s in SETS)]  # fmt: skip
    rows = []
    for (o, what, others, group), both in in_both(
        reports, "misled", ("of", "what", "others", "group")
    ):
        if (o, others) == (of, "live"):
            cells = [number(r.get(c), interval=False) for c in columns for r in both]
            rows.append([what, group, *cells])
    return markdown(head, rows)


def worst(reports: list[Report]) -> str:
    changes = ("zero live", "zero frozen", "mean live", "pattern live")
    head = ["prompt", "head", "effect", "attribution patching", *changes, "attention to sinks"]
    rows = [
        [code(r["text"]), r["head"], *(f"{r[c]:+.2f}" for c in ("effect", "live", *changes)),
         number(r["sinks"])]
        for report in reports for r in report["worst"][:6]
    ]  # fmt: skip
    return markdown(head, rows)


def edges(reports: list[Report]) -> str:
    head = ("linearisation | read | held 1 % | held 100 % | its rank | live 100 % | "
            "between positions | rank | sign | activation | its rank").split(" | ")  # fmt: skip
    rows = []
    for name in dict.fromkeys((r["linearisation"], r["read"]) for r in reports[0]["edges"]):
        of = {
            r["against"]: r for r in reports[0]["edges"] if (r["linearisation"], r["read"]) == name
        }
        small, held, live, fires = (of[k] for k in ("held 0.01", "held 1", "live 1", "activation"))
        plain = [small["correlation"], held["correlation"], held["rank"], live["correlation"],
                 live["crossing"], live["rank"], live["sign"]]  # fmt: skip
        cells = [number(v, 3, interval=False) for v in plain]
        cells += [number(fires[k], 3) for k in ("correlation", "rank")]
        rows.append([*name, *cells])
    return markdown(head, rows)


def stability(reports: list[Report]) -> str:
    head = ["source scaled down by", "held: correlation", "sign", "rank", "live: correlation",
            "between positions", "sign", "rank"]  # fmt: skip
    rows = []
    of = dict(linearisation="jacobian", read="decoder")
    for share, name in (("0.01", "1 %"), ("0.1", "10 %"), ("1", "100 %")):
        against = (f"{mode} {share}" for mode in ("held", "live"))
        held, live = (found(reports[0]["edges"], **of, against=a) for a in against)
        values = [held[k] for k in ("correlation", "sign", "rank")]
        values += [live[k] for k in ("correlation", "crossing", "sign", "rank")]
        rows.append([name, *(number(v, 3, interval=False) for v in values)])
    return markdown(head, rows)


def blocks(reports: list[Report]) -> str:
    head = ["block", "held", "live", "between positions, live", "sign, live",
            "activation (encoder), rank", "rank of 1 % and 100 %"]  # fmt: skip
    columns = ("held", "live", "crossing", "sign", "activation", "stability")
    rows = [
        [str(r["block"]), *(number(r.get(c), 3, interval=False) for c in columns)]
        for r in reports[0]["blocks"]
    ]
    return markdown(head, rows)


def paraphrases(reports: list[Report]) -> str:
    head = ["group", "edges in common", "of all", "sign", "rank of \\|edge\\|"]
    rows = [
        [r["group"], number(r["common"], 0, interval=False), number(r["shared"], interval=False),
         *(number(r[c], 3, interval=False) for c in ("sign", "rank"))]
        for r in reports[0]["paraphrases"]
    ]  # fmt: skip
    return markdown(head, rows)


def nodes(reports: list[Report]) -> str:
    head = ["errors", "order", "deletion (low is good)", "insertion (high is good)"]
    rows = [
        [r["choice"], r["order"], number(r["deletion"]), number(r["insertion"])]
        for r in reports[0]["nodes"]
    ]
    return markdown(head, rows)


def failures(reports: list[Report]) -> str:
    return "\n".join(
        f"- {name} set: {line}"
        for name, report in zip(SETS, reports, strict=True)
        for line in report["failures"]
    )


def prompts(reports: list[Report], which: int) -> str:
    head = ["prompt", "says", "looks from", "heads with the most influence there"]
    rows = []
    for p in reports[which]["prompts"]:
        key = code(p["tokens"][p["source"]])
        says = f"{code(p['prediction'])} {p['probability']:.2f}"
        rows.append([code(p["text"]), says, f"{p['target']} to {p['source']}, {key}",
                     ", ".join(p["heads_named"][:4])])  # fmt: skip
    return markdown(head, rows)


def code(text: str) -> str:
    return f"`{escaped(text)}`".replace("\n", "⏎")


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


TABLES: dict[str, Callable[[list[Report]], str]] = {
    "glance": glance,
    "scores": scores,
    "features": features,
    "heads first": lambda reports: heads(reports, 0),
    "heads other": lambda reports: heads(reports, 1),
    "effects zero": lambda reports: effects(reports, "zero"),
    "effects mean": lambda reports: effects(reports, "mean"),
    "effects pattern": lambda reports: effects(reports, "pattern"),
    "places": places,
    "misled heads": lambda reports: misled(reports, "heads"),
    "misled places": lambda reports: misled(reports, "places"),
    "worst": worst,
    "edges": edges,
    "stability": stability,
    "blocks": blocks,
    "paraphrases": paraphrases,
    "nodes": nodes,
    "failures": failures,
    "prompts first": lambda reports: prompts(reports, 0),
    "prompts other": lambda reports: prompts(reports, 1),
}


def filled(page: str, reports: list[Report]) -> str:
    """The page with every table written anew."""

    def table(match: re.Match) -> str:
        return f"<!-- {match[1]} -->\n{TABLES[match[1]](reports)}\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- ([a-z ]+) -->\n.*?<!-- /\1 -->", table, page, flags=re.DOTALL)


def read_reports() -> list[Report]:
    names = ("faithfulness.json", "faithfulness-other.json")
    return [json.loads((HERE / name).read_text(encoding="utf-8")) for name in names]


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), read_reports()), encoding="utf-8")
