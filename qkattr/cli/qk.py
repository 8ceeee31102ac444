"""`qkattr qk`: why one head looked where it did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from qkattr.cli import common
from qkattr.cli.question import PlaceOptions, Question
from qkattr.errors import quoted

if TYPE_CHECKING:
    from qkattr.qk.table import QKAttribution
    from qkattr.subject import HasSubject


def qk(
    asked: Question,
    place: PlaceOptions,
    top: Annotated[
        int | None,
        Option(
            min=1,
            help="The number of pairs and of marginals to list. Default: 20, all with --json.",
            show_default=False,
        ),
    ] = None,
    groups: Annotated[
        Path | None,
        Option(
            help="Sum the terms over the groups of features in this TOML file.", show_default=False
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        Option(
            help="Sum the terms over all features whose label contains this text (repeatable).",
            show_default=False,
        ),
    ] = None,
    figure: common.Figure = None,
    labels: common.LabelsOption = None,
    all: common.All = False,
) -> None:
    """Write a head's attention score as a sum over pairs of query-side and key-side components."""
    named = {} if groups is None else _read(groups)
    listed = None if asked.json or named or label else top or 20

    def find(subject: HasSubject) -> QKAttribution:
        from qkattr.api import qk_attribution

        return _enough(subject, place, listed, all) or qk_attribution(subject, **vars(place))

    def sums(table: QKAttribution) -> dict[str, Any]:
        return dict(groups=_sums(table, named, label or ())) if named or label else {}

    def show_found(table: QKAttribution) -> None:
        grouped = sums(table)
        show(table, top or 20, all)
        if grouped:
            show_groups(grouped["groups"])

    asked.answer(
        find, show_found, place=place, labels=labels, figure=figure,
        to_json=lambda table: table.to_json(top) | sums(table),
    )  # fmt: skip


def _enough(
    subject: HasSubject, place: PlaceOptions, listed: int | None, all: bool
) -> QKAttribution | None:
    """What a saved result holds of the place, where that is enough for what is listed."""
    from qkattr.qk.rows import enough_stored
    from qkattr.result import Traced

    if not isinstance(subject, Traced) or listed is None:
        return None
    table = subject.stored(subject.place(**vars(place)), listed)
    return table if table is not None and (all or enough_stored(table, listed)) else None


def _read(path: Path) -> dict[str, Any]:
    from qkattr.labels.groups import read_groups

    return read_groups(path)


def _sums(table: QKAttribution, named: dict[str, Any], label: Sequence[str]) -> dict[str, Any]:
    from qkattr.analyses.groups import grouped

    return grouped(table, named, label)


def show(table: QKAttribution, top: int, all: bool = False) -> None:
    """The score, its shares, the strongest pairs and marginals. Rows with bias, error or sink are
    folded into one line, unless `all`."""
    from qkattr.cli.show import console, percent, say, show_table
    from qkattr.qk.rows import folded_line, rests_on, what_it_moves

    out = console()
    from qkattr.characters import shown

    tokens = shown(table.tokens)
    query, key = (f"{quoted(tokens[p])} {p}" for p in (table.query, table.key))
    say(
        out,
        f"Head {table.layer}.{table.head} at {query} looks at {key}: "
        f"attention {table.probability:.4f}",
    )
    capped = (
        f", capped {table.capped:.4f} with slope {table.slope:.4f}"
        if table.capped != table.score
        else ""
    )
    say(out, f"score {table.score:.4f}{capped}; its {table.n_pairs} terms sum to {table.sum:.4f}")
    if moves := what_it_moves(table):
        say(out, moves)
    rows = [
        (name, f"{s['signed']:+.4f}", percent(s["absolute"])) for name, s in table.shares.items()
    ]
    show_table(out, "Shares", ("query side-key side", "signed|", "of the absolute sum|"), rows)
    sink = rests_on(table)
    if sink and not all:
        say(
            out,
            f"This head rests on {sink}. A sink is one component as a whole, so no pair of "
            "features explains the score. --all lists its rows.",
        )
    else:
        _pairs(table, top, all, out)
        if not all and (folded := folded_line(table.shares)):
            say(out, f"{folded[:1].upper()}{folded[1:]}. --all lists these rows.")
    for side, marginals in (("query", table.query_marginals), ("key", table.key_marginals)):
        if rows := _marginals(marginals, min(top, 8), all):
            columns = ("component", "value|", "contrast|", *_effect_column(table))
            show_table(out, f"Marginals, {side} side", columns, rows)


def _pairs(table: QKAttribution, top: int, all: bool, out) -> None:
    from qkattr.cli.show import bar, show_table
    from qkattr.export.summary import component
    from qkattr.qk.rows import unfolded

    shown = (table.pairs if all else unfolded(table.pairs))[:top]
    most = max((abs(p["value"]) for p in shown), default=1.0)
    rows = [
        (
            component(p["query"]),
            component(p["key"]),
            f"{p['value']:+.4f}",
            f"{p['contrast']:+.4f}",
            *_effect(p),
            bar(p["value"], most),
        )
        for p in shown
    ]
    if rows:
        columns = ("query side", "key side", "value|", "contrast|", *_effect_column(table), "")
        show_table(out, "Pairs", columns, rows)


def _effect(row: dict[str, Any]) -> tuple[str, ...]:
    """Of a pair or a marginal, where a target was traced."""
    return (f"{row['effect']:+.4f}",) if "effect" in row else ()


def _effect_column(table: QKAttribution) -> tuple[str, ...]:
    return ("effect|",) if table.target else ()


def _marginals(marginals: list[dict[str, Any]], top: int, all: bool) -> list[tuple[str, ...]]:
    from qkattr.export.summary import component
    from qkattr.qk.rows import folded_marginal, unfolded

    shown = [(component(m), m) for m in (marginals if all else unfolded(marginals))[:top]]
    folded = None if all or not shown else folded_marginal(marginals)
    shown += [] if folded is None else [("bias, sink and error", folded)]
    return [(said, f"{m['value']:+.4f}", f"{m['contrast']:+.4f}", *_effect(m)) for said, m in shown]


def show_groups(sums: dict[str, Any]) -> None:
    """The group x group table, with its margins."""
    from qkattr.cli.show import console, show_table

    rows = [
        (name, *(f"{v:+.4f}" for v in values), f"{sum(values):+.4f}")
        for name, values in zip(sums["query"], sums["table"], strict=True)
    ]
    columns = [sum(column) for column in zip(*sums["table"], strict=True)]
    rows.append(("all", *(f"{v:+.4f}" for v in columns), f"{sums['sum']:+.4f}"))
    heads = ("query side \\ key side", *(f"{name}|" for name in sums["key"]), "all|")
    show_table(console(), "Groups", heads, rows)
