"""`qkattr heads`: the heads that matter to the target, between two positions or anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkattr.cli import common
from qkattr.cli.question import Question
from qkattr.errors import InputError, one_of

if TYPE_CHECKING:
    from qkattr.api import Result
    from qkattr.result import PlaceRow
    from qkattr.subject import HasSubject, Subject


def heads(
    asked: Question,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help='The source position (the key): an index, or the text of a token (" Aunt#2"). '
            "Without it and --to, the strongest heads anywhere are listed.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--to", help="The target position (the query).", show_default=False),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The number of heads to list. Default: 20, all with --json.",
            show_default=False,
        ),
    ] = None,
    all: common.All = False,
    by: Annotated[
        str,
        typer.Option(help="Rank the heads by masking, effect, influence or attention."),
    ] = "masking",
) -> None:
    """List the heads that matter to the target, between two positions or anywhere, and how strongly
    they looked."""
    from qkattr.result import RANKINGS

    one_of("by", by, RANKINGS)
    if (source is None) != (target is None):
        raise InputError("--from and --to go together; give both, or neither for all positions")
    ends = lambda subject: _ends(subject, source, target)

    def find(result: HasSubject) -> tuple[dict[str, Any], str]:
        from qkattr.api import Result

        assert isinstance(result, Result)  # `of` opens one
        report, folded = heads_report(result, source, target, by), ""
        if source is None and not all and not asked.json:
            from qkattr.export.effect_rows import away_from_sinks

            report["heads"], folded = away_from_sinks(result, report["heads"])
        return report, folded

    asked.answer(
        find,
        lambda found: _show(found[0], top or 20, found[1]),
        of=lambda progress: asked.traced(progress, ends),
        to_json=lambda found: {**found[0], "heads": found[0]["heads"][:top]},
    )


def _ends(
    subject: Result | Subject, source: str | None, target: str | None
) -> tuple[int | None, int | None]:
    """Both positions, in the order in which attention runs, or neither."""
    if source is None or target is None:
        return None, None
    s, t = subject.position(source), subject.position(target)
    if s > t:
        raise InputError(
            f"--from {s} comes after --to {t}; attention is causal, give the earlier position first"
        )
    return s, t


def heads_report(
    result: Result, source: str | None, target: str | None, by: str = "masking"
) -> dict[str, Any]:
    """The heads, the strongest first: between two positions with their loadings, or anywhere."""
    s, t = _ends(result, source, target)
    report = dict(tokens=result.tokens, of=result.main_target, by=by, source=s, target=t)
    if s is None or t is None:
        heads = result.head_effects(by=by)
        complete = result.graph.heads.complete
        return dict(report, complete=complete, heads=heads, settings=result.settings)
    loadings = result.head_loadings(source=s, target=t, into="feature")
    heads = [
        row | dict(loading=float(loadings.loadings[row["layer"], row["head"]]))
        for row in _between(result, s, t, by)
    ]
    return dict(
        report,
        into=loadings.into,
        edges=loadings.n_edges,
        residual=loadings.residual,
        mlp=loadings.mlp,
        heads=heads,
        settings=result.settings,
    )


def _between(result: Result, source: int, target: int, by: str) -> list[PlaceRow]:
    if result.graph.heads.complete:
        return result.head_effects(source=source, target=target, by=by)
    from qkattr.analyses.heads import heads_at
    from qkattr.result import measured

    rows = heads_at(result, result, query=target, key=source)
    return sorted(rows, key=lambda row: -abs(measured(row, by)))


def _show(report: dict[str, Any], top: int, folded: str) -> None:
    from qkattr.characters import shown
    from qkattr.cli.show import console, percent, say, show_table
    from qkattr.errors import quoted
    from qkattr.export.effect_rows import ABOUT_HEADS
    from qkattr.graph.accounts import PLACES

    out, tokens = console(), shown(report["tokens"])
    at = lambda p: f"{quoted(tokens[p])} {p}"
    between = report["source"] is not None
    where = f", from {at(report['source'])} to {at(report['target'])}" if between else ""
    rows = [
        (
            f"{h['layer']}.{h['head']}",
            *(() if between else (at(h["key"]), at(h["query"]))),
            f"{h['masking']:+.4g}",
            f"{h['effect']:+.4g}",
            percent(h["influence"]),
            f"{h['score']:.3f}",
            f"{h['probability']:.4f}",
            f"{h['derivative']:+.3g}",
        )
        for h in report["heads"][:top]
    ]
    ends = () if between else ("from", "to")
    columns = ("head", *ends, "masking|", "effect|", "influence|", "score|", "attention|", "slope|")
    show_table(
        out, f"Heads that matter to the {report['of']}{where}, by {report['by']}", columns, rows
    )
    if folded:
        say(out, f"{folded} --all lists them.")
    if not report.get("complete", True):
        say(
            out,
            f"The prompt has more places than a trace keeps; ranked are the {PLACES:,} of every "
            "block with the largest masking.",
        )
    say(
        out,
        f"{ABOUT_HEADS} Slope: how much the target moves with the head's score, with everything "
        "else frozen."
        + ("" if between else " Places where a head looks at its own position are left out."),
    )
