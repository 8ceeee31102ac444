"""`qkattr why`: why a head looked here and not elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qkattr.cli import common, options, place
from qkattr.errors import printable, quoted

if TYPE_CHECKING:
    from qkattr.analyses.why import Why


def why(
    context: typer.Context,
    prompt: place.PromptOrFolder,
    layer: place.Layer,
    head: place.Head,
    query: place.Query,
    key: place.Key,
    form: Annotated[
        str, typer.Option(help="What is decomposed: odds, log(A / (1 - A)), or log, log A.")
    ] = "odds",
    model: options.Saes = options.Saes(),
    top: Annotated[int, typer.Option(min=1, max=4096, help="Rows of each list.")] = 12,
    figure: place.Figure = None,
    labels: common.Labels = None,
    all: common.All = False,
    reading: options.Subject = options.Subject(),
    json: common.Json = False,
) -> None:
    """Why a head looked at one key and not at the others, term by term."""
    from qkattr.analyses.why import check_form
    from qkattr.analyses.why import why as decompose

    check_form(form)
    place.check_figure(figure)
    with common.progress() as progress:
        subject, given, components = place.open_subject(
            context, prompt, (layer, head, query, key), model=model, reading=reading,
            labels=labels, progress=progress,
        )  # fmt: skip
        found = decompose(
            subject, given, layer=layer, head=head, query=query, key=key, form=form, top=top,
            folded=not (all or json), progress=progress, **components,
        )  # fmt: skip
        if figure is not None:
            from qkattr.export.qk_figures import why_figure

            progress("drawing")
            why_figure(found, figure)
    if json:
        common.print_json(found.to_json(), subject.notes)
        return
    show(found, top, all)
    if figure is not None:
        print(printable(f"Drawn: {figure}"))


def show(found: Why, top: int, all: bool = False) -> None:
    """The keys, what pushes, what holds back, and the duels with the other keys."""
    from qkattr.cli.show import bar, console, percent, say, show_table
    from qkattr.export.qk_rows import folded_line
    from qkattr.export.summary import component

    out, tokens = console(), found.tokens
    at = lambda p: f"{quoted(tokens[p])} {p}"
    say(
        out,
        f"Head {found.layer}.{found.head} at {at(found.query)}: attention {found.probability:.4f} "
        f"to {at(found.key)}",
    )
    left = "log(A / (1 - A))" if found.form == "odds" else "log A"
    say(
        out,
        f"{left} = {found.value:+.4f}: rows sum to {found.sum:+.4f}, less an entropy of "
        f"{found.entropy:.4f}. Rows with an error slot: {percent(found.error_share)} of the "
        "absolute sum",
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
    for title, listed in (
        ("Holds it back: pairs, summed over keys", found.pulls),
        ("Pushes it: pairs, summed over keys", found.pushes),
    ):
        rows = [
            (component(r["query"]), component(r["key"]), _positions(r["at"]), f"{r['value']:+.4f}")
            for r in listed[:top]
        ]
        show_table(out, title, ("query side", "key side", "at", "value|"), rows)
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
    show_table(out, "Key-side components, over all keys", ("component", "at", "value|"), rows)
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
