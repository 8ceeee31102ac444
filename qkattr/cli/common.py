"""What the commands share: options, loading, progress, JSON."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkattr.errors import InputError, printable, quoted

if TYPE_CHECKING:
    from qkattr.load.bundle import Bundle, Prompt
    from qkattr.result import Result

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help='"smollm2", a Hugging Face folder, a .gguf file, user/repo of the hub, or a name that '
        "`qkattr models` lists.",
        show_default=False,
    ),
]
Saes = Annotated[
    str | None,
    typer.Option(
        "--saes",
        "-s",
        help='"smollm2", a folder of SAEs (or FOLDER:PATTERN), a packed file, user/repo of the '
        "hub, or a name that `qkattr models` lists.",
        show_default=False,
    ),
]
Missing = Annotated[
    str, typer.Option("--missing", help="A boundary without an SAE: error, or raw, one error node.")
]
Ids = Annotated[bool, typer.Option("--ids", help="PROMPT is token ids, separated by commas.")]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Put a BOS first, or not. Default: as the SAEs or the tokenizer do.",
        show_default=False,
    ),
]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        help="Names of features (repeatable): a file (Neuronpedia's .jsonl.gz, CSV, JSON, a graph "
        'JSON), FILE:BOUNDARY, or "neuronpedia".',
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Of the weights: float32 or bfloat16.")]
Sink = Annotated[
    bool,
    typer.Option(
        "--sink/--no-sink", help="Make position 0 and positions of massive norm one component each."
    ),
]


def read_prompt(text: str, ids: bool) -> Prompt:
    """The prompt as the library takes it."""
    if not ids:
        return text
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError as e:
        raise InputError(
            f"--ids expects token ids separated by commas, as in 1,34,5; got {quoted(text)}"
        ) from e


def is_result(prompt: str) -> bool:
    """Whether PROMPT|DIR names a folder. One without a result is an error, not a prompt."""
    with contextlib.suppress(OSError, ValueError):
        path = Path(prompt)
        if path.is_dir() and ("/" in prompt or (path / "graph.json").is_file()):
            return True
    return False


def need_model(model: str | None) -> str:
    """The model, or an error that says how to give one."""
    if model is None:
        raise InputError(
            '--model is missing; give "smollm2", a Hugging Face folder or a .gguf file'
        )
    return model


def open_model(
    model: str | None, saes: str | None = None, dtype: str = "float32", missing: str = "error"
) -> Bundle:
    """The bundle with its weights still on disk, and JAX's compilation cache switched on."""
    use_compilation_cache()
    from qkattr.load.bundle import open_bundle

    bundle = open_bundle(need_model(model), saes, dtype=dtype, missing=missing)
    for note in bundle.notes:
        print(printable(f"qkattr: note: {note}"), file=sys.stderr)
    return bundle


def need_saes(saes: str | None) -> str:
    """The SAEs, or an error that says how to give them."""
    if saes is None:
        raise InputError(
            '--saes is missing; give "smollm2", a folder of SAEs, one after every block, or a file '
            "that `qkattr pack` wrote"
        )
    return saes


def given(context: typer.Context, *names: str) -> list[str]:
    """Those of some options that are on the command line, as they are written there."""
    written = {p.name: "/".join((p.opts[0], *p.secondary_opts)) for p in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    # By its name, since some versions of typer bring a click of their own.
    return [written[n] for n, source in sources.items() if source and source.name == "COMMANDLINE"]


def open_saved(folder: str, context: typer.Context) -> Result:
    """A saved result, without its model. Options of a prompt do not go with one."""
    from qkattr.export.folder import open_result

    for name in given(context, "ids", "bos", "sink", "dtype", "missing"):
        raise InputError(
            f"{name} goes with a prompt, and {quoted(folder)} is a folder, whose result keeps the "
            f"settings it was traced with; leave {name} out, or give the prompt"
        )
    return open_result(folder)


def with_model(result: Result, model: str | None, saes: str | None) -> Result:
    """A saved result joined with the model and SAEs that it names, or with the ones given."""
    from qkattr.analysis import attach

    settings = result.settings
    missing = settings.get("missing", "error")  # results of before it was a setting have none
    bundle = open_model(
        model or settings["model"], saes or settings["saes"], settings["dtype"], missing
    )
    return attach(result, bundle)


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


def print_json(value: Any) -> None:
    """One JSON object on stdout, in ASCII: safe on any terminal, whatever the prompt holds."""
    from qkattr.export.graph_json import dumps

    print(dumps(value, ascii=True))
