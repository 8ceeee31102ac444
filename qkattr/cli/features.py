"""`qkattr features`: makes feature cards, prints them, searches them, exports them."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from qkattr.cli import common, options
from qkattr.errors import InputError, printable

if TYPE_CHECKING:
    from qkattr.cards.columns import Cards


def features(
    context: typer.Context,
    model: options.Saes = options.Saes(),
    text: Annotated[
        Path | None,
        Option(help="Make cards from this text file, or .npy of token rows.", show_default=False),
    ] = None,
    rows: Annotated[
        int | None,
        Option(min=8, help="The largest number of rows to read. Default: all.", show_default=False),
    ] = None,
    length: Annotated[int, Option(min=2, help="The number of tokens of a row.")] = 128,
    out: Annotated[
        Path | None, Option(help="The .npz file to write the cards to.", show_default=False)
    ] = None,
    batch: Annotated[int, Option(min=1, help="The number of rows to process at a time.")] = 32,
    cards: Annotated[
        Path | None,
        Option(help="The cards to read: a file that --out wrote.", show_default="those of smollm2"),
    ] = None,
    boundary: Annotated[
        int | None, Option(help="The boundary of the feature.", show_default=False)
    ] = None,
    index: Annotated[int | None, Option(help="Print this feature.", show_default=False)] = None,
    search: Annotated[
        str | None, Option(help="List features whose label contains this.", show_default=False)
    ] = None,
    labels: Annotated[
        Path | None,
        Option(
            help="Take labels from this file: Neuronpedia's .jsonl.gz, CSV or JSON.",
            show_default=False,
        ),
    ] = None,
    resid_pre: Annotated[
        bool,
        Option(
            "--resid-pre", help="The SAEs that --labels describes read the stream before a block."
        ),
    ] = False,
    export: Annotated[
        Path | None,
        Option(help="Write one JSON file for each feature into this folder.", show_default=False),
    ] = None,
    reading: options.Text = options.Text(),
    json: common.Json = False,
) -> None:
    """Show what features do on a text: contexts, density, logits, and labels with their quality."""
    asked = {
        "--index": index is not None,
        "--search": search is not None,
        "--labels": labels is not None,
        "--export": export is not None,
    }
    _check(text, cards, boundary, index, resid_pre and labels is None, asked)
    _check_strays(context, making=text is not None, imports=labels is not None)
    if text is not None:
        into = _need_out(out, model)
        _make(
            model,
            text,
            into,
            rows=rows,
            length=length,
            batch=batch,
            bos=reading.bos,
        )
        return
    from qkattr.cards.columns import Cards
    from qkattr.load.smollm2 import packaged_cards

    into = out or cards
    if labels is not None and into is None:
        raise InputError("--out is missing; give the .npz file to write the cards to")
    opened = packaged_cards() if cards is None else Cards.open(cards)
    if labels is not None:
        assert into is not None
        _import(opened, labels, into, resid_pre, boundary)
    elif export is not None:
        _export(opened, export, boundary)
    elif index is not None:
        assert boundary is not None  # checked with the options
        _card(opened, boundary, index, json)
    elif search is not None:
        _search(opened, search, boundary, json)
    else:
        _overview(opened, boundary, json)


def _check(text, cards, boundary, index, stray_pre, asked: dict[str, bool]) -> None:
    if text is not None and cards is not None:
        raise InputError(
            "features makes cards from --text or reads them from --cards; give one of the two"
        )
    given = [name for name, is_given in asked.items() if is_given]
    if text is not None and given:
        raise InputError(
            f"{given[0]} goes with --cards; make the cards first, then ask for what they hold"
        )
    if len(given) > 1:
        raise InputError(
            f"{' and '.join(given)} were given, expected one of them; run the command once for each"
        )
    if index is not None and boundary is None:
        raise InputError("--index names a feature of one boundary; give --boundary too")
    if stray_pre:
        raise InputError(
            "--resid-pre says which stream --labels describes; give --labels, or leave it out"
        )


#: Options that say how cards are made, and those that say what of them is shown.
_MAKING = (
    *("model", "saes", "dtype", "missing", "accept", "bos", "bos_token"),
    *("rows", "length", "batch"),
)
_SHOWING = ("boundary", "json")


def _check_strays(context: typer.Context, *, making: bool, imports: bool) -> None:
    """An option that would change nothing is a misunderstanding: the cards that are shown are not
    of the model that was named."""
    if making:
        for name in common.given(context, *_SHOWING):
            raise InputError(
                f"{name} goes with --cards; make the cards first, then ask for what they hold"
            )
        return
    for name in common.given(context, *_MAKING):
        raise InputError(
            f"{name} goes with --text, from which cards are made; give --text, or leave it out "
            "(cards that are there are read with --cards)"
        )
    if not imports:
        for name in common.given(context, "out"):
            raise InputError(f"{name} goes with --text or --labels; give one of them")


def _need_out(out: Path | None, model: options.Saes) -> Path:
    model.check_both()
    if out is None:
        raise InputError("--out is missing; give the .npz file to write the cards to")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; give the .npz file to write the cards to")
    from qkattr.files import check_writable

    check_writable(out.parent)
    return out


def _make(model: options.Saes, text: Path, out: Path, *, rows, length, batch, bos) -> None:
    with _bar() as progress:
        progress("loading", 0.0)
        bundle = model.open()
        from qkattr.features import ScanConfig, make_cards
        from qkattr.load.text.corpus import read_rows

        wanted = bundle.bos if bos is None else bos
        vocab = bundle.config.vocab
        found = read_rows(text, tokenizer=bundle.tokenizer, length=length, bos=wanted, vocab=vocab)
        state = out.with_name(out.name + ".scan")
        cards = make_cards(
            bundle,
            found[:rows],
            text=text.name,
            config=ScanConfig(batch=batch),
            folder=state,
            progress=progress,
        )
        cards.save(out)
        shutil.rmtree(state, ignore_errors=True)
    size = out.stat().st_size / 1e6
    print(printable(f"Wrote the cards of {len(cards)} features to {out} ({size:.1f} MB)"))


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str, float], None]]:
    """A progress bar, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda stage, done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda stage, done: bar.update(task, description=stage, completed=done)


def _import(cards: Cards, path: Path, out: Path, pre: bool, boundary: int | None) -> None:
    from qkattr.labels.read import read_labels

    widths = {int(b): cards.width(int(b)) for b in cards.boundaries}
    found = read_labels(path, widths, pre=pre, boundary=boundary)
    cards.with_labels(found).save(out)
    print(printable(f"Wrote {len(found)} labels to {out}"))


def _export(cards: Cards, folder: Path, boundary: int | None) -> None:
    from qkattr.export.feature_json import export_features

    with _bar() as progress:
        into = export_features(cards, folder, _boundaries(cards, boundary), progress)
    print(printable(f"Wrote the feature files to {into}"))


def _boundaries(cards: Cards, boundary: int | None) -> list[int]:
    if boundary is None:
        return cards.boundaries.tolist()
    cards.row_of(boundary, 0)
    return [boundary]


def _card(cards: Cards, boundary: int, index: int, json: bool) -> None:
    card = cards.card(boundary, index)
    if json:
        from qkattr.export.feature_json import feature_json

        common.print_json(feature_json(card))
    else:
        from qkattr.cli.card import show_card
        from qkattr.cli.show import console, say

        show_card(card)
        say(console(), cards.origin())


def _search(cards: Cards, text: str, boundary: int | None, json: bool) -> None:
    from qkattr.cli.show import console, show_table
    from qkattr.labels.groups import search_labels

    wanted = set(_boundaries(cards, boundary))
    known = {f: label for f, label in cards.labels().items() if f[0] in wanted}
    found = [(b, i) for b, features in search_labels(known, text).items() for i in features]
    rows = [_found(cards, b, i) for b, i in found]
    if json:
        common.print_json({"features": rows})
        return
    said = (
        (f"{r['boundary']}:{r['index']}", _auc(r["auc"]), _auc(r["strong_auc"]), r["label"])
        for r in rows
    )
    columns = ("feature|", "AUC overall|", "AUC when strong|", "label")
    show_table(console(), f"{len(rows)} features", columns, said)


def _found(cards: Cards, boundary: int, index: int) -> dict[str, Any]:
    card = cards.card(boundary, index)
    auc = dict(auc=card.auc, strong_auc=card.strong_auc)
    return dict(boundary=boundary, index=index, label=card.label, **auc)


def _auc(auc: float | None) -> str:
    return "-" if auc is None else f"{auc:.2f}"


def _overview(cards: Cards, boundary: int | None, json: bool) -> None:
    from qkattr.cli.show import console, percent, say, show_table
    from qkattr.features.overview import overview

    rows = [r for r in overview(cards) if r["boundary"] in _boundaries(cards, boundary)]
    if json:
        common.print_json({"cards": cards.meta, "boundaries": rows})
        return
    out, meta = console(), cards.meta
    columns = (
        *("boundary|", "features|", "silent here|", "density|", "labelled|", "when strong|"),
        "median AUC overall|",
    )
    said = (
        (
            r["boundary"],
            r["features"],
            r["silent"],
            percent(r["density"]),
            r["labelled"],
            r["of_strong"],
            _auc(r["median_auc"]),
        )
        for r in rows
    )
    show_table(out, f"Feature cards of {meta['saes']} for {meta['model']}", columns, said)
    say(out, cards.origin())
    say(
        out,
        "Labelled: features with a rule that separates the held-out positions that activate them "
        "from all others with an AUC of at least 0.7. When strong: the rule does so only for the "
        "strongest fifth of the activations.",
    )
