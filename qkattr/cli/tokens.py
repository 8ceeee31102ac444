"""`qkattr tokens`: the positions of a prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from qkattr.cli import common, options
from qkattr.errors import quoted


def tokens(
    prompt: Annotated[str, typer.Argument(help="The text.")],
    model: options.Saes = options.Saes(),
    reading: options.PromptOptions = options.PromptOptions(),
    json: common.Json = False,
) -> None:
    """List the positions and tokens of PROMPT as the model sees them."""

    bundle = model.open()
    ids, done = bundle.tokenize(reading.read(prompt), reading.bos)
    texts = bundle.tokens(ids)
    rows = [
        dict(position=i, id=int(t), token=text)
        for i, (t, text) in enumerate(zip(ids, texts, strict=True))
    ]
    if json:
        common.print_json(dict(bos=done, tokens=rows), bundle.notes)
        return
    from qkattr.characters import shown
    from qkattr.cli.show import console, show_table

    listed = [
        (i, t, quoted(text)) for i, (t, text) in enumerate(zip(ids, shown(texts), strict=True))
    ]
    show_table(console(), f"{len(listed)} tokens, {done}", ("position|", "id|", "token"), listed)
