"""`qkattr check`: do these SAEs belong to this model?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qkattr.cli import common, options
from qkattr.cli.text import cut_rows, read_text


def check(
    model: options.Saes = options.Saes(),
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text file, or .npy of token ids [rows, tokens]. Default: a packaged sample.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of 128 tokens to read, at most.")] = 4,
    reading: options.Text = options.Text(),
    json: common.Json = False,
) -> None:
    """L0, unexplained variance, dead features and loss recovered, boundary by boundary."""
    with common.progress() as progress:
        passage = read_text(text)
        model.check_both()
        bundle = model.open()
        from qkattr.check import check_saes

        report = check_saes(bundle, cut_rows(bundle, passage, reading.bos, rows), progress=progress)
    if json:
        common.print_json(report, bundle.notes)
    else:
        show(report)


def show(report: dict) -> None:
    """The table of a check."""
    from qkattr.cli.show import console, say, show_table

    rows = [
        (
            c["boundary"],
            f"{c['l0']:.1f}" + (f" of {c['l0_release']:.0f}" if c["l0_release"] else ""),
            f"{c['unexplained_variance']:.4f}",
            f"{c['median_relative_error']:.3f}",
            f"{c['dead']}/{c['width']}",
            f"{c['loss']:.3f}",
            f"{c['loss_recovered']:.3f}",
            c["verdict"],
        )
        for c in report["boundaries"]
    ]
    columns = (
        "boundary|",
        "L0|",
        "unexplained|",
        "rel. error|",
        "silent here|",
        "loss|",
        "recovered|",
        "",
    )
    loss = f"clean next-token loss {report['clean_loss']:.3f} nats"
    title = f"SAEs on {report['rows']} rows of text; {loss}"
    out = console()
    show_table(out, title, columns, rows)
    poor = sum(c["verdict"] != "ok" for c in report["boundaries"])
    said = (
        "All boundaries fit." if not poor else f"{poor} boundaries do NOT fit: see the last column."
    )
    say(out, said)
