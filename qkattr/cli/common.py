"""What the commands share: what is on the command line, progress, JSON."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Labels = Annotated[
    list[str] | None,
    typer.Option(
        help="Names of features (repeatable): a file (Neuronpedia's .jsonl.gz, CSV, JSON, a graph "
        'JSON), FILE:BOUNDARY, or "neuronpedia".',
        show_default=False,
    ),
]
All = Annotated[
    bool,
    typer.Option(
        "--all", help="Also list rows with bias, error or sink, which are folded into one line."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def is_result(prompt: str) -> bool:
    """Whether PROMPT|DIR names a folder. One without a result is an error, not a prompt."""
    with contextlib.suppress(OSError, ValueError):
        path = Path(prompt)
        if path.is_dir() and ("/" in prompt or (path / "graph.json").is_file()):
            return True
    return False


def given(context: typer.Context, *names: str) -> list[str]:
    """Those of some options that are on the command line, as they are written there."""
    written = {p.name: "/".join((p.opts[0], *p.secondary_opts)) for p in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    # By its name, since some versions of typer bring a click of their own.
    return [written[n] for n, source in sources.items() if source and source.name == "COMMANDLINE"]


def use_compilation_cache() -> None:
    """Keep compiled programs beside the downloaded model, so that the second run starts fast."""
    import jax

    from qkattr.load.smollm2 import cache_folder

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Says which stage is running, on a terminal only, and leaves nothing behind."""
    if not sys.stderr.isatty():
        yield lambda stage: None
        return
    from rich.console import Console

    with Console(stderr=True).status("loading") as status:
        yield lambda stage: status.update(stage)


def print_json(value: dict[str, Any], notes: Sequence[str] = ()) -> None:
    """One JSON object on stdout, in ASCII: safe on any terminal, whatever the prompt holds.

    notes: what is to be known of the model and the SAEs, where there is something.
    """
    from qkattr.export.graph_json import dumps

    print(dumps(value | ({"notes": list(notes)} if notes else {}), ascii=True))
