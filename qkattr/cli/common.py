"""What the commands share: what is on the command line, progress, JSON."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from qkattr.errors import printable

FoundT = TypeVar("FoundT")


LabelsOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Names of features (repeatable): a file (Neuronpedia's .jsonl.gz, CSV, JSON, a graph "
        'JSON), FILE:BOUNDARY, or "neuronpedia".',
        show_default=False,
    ),
]
Figure = Annotated[
    Path | None,
    typer.Option(help="Draw a figure into this .svg, .png or .pdf file.", show_default=False),
]
All = Annotated[
    bool,
    typer.Option(
        "--all", help="Also list rows with bias, error or sink, which are folded into one line."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


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


def check_figure(path: Path | None) -> None:
    """Fail before the work where a figure could not be written."""
    if path is not None:
        from qkattr.export.figures import check_figure as check
        from qkattr.files import check_writable

        check(path)
        check_writable(path.parent)


def print_json(value: dict[str, Any], notes: Sequence[str] = ()) -> None:
    """One JSON object on stdout, in ASCII: safe on any terminal, whatever the prompt holds.

    notes: what is to be known of the model and the SAEs, where there is something.
    """
    from qkattr.files import dumps

    print(dumps(value | ({"notes": list(notes)} if notes else {}), ascii=True))


def answer(
    find: Callable[[Callable[[str], None]], FoundT],
    show: Callable[[FoundT], None],
    *,
    json: bool,
    notes: Callable[[], Sequence[str]] = tuple,
    figure: Path | None = None,
    to_json: Callable[[FoundT], dict[str, Any]] = lambda found: found.to_json(),  # pyright: ignore
    drawn: Callable[[FoundT], Any] = lambda found: found,
) -> None:
    """Find something, which is told what to call at each stage; draw it; print it.

    drawn: what of it is drawn.
    """
    check_figure(figure)
    with progress() as stage:
        found = find(stage)
        if figure is not None:
            from qkattr.export.draw import draw

            stage("drawing")
            draw(drawn(found), figure)
    if json:
        print_json(to_json(found), notes())
        return
    show(found)
    if figure is not None:
        print(printable(f"Drawn: {figure}"))
