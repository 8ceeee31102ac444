"""What the commands about one place share: its options, and what the library takes from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkattr.cli import common

if TYPE_CHECKING:
    from qkattr.load.bundle import Bundle, Prompt
    from qkattr.result import Result

PromptOrFolder = Annotated[
    str, typer.Argument(metavar="PROMPT|DIR", help="Text, or a folder of `qkattr trace`.")
]
Layer = Annotated[int, typer.Option(help="Block.")]
Head = Annotated[int, typer.Option(help="Query head.")]
Query = Annotated[
    str, typer.Option(help='Position: index, negative index, or token text (" Aunt#2").')
]
Key = Annotated[str, typer.Option(help="Position that it looked at.")]
Figure = Annotated[
    Path | None, typer.Option(help="Draw into this .svg, .png or .pdf.", show_default=False)
]


def check_figure(path: Path | None) -> None:
    """Fail before the work where a figure could not be written."""
    if path is not None:
        from qkattr.export.figures import check_figure as check
        from qkattr.export.folder import check_writable

        check(path)
        check_writable(path.parent)


def open_subject(
    context: typer.Context,
    prompt: str,
    place: tuple,
    *,
    model,
    saes,
    dtype,
    missing,
    ids,
    sink,
    bos,
    progress,
) -> tuple[Result | Bundle, Prompt | None, dict[str, Any]]:
    """A result joined with its model, or a bundle with a prompt and its options; the place is
    checked before weights are read."""
    if common.is_result(prompt):
        from qkattr.scores import place_in

        result = common.open_saved(prompt, context)
        place_in(result, place)
        progress("loading the model")
        return common.with_model(result, model, saes), None, {}
    from qkattr.scores import find_place_in
    from qkattr.session import token_texts

    given = common.read_prompt(prompt, ids)
    bundle = common.open_model(model, saes, dtype, missing)
    find_place_in(bundle.config, token_texts(bundle, bundle.tokenize(given, bos)[0]), place)
    return bundle, given, dict(sinks=sink, bos=bos)
