"""`qkattr mechanisms`: the parallel reasons of one score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkattr.cli import common, options, place
from qkattr.errors import InputError, printable, quoted

if TYPE_CHECKING:
    from qkattr.analyses.mechanisms import MechanismTable


def mechanisms(
    context: typer.Context,
    prompt: place.PromptOrFolder,
    layer: place.Layer,
    head: place.Head,
    query: place.Query,
    key: place.Key,
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
    model: options.Saes = options.Saes(),
    top: Annotated[
        int,
        typer.Option(
            min=1, max=4096, help="The number of mechanisms, and of components of each, to list."
        ),
    ] = 6,
    figure: place.Figure = None,
    labels: common.Labels = None,
    reading: options.Asked = options.Asked(),
    json: common.Json = False,
) -> None:
    """Split a head's score into independent groups of feature pairs (by singular values)."""
    from qkattr.analyses import mechanisms as analyses

    place.check_figure(figure)
    others = [] if more is None else _prompts(more, prompt, reading)
    where = dict(layer=layer, head=head, query=query, key=key)
    with common.progress() as progress:
        subject, given, components = place.open_subject(
            context, prompt, tuple(where.values()), model=model, reading=reading,
            labels=labels, progress=progress,
        )  # fmt: skip
        how = dict(top=top, features=features, progress=progress) | where | components
        if others:
            found = analyses.mechanisms_over(subject, [given, *others], **how)
        else:
            found = analyses.mechanisms(subject, given, **how)
        if figure is not None:
            from qkattr.export.qk_figures import mechanisms_figure

            progress("drawing")
            mechanisms_figure(found, figure)
    if json:
        common.print_json(found.to_json(), subject.notes)
        return
    show(found, top)
    if figure is not None:
        print(printable(f"Drawn: {figure}"))


def _prompts(path: Path, prompt: str, reading: options.Asked) -> list[str]:
    from qkattr.files import read_text

    if reading.is_folder(prompt):
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
