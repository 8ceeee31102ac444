"""What the commands share: what is on the command line, progress, JSON."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qkattr.errors import InputError, quoted

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


def check_no_folder(prompt: str) -> None:
    """Refuse one word that looks like a folder and is none: it would be explained as text.

    Raises:
      InputError: it has a slash, begins with a dot or ~, is a folder without a result, or is nearly
        the name of a folder here that holds one.
    """
    if not prompt or any(c.isspace() for c in prompt):
        return
    near, no_result = [], False
    with contextlib.suppress(OSError, ValueError):
        here = [path.parent.name for path in Path().glob("*/graph.json")]
        near = difflib.get_close_matches(prompt, here, n=1, cutoff=0.7)
        no_result = Path(prompt).is_dir()
    if near or no_result or "/" in prompt or (prompt[0] in ".~" and len(prompt) > 1):
        what = "a folder without a result" if no_result else "no folder"
        meant = f"; {quoted(near[0])} is one" if near else ""
        raise InputError(
            f"{quoted(prompt)} is {what}{meant}; give a folder that `qkattr trace --out` wrote, or "
            "--as-text if it is the text of a prompt"
        )


def given(context: typer.Context, *names: str) -> list[str]:
    """Those of some options that are on the command line, as they are written there."""
    written = {p.name: "/".join((p.opts[0], *p.secondary_opts)) for p in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    # By its name, since some versions of typer bring a click of their own.
    return [written[n] for n, source in sources.items() if source and source.name == "COMMANDLINE"]


def use_compilation_cache() -> None:
    """Keep compiled programs beside the downloaded model, so that the second run starts fast.

    JAX reads its settings from the environment when it is imported, which is left to whoever needs
    it. What the environment has already stays.
    """
    from qkattr.load.smollm2 import cache_folder

    settings = {
        "jax_compilation_cache_dir": str(cache_folder() / "jax"),
        "jax_persistent_cache_min_compile_time_secs": "0.05",
    }
    for name, value in settings.items():
        os.environ.setdefault(name.upper(), value)
    if (jax := sys.modules.get("jax")) is not None:
        for name in settings:
            kind = type(getattr(jax.config, name))
            text = os.environ[name.upper()]
            jax.config.update(name, float(text) if kind is float else text)


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
