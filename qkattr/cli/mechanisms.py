"""`qkattr mechanisms`: the parallel reasons of one score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkattr.cli import common
from qkattr.cli.question import PlaceOptions, Question
from qkattr.errors import InputError, quoted

if TYPE_CHECKING:
    from qkattr.analyses.mechanisms import MechanismTable
    from qkattr.subject import HasSubject


def mechanisms(
    asked: Question,
    place: PlaceOptions,
    more: Annotated[
        Path | None,
        typer.Option(
            help="A file of further prompts, one on each line; their terms are added.",
            show_default=False,
        ),
    ] = None,
    features: Annotated[
        bool, typer.Option("--features", help="Search only pairs of two features.")
    ] = False,
    top: Annotated[
        int,
        typer.Option(
            min=1, max=4096, help="The number of mechanisms, and of components of each, to list."
        ),
    ] = 6,
    figure: common.Figure = None,
    labels: common.LabelsOption = None,
) -> None:
    """Split a head's score into independent groups of feature pairs (by singular values)."""
    others = [] if more is None else _prompts(more, asked)

    def find(subject: HasSubject) -> MechanismTable:
        from qkattr.analyses.mechanisms import mechanisms
        from qkattr.subject import subject as open_prompt

        bundle, of = subject.subject.bundle if others else None, asked.components
        every = [open_prompt(bundle, text, **of) for text in others]  # pyright: ignore
        return mechanisms([subject, *every], **vars(place), top=top, features=features)

    show_found = lambda found: show(found, top)
    asked.answer(find, show_found, place=place, labels=labels, figure=figure)


def _prompts(path: Path, asked: Question) -> list[str]:
    from qkattr.files import read_text

    if asked.is_folder:
        raise InputError("--more goes with a prompt, not with a folder; give the prompt's text")
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} holds no prompts; write one on each line")
    return lines


def show(found: MechanismTable, top: int) -> None:
    """Each mechanism with what it carries and its components."""
    from qkattr.cli.show import console, percent, say, show_table
    from qkattr.export.summary import component

    out = console()
    at = lambda p: f"{quoted(found.tokens[p])} {p}"
    over = "" if found.n_prompts == 1 else f", summed over {found.n_prompts} prompts"
    say(
        out,
        f"Head {found.layer}.{found.head} at {at(found.query)} looks at {at(found.key)}: "
        f"score {found.score:.4f}{over}",
    )
    if found.features:
        say(
            out,
            f"pairs of two features {found.score - found.rest:+.4f}, which are decomposed; all "
            f"others {found.rest:+.4f}",
        )
    say(
        out,
        f"effective rank {found.rank:.2f}; terms between different mechanisms "
        f"{percent(found.cross)} of the absolute sum; with an error slot "
        f"{percent(found.error_share)} of all terms'",
    )
    rows = [
        (
            i,
            f"{m['sigma']:.3f}",
            percent(m["share"]),
            f"{m['carried']:+.4f}",
            ", ".join(f"{c['weight']:+.2f} {component(c)}" for c in m["query"][:top]),
            ", ".join(f"{c['weight']:+.2f} {component(c)}" for c in m["key"][:top]),
        )
        for i, m in enumerate(found.mechanisms)
    ]
    columns = ("", "sigma|", "of sigma^2|", "carries|", "query side", "key side")
    show_table(out, "Mechanisms", columns, rows)
