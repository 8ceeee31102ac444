"""`qkattr pairs`: the strongest pairs over everything, of a prompt or of the weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkattr.cli import common, options, place
from qkattr.errors import InputError, printable, quoted

if TYPE_CHECKING:
    from qkattr.analyses.pairs import TopPairs, WeightPairs
    from qkattr.load.bundle import Bundle

#: Options of one of the two uses.
_PROMPT = ("all", "sink", "bos", "bos_token", "ids")
_WEIGHTS = ("distance", "typical", "text")
#: Rows of a text that are read, at most; norm scales are medians over 128 of them.
ROWS = 4096


def pairs(
    context: typer.Context,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROMPT|DIR]",
            help="A text, or a folder that `qkattr trace` wrote. Without it, the weights "
            "alone are searched.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(help="The block. With a prompt, search this block only.", show_default=False),
    ] = None,
    head: Annotated[
        int | None, typer.Option(help="The query head in the block --layer.", show_default=False)
    ] = None,
    model: options.Saes = options.Saes(),
    top: Annotated[int, typer.Option(help="The number of pairs of either sign to list.")] = 20,
    all: Annotated[
        bool,
        typer.Option(
            "--all",
            help="With a prompt, search pairs with bias, errors, sinks and tokens too.",
        ),
    ] = False,
    distance: Annotated[
        int,
        typer.Option(help="Without a prompt: how many positions the key lies before the query."),
    ] = 1,
    typical: Annotated[
        bool,
        typer.Option(
            "--typical",
            help="Without a prompt: take features at their mean activation instead of one unit.",
        ),
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Without a prompt: measure the norms' usual scales on this text file, or .npy of "
            "token ids [rows, tokens]. Default: those of the SAEs' cards, or 1.",
            show_default=False,
        ),
    ] = None,
    figure: place.Figure = None,
    labels: common.Labels = None,
    reading: options.Asked = options.Asked(),
    json: common.Json = False,
) -> None:
    """The strongest feature pairs over all heads and places of a prompt; or, without one, of a head
    over the whole dictionary."""
    from qkattr.analyses import pairs as analyses

    analyses.check_top(top)
    place.check_figure(figure)
    place.check_head_of(layer, head)
    asked = common.given(context, *(_WEIGHTS if prompt is not None else _PROMPT))
    if asked:
        other = "without" if prompt is not None else "with"
        raise InputError(f"{asked[0]} goes {other} a prompt; leave it out")
    how = dict(layer=layer, head=head, top=top)
    with common.progress() as progress:
        if prompt is None:
            subject, found = _of_weights(how, model, labels, text, distance, typical, progress)
            draw, say = "weights_figure", show_weights
        else:
            subject, given, components = place.open_subject(
                context, prompt, None, model=model, reading=reading,
                labels=labels, progress=progress,
            )  # fmt: skip
            found = analyses.top_pairs(
                subject, given, **how, features=not all, progress=progress, **components
            )
            draw, say = "pairs_figure", show
        if figure is not None:
            from qkattr.export import qk_figures

            progress("drawing")
            getattr(qk_figures, draw)(found, figure)
    if json:
        common.print_json(found.to_json(), subject.notes)
        return
    say(found)
    if figure is not None:
        print(printable(f"Drawn: {figure}"))


def _of_weights(
    how: dict[str, Any], model: options.Saes, labels, text, distance, typical, progress
) -> tuple[Bundle, WeightPairs]:
    """The bundle and what was found."""
    from qkattr.analyses.pairs import check_weight_place, weight_pairs

    if how["layer"] is None or how["head"] is None:
        raise InputError(
            "without a prompt, pairs looks at the weights of one head; give --layer and --head, or "
            "a prompt"
        )
    model.check_both()
    bundle = model.open()
    check_weight_place(bundle, how["layer"], how["head"], distance)
    if labels:
        from qkattr.labels.read import labelled

        bundle = labelled(bundle, labels, progress)
    norms = None
    if text is not None:
        import numpy as np

        from qkattr.cli.text import cut_rows, read_text
        from qkattr.features.norms import norm_scales

        progress("norm scales")
        norms = norm_scales(bundle, np.array(cut_rows(bundle, read_text(text), None, ROWS)))
    progress("pairs")
    source = None if text is None else str(text)
    how |= dict(distance=distance, typical=typical, norms=norms, source=source)
    return bundle, weight_pairs(bundle, **how)


def show(found: TopPairs) -> None:
    """Both lists, with where each pair is and what the head made of it."""
    from qkattr.cli.show import bar, console, percent, say, show_table
    from qkattr.export.summary import component

    out = console()
    of = "pairs of two features" if found.features else "pairs of components"
    heads = f"{len(found.heads)} head{'s' * (len(found.heads) != 1)}"
    say(out, f"{found.searched:,} terms searched: {of} of {heads} at all places")
    if found.features:
        left_out = "bias, errors and sinks are left out (--all lists them)"
        say(out, left_out if found.searched else f"No position has features: {left_out}")
    else:
        say(out, f"Error slots have {percent(found.error_share)} of the sum of |value| listed")
    at = lambda c: f"{quoted(c['token'])} {c['position']}"
    for title, listed in (("Strongest", found.positive), ("Most negative", found.negative)):
        most = max((abs(p["value"]) for p in listed), default=1.0)
        rows = [
            (
                f"{p['layer']}.{p['head']}",
                f"{component(p['query'])} at {at(p['query'])}",
                f"{component(p['key'])} at {at(p['key'])}",
                f"{p['value']:+.3f}",
                f"{p['score']:+.2f}",
                f"{p['probability']:.3f}",
                bar(p["value"], most, 8),
            )
            for p in listed
        ]
        columns = ("head", "query side", "key side", "value|", "score|", "attention|", "")
        show_table(out, title, columns, rows)


def show_weights(found: WeightPairs) -> None:
    """Both lists, and under which scales."""
    from qkattr.cli.show import bar, console, say, show_table
    from qkattr.export.summary import component

    out, scales = console(), found.scales
    unit = "at their mean activations" if found.typical else "of one unit each"
    say(
        out,
        f"Head {found.layer}.{found.head}, key {found.distance} before the query: "
        f"{found.width} x {found.width} features, {unit}",
    )
    usual = f"{scales['attn']:.3g} (input), {scales['q']:.3g} (q), {scales['k']:.3g} (k)"
    known = f"medians over {scales['source']}: {usual}"
    unknown = "not known and taken as 1: values compare within this head only"
    say(out, f"Norm scales {known if scales['source'] else unknown}")
    for title, listed in (("Strongest", found.positive), ("Most negative", found.negative)):
        most = max((abs(p["value"]) for p in listed), default=1.0)
        rows = [
            (
                component(p["query"]),
                component(p["key"]),
                f"{p['value']:+.4g}",
                bar(p["value"], most),
            )
            for p in listed
        ]
        show_table(out, title, ("query side", "key side", "value|", ""), rows)
