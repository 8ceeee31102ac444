"""`qkattr train`: a dictionary after every block, in one pass."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from qkattr.cli import common, options
from qkattr.errors import InputError, printable, quoted

if TYPE_CHECKING:
    from qkattr.train.run import TrainProgress


def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.toml", help="The TOML file that says what to train.")
    ],
    model: options.Model = options.Model(),
    text: Annotated[
        Path | None,
        Option(
            help="The text to train on: .txt, .jsonl, .jsonl.gz, .parquet, or .npy of token ids.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        Option(
            help="The folder for the SAEs, metrics and checkpoints. A run that was stopped "
            "there is continued.",
            show_default=False,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        Option("--set", help="NAME=VALUE: change a line of the config.", show_default=False),
    ] = None,
    mesh: Annotated[
        str | None,
        Option(
            help="DATA,MODEL: the numbers of devices that share the tokens and the dictionaries.",
            show_default=False,
        ),
    ] = None,
    distributed: Annotated[
        bool,
        Option(
            "--distributed",
            help="This process is one of several: call jax.distributed.initialize().",
        ),
    ] = False,
    reading: options.Text = options.Text(),
) -> None:
    """Train a sparse autoencoder after every block, all of them in one pass over the text."""
    from qkattr.train import need_libraries
    from qkattr.train.config import read_config

    need_libraries()
    if distributed:
        _join_others(mesh)
    cfg = read_config(config, **_changes(set_ or []))
    model.check()
    path, folder = _need(text, "--text", "a text file"), _need(out, "--out", "a folder")
    from qkattr.files import check_writable

    check_writable(folder)
    devices = _mesh(mesh)
    bundle = model.open()
    from qkattr.load.text.corpus import read_rows

    rows = read_rows(
        path, tokenizer=bundle.tokenizer, length=cfg.row, vocab=bundle.config.vocab, bos=reading.bos
    )
    from qkattr.train.run import measure
    from qkattr.train.run import train as run

    with _progress() as progress:
        trained = run(bundle, rows, cfg, out=folder, mesh=devices, progress=progress)
    with common.progress() as stage:
        report = measure(bundle, trained, rows, cfg, out=folder, progress=stage)
    import jax

    if jax.process_index():
        return  # the first process says it for all
    from qkattr.cli.check import show

    show(report)
    written = [folder / "saes", folder / "metrics.json", *_figure(folder, report)]
    print(printable(f"Written: {', '.join(str(path) for path in written)}"))


def _figure(folder: Path, report: dict[str, Any]) -> list[Path]:
    """The run as a figure, where matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return []
    from qkattr.export.training_figure import draw_training

    return [draw_training(folder / "metrics.jsonl", report, folder / "training.svg")]


def _need(path: Path | None, name: str, what: str) -> Path:
    if path is None:
        raise InputError(f"{name} is missing; give {what}")
    return path


def _changes(given: list[str]) -> dict[str, Any]:
    """The values of --set, read as TOML reads them."""
    import tomllib

    changes = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--set expects NAME=VALUE, as in lr=3e-4; got {quoted(item)}")
        try:
            changes[name.strip()] = tomllib.loads(f"value = {value}")["value"]
        except ValueError:
            changes[name.strip()] = value.strip()
    return changes


def _join_others(mesh: str | None) -> None:
    """Join the other processes. Before all else that uses a device, the config's defaults too."""
    if mesh is None:
        raise InputError("--distributed shares one run between processes; give --mesh DATA,MODEL")
    import jax

    try:
        jax.distributed.initialize()
    except (RuntimeError, ValueError) as e:
        reason = str(e).split(". ")[0].rstrip(".")
        raise InputError(
            f"--distributed cannot join other processes ({reason}); start it where JAX finds them "
            "(TPU pods, Slurm, Open MPI, Kubernetes), or leave it out"
        ) from e


def _mesh(given: str | None):
    """The mesh of --mesh DATA,MODEL."""
    if given is None:
        return None
    import jax

    from qkattr.sharding import make_mesh

    sizes = [int(part) if part.strip().isdecimal() else 0 for part in given.split(",")]
    there = jax.device_count()
    if len(sizes) != 2 or min(sizes) < 1 or sizes[0] * sizes[1] != there:
        raise InputError(
            f"--mesh expects DATA,MODEL whose product is the number of devices, {there}; "
            f"got {quoted(given)}"
        )
    return make_mesh(*sizes)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[TrainProgress], None]]:
    """A bar on a terminal; elsewhere a line now and then, so that a log shows that it lives."""
    import jax

    if jax.process_index():
        yield lambda at: None
        return
    if not sys.stderr.isatty():
        yield _line
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("the first buffer")

        def show(at: TrainProgress) -> None:
            bar.update(task, completed=at.step, total=at.steps, description=_said(at))

        yield show


def _line(at: TrainProgress) -> None:
    if at.step % 100 == 0 or at.step == at.steps:
        print(f"{at.step}/{at.steps} steps  {_said(at)}", file=sys.stderr, flush=True)


def _said(at: TrainProgress) -> str:
    def mean(values: list) -> float:
        return sum(values) / len(values)

    return (
        f"{at.rate:,.0f} tokens/s  loss {mean(at.loss):.4f}  "
        f"explained {1 - mean(at.unexplained):.4f}  L0 {mean(at.l0):.1f}  dead {mean(at.dead):.0f}"
    )
