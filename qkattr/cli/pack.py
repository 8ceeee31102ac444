"""`qkattr pack`: SAEs as one file of a fifth of their size, and what that cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from qkattr.cli import common, options
from qkattr.cli.text import cut_rows, read_text
from qkattr.errors import InputError, printable

_MEASURED = ("unexplained_variance", "loss_recovered")


def pack(
    context: typer.Context,
    saes: Annotated[Path, typer.Argument(help="A folder of SAELens SAEs, one after every block.")],
    out: Annotated[Path, Option(help="The .gguf file to write.", show_default=False)],
    model: options.Model = options.Model(),
    bits: Annotated[int, Option(help="The bits of a weight, 4 or 8.")] = 4,
    wide: Annotated[
        list[int] | None,
        Option(
            help="A boundary whose SAE gets 8 bits in any case (repeatable).", show_default=False
        ),
    ] = None,
    text: Annotated[
        Path | None,
        Option(
            help="Measure what packing costs on this text file, or .npy of token ids [rows, "
            "tokens].",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[int, Option(min=1, help="The largest number of rows of the text to read.")] = 4,
    reading: options.Text = options.Text(),
    missing: options.Missing = "error",
    json: common.Json = False,
) -> None:
    """Pack a folder of SAEs into one GGUF file, for --saes."""
    if saes.is_file():
        raise InputError(f"{str(saes)!r} is a file; give the folder of SAEs to pack")
    for name in common.given(context, "rows", "bos", "bos_token") if text is None else ():
        raise InputError(f"{name} says how --text is measured; give --text, or leave it out")
    model.check()
    with common.progress() as progress:
        passage = None if text is None else read_text(text)
        _check_out(out)
        named = options.Saes(**vars(model), saes=str(saes), missing=missing)
        bundle = named.open()
        wanted = None if passage is None else cut_rows(bundle, passage, reading.bos, rows)
        from qkattr.load.dictionaries.packing import pack_saes

        errors = pack_saes(saes, out, bits=bits, wide=wide or (), progress=progress)
        boundaries = {e.boundary: dataclasses.asdict(e) for e in errors}
        report: dict[str, Any] = dict(file=str(out), bytes=out.stat().st_size)
        if wanted is not None:
            report |= _measure(bundle, out, wanted, boundaries, progress)
    report["boundaries"] = list(boundaries.values())
    if json:
        common.print_json(report, bundle.notes)
    else:
        _show(report)


def _check_out(out: Path) -> None:
    """Fail before the work, not after it."""
    from qkattr.files import check_writable

    if out.suffix != ".gguf" or out.is_dir():
        raise InputError(f"--out {str(out)!r} is not a .gguf file; give another name")
    check_writable(out.parent)


def _measure(bundle, packed: Path, rows: list, boundaries: dict[int, dict], progress) -> dict:
    """Puts what the folder and the packed file explain into `boundaries`; returns what they were
    measured on."""
    from qkattr.features.check import check_saes
    from qkattr.load.dictionaries import load_saes

    before = check_saes(bundle, rows, progress=progress)
    dictionaries = load_saes(packed, bundle.config, missing=bundle.missing)
    changed = dataclasses.replace(
        bundle, dictionaries=dictionaries, read_params=lambda: bundle.params
    )
    after = check_saes(changed, rows, progress=progress)
    for old, new in zip(before["boundaries"], after["boundaries"], strict=True):
        boundaries[old["boundary"]] |= {n: dict(before=old[n], after=new[n]) for n in _MEASURED}
    return dict(rows=len(rows), clean_loss=before["clean_loss"])


def _show(report: dict[str, Any]) -> None:
    from qkattr.cli.show import console, percent, say, show_table

    out, measured = console(), "rows" in report
    columns = ["boundary|", "bits|", "W_enc error|", "W_dec error|"]
    rows = [
        [b["boundary"], b["bits"], percent(b["W_enc"]), percent(b["W_dec"])]
        for b in report["boundaries"]
    ]
    if measured:
        columns += ["unexplained|", "packed|", "recovered|", "packed|", "lost|"]
        for row, b in zip(rows, report["boundaries"], strict=True):
            figures = [b[name][side] for name in _MEASURED for side in ("before", "after")]
            row += ["-" if figure is None else f"{figure:.4f}" for figure in figures]
            lost = _lost(b)
            row.append("-" if lost is None else percent(lost))
    show_table(out, "Packed SAEs: relative error of the weights", columns, rows)
    if measured:
        say(out, _said(report))
    print(printable(f"Wrote {report['file']}: {report['bytes']:,} bytes"))


def _said(report: dict[str, Any]) -> str:
    lost = [share for share in map(_lost, report["boundaries"]) if share is not None]
    if not lost:
        return (
            f"Loss recovered is undefined (-) on these {report['rows']} rows: the mean in place of "
            "the residual stream hardly raises the loss."
        )
    from qkattr.cli.show import percent

    return (
        f"Packing lost {percent(sum(lost) / len(lost))} of the loss recovered on average, "
        f"{percent(max(lost))} at most, on {report['rows']} rows."
    )


def _lost(boundary: dict[str, Any]) -> float | None:
    """The share of the loss recovered that packing lost; None where that is undefined."""
    before, after = (boundary["loss_recovered"][side] for side in ("before", "after"))
    return None if before is None or after is None else (before - after) / max(before, 1e-6)
