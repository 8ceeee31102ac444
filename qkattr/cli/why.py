"""`qkattr why`: why a head looked here and not elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkattr.cli import common
from qkattr.cli.question import PlaceOptions, Question
from qkattr.errors import quoted

if TYPE_CHECKING:
    from qkattr.analyses.why import Why
    from qkattr.subject import HasSubject


def why(
    asked: Question,
    place: PlaceOptions,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="POSITION",
            help="Compare the key with this one only: the difference of their two scores.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            help="The quantity to decompose: odds for log(A / (1 - A)), or log for log A."
        ),
    ] = "odds",
    top: Annotated[
        int, typer.Option(min=1, max=4096, help="The number of rows of each list.")
    ] = 12,
    figure: common.Figure = None,
    labels: common.LabelsOption = None,
    all: common.All = False,
) -> None:
    """Explain why a head looked at one key and not at the others, term by term."""

    def find(subject: HasSubject) -> Why:
        from qkattr.analyses.why import why

        how: dict[str, Any] = dict(
            against=against, form=form, top=top, folded=not (all or asked.json)
        )
        return why(subject, **vars(place), **how)

    show_found = lambda found: show(found, top, all)
    asked.answer(find, show_found, place=place, labels=labels, figure=figure)


def show(found: Why, top: int, all: bool = False) -> None:
    """The keys, what pushes, what holds back, and the duels with the other keys."""
    from qkattr.characters import shown
    from qkattr.cli.show import bar, console, percent, say, show_table
    from qkattr.export.summary import component
    from qkattr.qk.rows import folded_line

    out, tokens = console(), shown(found.tokens)
    at = lambda p: f"{quoted(tokens[p])} {p}"
    say(
        out,
        f"Head {found.layer}.{found.head} at {at(found.query)}: attention {found.probability:.4f} "
        f"to {at(found.key)}",
    )
    error = f"Rows with an error slot: {percent(found.error_share)} of the absolute sum"
    if found.against is None:
        left = "log(A / (1 - A))" if found.form == "odds" else "log A"
        say(
            out,
            f"{left} = {found.value:+.4f}: rows sum to {found.sum:+.4f}, less an entropy of "
            f"{found.entropy:.4f}. {error}",
        )
    else:
        say(
            out,
            f"Its score less that of {at(found.against)}, log(A / A') = {found.value:+.4f}: rows "
            f"sum to {found.sum:+.4f}. {error}",
        )
    most = max((abs(k["value"]) for k in found.keys), default=1.0)
    rows = [
        (
            at(k["position"]),
            f"{k['probability']:.4f}",
            f"{k['score']:+.3f}",
            f"{k['value']:+.4f}",
            bar(k["value"], most),
        )
        for k in found.keys[:top]
    ]
    columns = ("key", "attention|", "score|", "part|", "")
    show_table(out, "Keys, and what each one's rows add", columns, rows)
    pulls, pushes = "Holds it back", "Pushes it"
    if found.against is not None:
        pulls, pushes = f"For {at(found.against)}", f"For {at(found.key)}"
    for title, listed in (
        (f"{pulls}: pairs, summed over keys", found.pulls),
        (f"{pushes}: pairs, summed over keys", found.pushes),
    ):
        rows = [
            (
                component(r["query"]),
                component(r["key"]),
                _positions(r["at"]),
                f"{r['value']:+.4f}",
                *((f"{r['effect']:+.4f}",) if found.target else ()),
            )
            for r in listed[:top]
        ]
        effect = ("effect|",) if found.target else ()
        show_table(out, title, ("query side", "key side", "at", "value|", *effect), rows)
    if found.target:
        say(
            out,
            f"Effect: how much the match moves the {found.target} over all keys, to first order.",
        )
    if not all and (folded := folded_line(found.shares, "the sum of rows")):
        say(out, f"{folded[:1].upper()}{folded[1:]}. --all lists these rows.")
    rows = [
        (
            component(f),
            _positions(f["at"]),
            f"{f['value']:+.4f}",
        )
        for f in found.features[:top]
    ]
    over = "all keys" if found.against is None else "both keys"
    show_table(out, f"Key-side components, over {over}", ("component", "at", "value|"), rows)
    if not found.versus:
        return
    rows = [
        (
            at(v["key"]),
            f"{v['probability']:.4f}",
            f"{v['log_ratio']:+.3f}",
            _decided(v["pushes"]),
            _decided(v["pulls"]),
        )
        for v in found.versus
    ]
    columns = ("other key", "attention|", "log ratio|", "for the key", "for the other")
    show_table(out, f"Why {at(found.key)} and not", columns, rows)


def _positions(at: list[int], most: int = 6) -> str:
    return " ".join(map(str, at[:most])) + (" ..." if len(at) > most else "")


def _decided(rows: list[dict], most: int = 2) -> str:
    from qkattr.export.summary import component

    return "; ".join(
        f"{component(r['query'])} x {component(r['key'])} {r['value']:+.3f}" for r in rows[:most]
    )
