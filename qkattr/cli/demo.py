"""`qkattr demo`: one sentence, traced with the model and the SAEs known by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qkattr.cli import options, trace

PROMPT = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"


def demo(
    out: Annotated[Path, typer.Option(help="The folder for the page and its data.")] = Path("demo"),
) -> None:
    """Trace a sentence about Aunt Sally through smollm2, and write the page to open."""
    trace.trace(PROMPT, options.Saes(model="smollm2", saes="smollm2"), out=out)
