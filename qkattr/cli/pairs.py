"""`qkattr pairs`: the strongest pairs over everything, of a prompt or of the weights alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkattr.cli import common
from qkattr.cli.question import Question, check_head_of
from qkattr.errors import InputError, quoted

if TYPE_CHECKING:
    from qkattr.analyses.pairs import Pairs
    from qkattr.analyses.weights import WeightPairs
    from qkattr.load.bundle import Bundle
    from qkattr.subject import HasSubject, Stages

#: Options of one of the two uses.
_PROMPT = ("all", "sink", "bos", "bos_token", "ids")
_WEIGHTS = ("distance", "typical", "text")
#: Rows of a text that are read, at most; norm scales are medians over 128 of them.
ROWS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaybeQuestion(Question):
    """A question about a prompt, or without one about the weights."""

    prompt: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
        str | None,
        typer.Argument(
            metavar="[PROMPT|DIR]",
            help="A text, or a folder that `qkattr trace` wrote. Without it, the weights "
            "alone are searched.",
            show_default=False,
        ),
    ] = None


def pairs(
    asked: MaybeQuestion,
    layer: Annotated[
        int | None,
        typer.Option(help="The block. With a prompt, search this block only.", show_default=False),
    ] = None,
    head: Annotated[
        int | None, typer.Option(help="The query head in the block --layer.", show_default=False)
    ] = None,
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
    figure: common.Figure = None,
    labels: common.LabelsOption = None,
) -> None:
    """The strongest feature pairs over all heads and places of a prompt; or, without one, of a head
    over the whole dictionary."""
    check_head_of(layer, head)
    of_prompt = asked.prompt is not None
    for name in common.given(asked.context, *(_WEIGHTS if of_prompt else _PROMPT)):
        other = "without" if of_prompt else "with"
        raise InputError(f"{name} goes {other} a prompt; leave it out")
    if of_prompt:

        def find(subject: HasSubject) -> Pairs:
            from qkattr.analyses.pairs import pairs

            return pairs(subject, layer=layer, head=head, top=top, features=not all)

        asked.answer(find, show, labels=labels, figure=figure)
        return
    opened: list[Bundle] = []

    def find_in_weights(progress: Stages) -> WeightPairs:
        opened.append(_open(asked, layer, head, distance))
        how = dict(layer=layer, head=head, top=top, distance=distance, typical=typical)
        return _of_weights(opened[0], how, labels, text, progress)

    notes = lambda: opened[0].notes
    common.answer(find_in_weights, show_weights, json=asked.json, notes=notes, figure=figure)


def _open(asked: MaybeQuestion, layer: int | None, head: int | None, distance: int) -> Bundle:
    """The model and SAEs of a search of weights, checked before they are read."""
    from qkattr.analyses.weights import check_weight_place

    if layer is None or head is None:
        raise InputError(
            "without a prompt, pairs looks at the weights of one head; give --layer and --head, or "
            "a prompt"
        )
    asked.check_both()
    bundle = asked.open()
    check_weight_place(bundle, layer, head, distance)
    return bundle


def _of_weights(
    bundle: Bundle, how: dict[str, Any], labels, text: Path | None, progress: Stages
) -> WeightPairs:
    from qkattr.analyses.weights import weight_pairs

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
    return weight_pairs(bundle, **how, norms=norms, source=None if text is None else str(text))


def show(found: Pairs) -> None:
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
