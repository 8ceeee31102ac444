"""`qkattr distance`: what of a score depends on how far back the key lies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qkattr.cli import common
from qkattr.cli.question import PlaceOptions, Question
from qkattr.errors import quoted

if TYPE_CHECKING:
    from qkattr.analyses.distance import Distance
    from qkattr.subject import HasSubject


def distance(
    asked: Question,
    place: PlaceOptions,
    distances: Annotated[
        int | None,
        typer.Option(
            "--max",
            help="The number of distances, from 0 on. Default: 256, or the window.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=4096, help="The number of pairs to list.")] = 12,
    figure: common.Figure = None,
    labels: common.LabelsOption = None,
) -> None:
    """Show a score and its strongest pairs as functions of distance, with all else fixed."""

    def find(subject: HasSubject) -> Distance:
        from qkattr.analyses.distance import distance

        return distance(subject, **vars(place), distances=distances, top=top)

    asked.answer(find, show, place=place, labels=labels, figure=figure)


def show(found: Distance) -> None:
    """The score's split, the score at some distances, and the strongest pairs' split."""
    from qkattr.cli.show import bar, console, say, show_table
    from qkattr.export.summary import component

    out = console()
    at = lambda p: f"{quoted(found.tokens[p])} {p}"
    here = found.query - found.key
    say(
        out,
        f"Head {found.layer}.{found.head} at {at(found.query)} looks at {at(found.key)}, "
        f"{here} back: score {found.score:.4f} = {found.invariant:+.4f} on average over distances "
        f"0 to {len(found.score_profile) - 1} {found.positional:+.4f} at this one",
    )
    if not found.rotary:
        say(out, "The block has no rotary embedding: its scores depend on distance through "
                 "components alone.")  # fmt: skip
    if found.position:
        say(out, f"Terms with a position embedding on either side: {found.position:+.4f}")
    some = sorted({0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, here})
    some = [d for d in some if d < len(found.score_profile)]
    most = max((abs(found.score_profile[d]) for d in some), default=1.0)
    rows = [
        (f"{d}{' *' if d == here else ''}", f"{v:+.4f}", bar(v, most))
        for d in some
        for v in [found.score_profile[d]]
    ]
    show_table(out, "Score at distance (* the prompt's)", ("distance|", "score|", ""), rows)
    rows = [
        (
            component(p["query"]),
            component(p["key"]),
            f"{p['value']:+.4f}",
            f"{p['mean']:+.4f}",
            f"{p['positional']:+.4f}",
        )
        for p in found.pairs
    ]
    columns = ("query side", "key side", "value|", "mean|", "positional|")
    show_table(out, "Strongest pairs", columns, rows)
