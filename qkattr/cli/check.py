"""`qkattr check`: do these SAEs belong to this model?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkattr.cli import common, options
from qkattr.cli.text import cut_rows, read_text
from qkattr.errors import printable

if TYPE_CHECKING:
    from qkattr.load.bundle import Bundle
    from qkattr.subject import Stages


def check(
    model: options.Saes = options.Saes(),
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text file, or .npy of token ids [rows, tokens]. Default: a packaged sample.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        int, typer.Option(min=1, help="The number of rows of 128 tokens to read, at most.")
    ] = 4,
    fits: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="An SAE that recovers less of the loss than this does not fit the text.",
        ),
    ] = 0.8,
    reading: options.Text = options.Text(),
    json: common.Json = False,
) -> None:
    """Measure on a text how well the SAE of every boundary fits the model."""
    passage = read_text(text)
    model.check_both()
    opened: list[Bundle] = []

    def find(progress: Stages) -> dict[str, Any]:
        opened.append(model.open())
        from qkattr.features.check import check_saes

        cut = cut_rows(opened[0], passage, reading.bos, rows)
        name = "the packaged sample" if text is None else text.name
        return check_saes(opened[0], cut, text=name, fits=fits, progress=progress)

    notes = lambda: opened[0].notes
    common.answer(find, show, json=json, notes=notes, to_json=lambda report: report)


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
            "-" if c["loss_recovered"] is None else f"{c['loss_recovered']:.3f}",
            _short(c["verdict"]),
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
        "on this text",
    )
    text = f"{report['text']} ({report['rows']} rows, {report['tokens']:,} tokens)"
    loss = f"clean next-token loss {report['clean_loss']:.3f} nats"
    out = console()
    show_table(out, f"SAEs on {printable(text)}; {loss}", columns, rows)
    for sentence in closing(report):
        say(out, sentence)


def _short(verdict: str) -> str:
    """A verdict without the figures that stand beside it in the table."""
    plain = "does not fit this text"
    figures_only = verdict.startswith(plain) and "?" not in verdict
    return plain if figures_only else verdict


def closing(report: dict) -> list[str]:
    """What the table comes to, in sentences."""
    from qkattr.features.check import HURTS

    boundaries = report["boundaries"]
    verdicts = [c["verdict"] for c in boundaries]
    misfits = sum("does not fit this text" in verdict for verdict in verdicts)
    wrong = sum("used wrongly?" in verdict for verdict in verdicts)
    undefined = [str(c["boundary"]) for c in boundaries if c["loss_recovered"] is None]
    said = []
    if misfits:
        said.append(
            f"{misfits} of {len(boundaries)} SAEs do not fit this text: they recover less than "
            f"{report['fits']:g} of the loss or leave all of the variance unexplained. "
            "Explanations of such text rest on error nodes there."
        )
    if wrong:
        said.append(
            f"{wrong} of {len(boundaries)} SAEs may be used wrongly: the last column says why."
        )
    if not misfits and not wrong:
        said.append("All SAEs fit this text. Another text may give other figures.")
    if undefined:
        said.append(
            f"Loss recovered is undefined (-) at boundaries {', '.join(undefined)}: the mean in "
            f"place of the residual stream raises the loss by less than {HURTS:g} nats there, so "
            "that there is nothing to recover. The other columns decide."
        )
    return said
