"""What the commands about one place share: its options, and what the library takes from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkattr.cli import options
from qkattr.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qkattr.kinds import Place
    from qkattr.load.bundle import Bundle, Prompt
    from qkattr.result import Result

PromptOrFolder = Annotated[
    str, typer.Argument(metavar="PROMPT|DIR", help="A text, or a folder that `qkattr trace` wrote.")
]
Layer = Annotated[int, typer.Option(help="The block.")]
Head = Annotated[int, typer.Option(help="The query head.")]
Query = Annotated[
    str,
    typer.Option(
        help='The query position: an index, a negative index, or the text of a token (" Aunt#2").'
    ),
]
Key = Annotated[str, typer.Option(help="The key position, which the head looked at.")]
Figure = Annotated[
    Path | None,
    typer.Option(help="Draw a figure into this .svg, .png or .pdf file.", show_default=False),
]


def check_figure(path: Path | None) -> None:
    """Fail before the work where a figure could not be written."""
    if path is not None:
        from qkattr.export.figures import check_figure as check
        from qkattr.files import check_writable

        check(path)
        check_writable(path.parent)


def check_head_of(layer: int | None, head: int | None) -> None:
    """Fail where a head is given without its block."""
    if head is not None and layer is None:
        raise InputError("--head is a head of one block; give --layer too")


def open_subject(
    context: typer.Context,
    prompt: str,
    place: tuple | None,
    *,
    model: options.Saes,
    reading: options.Asked,
    progress,
    labels: list[str] | None = None,
    check: Callable[[list[str], Place, Sequence[int]], None] | None = None,
) -> tuple[Result | Bundle, Prompt | None, dict[str, Any]]:
    """A result joined with its model, or a bundle with a prompt and its options; the place, where
    one is asked about, is checked before weights are read, and `check` is called with the tokens,
    the place and every block's window."""
    if reading.is_folder(prompt):
        from qkattr.stored import place_in, windows_of

        result = options.open_saved(prompt, context)
        if place is not None:
            found = place_in(result, place)
            if check is not None:
                check(result.tokens, found, windows_of(result))
        if labels:
            result = relabelled(result, labels)
        progress("loading the model")
        return options.with_model(result, model), None, {}

    given = reading.read(prompt)
    bundle = model.open()
    tokens = bundle.tokens(bundle.tokenize(given, reading.bos)[0])
    if place is not None:
        found = bundle.find_place(tokens, place)
        if check is not None:
            check(tokens, found, bundle.config.windows)
    if labels:
        from qkattr.labels.read import labelled

        bundle = labelled(bundle, labels, progress)
    return bundle, given, reading.components


def relabelled(result: Result, labels: list[str]) -> Result:
    """A saved result with other labels; which features its SAEs have is not known here."""
    from qkattr.labels.read import read_given
    from qkattr.load.registry import Source

    saved = result.settings.get("neuronpedia")
    source = Source.from_json(saved, result.n_blocks) if saved else None
    return result.with_labels(read_given(labels, None, source))
