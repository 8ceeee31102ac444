"""`qkattr tokens`: the positions of a prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from qkattr.cli import common, options
from qkattr.errors import quoted


def tokens(
    prompt: Annotated[str, typer.Argument(help="The text.")],
    model: options.Saes = options.Saes(),
    reading: options.Prompt = options.Prompt(),
    json: common.Json = False,
) -> None:
    """List the positions and tokens of PROMPT as the model sees them."""

    bundle = model.open()
    token_ids, done = bundle.tokenize(reading.read(prompt), reading.bos)
    texts = bundle.tokens(token_ids)
    if json:
        rows = [
            dict(position=i, id=int(t), token=text)
            for i, (t, text) in enumerate(zip(token_ids, texts, strict=True))
        ]
        common.print_json(dict(bos=done, tokens=rows), bundle.notes)
        return
    from qkattr.characters import shown
    from qkattr.cli.show import console, show_table

    columns = zip(token_ids, shown(texts), strict=True)
    rows = [(i, t, quoted(text)) for i, (t, text) in enumerate(columns)]
    show_table(console(), f"{len(rows)} tokens, {done}", ("position|", "id|", "token"), rows)
