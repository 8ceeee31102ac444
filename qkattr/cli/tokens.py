"""`qkattr tokens`: the positions of a prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from qkattr.cli import common
from qkattr.errors import quoted


def tokens(
    prompt: Annotated[str, typer.Argument(help="The text.")],
    model: common.Model = None,
    saes: Annotated[
        str | None,
        typer.Option("--saes", "-s", help="Tokenize as for these SAEs.", show_default=False),
    ] = None,
    bos: common.Bos = None,
    ids: common.Ids = False,
    json: common.Json = False,
    missing: common.Missing = "error",
) -> None:
    """Positions and tokens of PROMPT as the model sees it."""
    from qkattr.session import token_texts

    bundle = common.open_model(model, saes, missing=missing)
    token_ids, done = bundle.tokenize(common.read_prompt(prompt, ids), bos)
    texts = token_texts(bundle, token_ids)
    if json:
        rows = [
            dict(position=i, id=int(t), token=text)
            for i, (t, text) in enumerate(zip(token_ids, texts, strict=True))
        ]
        common.print_json(dict(bos=done, tokens=rows))
        return
    from qkattr.cli.show import console, show_table

    rows = [(i, t, quoted(text)) for i, (t, text) in enumerate(zip(token_ids, texts, strict=True))]
    show_table(console(), f"{len(rows)} tokens, {done}", ("position|", "id|", "token"), rows)
