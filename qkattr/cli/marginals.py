"""`qkattr marginals`: where all heads look on a prompt, and which components make them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkattr.cli import common
from qkattr.cli.question import Question, check_head_of
from qkattr.errors import quoted

if TYPE_CHECKING:
    from qkattr.analyses.marginals import Looks
    from qkattr.subject import HasSubject


def marginals(
    asked: Question,
    attention: Annotated[
        float, typer.Option(help="The least attention to list, from 0 to 1.")
    ] = 0.3,
    layer: Annotated[
        int | None, typer.Option(help="List only this block.", show_default=False)
    ] = None,
    head: Annotated[
        int | None,
        typer.Option(help="List only this head of the block --layer.", show_default=False),
    ] = None,
    query: Annotated[
        str | None, typer.Option(help="List only this query position.", show_default=False)
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="List only this key position.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The largest number of places to list.")] = 30,
    top: Annotated[
        int, typer.Option(min=1, help="The number of marginals to list on each side of a place.")
    ] = 5,
    sinks_too: Annotated[
        bool, typer.Option("--sinks-too", help="List keys that are sinks as well.")
    ] = False,
    figure: common.Figure = None,
    labels: common.LabelsOption = None,
) -> None:
    """List every place of a prompt where a head looks, with the components that make it look."""
    check_head_of(layer, head)

    def find(subject: HasSubject) -> Looks:
        from qkattr.analyses.marginals import marginals

        where: dict[str, Any] = dict(layer=layer, head=head, query=query, key=key)
        how: dict[str, Any] = dict(attention=attention, limit=limit, top=top, sinks_too=sinks_too)
        return marginals(subject, **where, **how)

    asked.answer(find, show, labels=labels, figure=figure)


def show(found: Looks) -> None:
    """A row a place, with the two largest marginals of either side."""
    from qkattr.cli.show import console, say, show_table
    from qkattr.export.summary import component

    out = console()
    keys = "keys that are sinks left out" if found.sinks_left_out else "sinks too"
    say(
        out,
        f"{found.n_places} places with attention of {found.attention:g} or more, {keys}; "
        f"{len(found.places)} listed",
    )
    at = lambda p: f"{quoted(found.tokens[p])} {p}"
    rows = []
    for p in found.places:
        sides = [
            [f"{m['value']:+.2f} {component(m)}" for m in p[f"{side}_marginals"][:2]] + ["", ""]
            for side in ("query", "key")
        ]
        name, numbers = (
            f"{p['layer']}.{p['head']}",
            (f"{p['probability']:.3f}", f"{p['score']:+.2f}"),
        )
        rows.append((name, at(p["query"]), *numbers, sides[0][0], sides[1][0]))
        rows.append(("", f"to {at(p['key'])}", "", "", sides[0][1], sides[1][1]))
    columns = ("head", "from", "attention|", "score|", "query side", "key side")
    show_table(out, "Where heads look", columns, rows)
