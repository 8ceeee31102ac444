"""`qkattr check`: do these SAEs belong to this model?"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from qkattr.cli import common
from qkattr.errors import InputError


def check(
    model: common.Model = None,
    saes: common.Saes = None,
    text: Annotated[
        Path | None, typer.Option(help="Text file. Default: a packaged sample.", show_default=False)
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of 128 tokens to read, at most.")] = 4,
    bos: common.Bos = None,
    dtype: common.Dtype = "float32",
    json: common.Json = False,
) -> None:
    """L0, unexplained variance, dead features and loss recovered, boundary by boundary."""
    with common.progress() as progress:
        passage = _read(text)
        bundle = common.open_model(common.need_model(model), common.need_saes(saes), dtype)
        from qkattr.check import check_saes

        report = check_saes(bundle, _rows(bundle, passage, bos, rows), progress=progress)
    if json:
        common.print_json(report)
    else:
        show(report)


def _read(path: Path | None) -> str:
    if path is None:
        return resources.files("qkattr").joinpath("sample.txt").read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot read {str(path)!r}: {reason}; give a text file") from e


def _rows(bundle, text: str, bos: bool | None, most: int) -> list[list[int]]:
    """The text cut into rows of one length, each with the BOS that the whole would have."""
    from qkattr.check import ROW

    if not text.strip():
        raise InputError("the text is empty; give at least 16 tokens of text")
    wanted = bundle.bos if bos is None else bos
    ids = bundle.tokenizer.encode(text, bos=wanted) if bundle.tokenizer else None
    if ids is None:
        raise InputError(f"{bundle.model} has no tokenizer that qkattr can read; check needs one")
    first = (
        ids[:1] if bundle.tokenizer.bos_id is not None and ids[0] == bundle.tokenizer.bos_id else []
    )
    body = ids[len(first) :]
    length = min(ROW, bundle.config.context, len(ids)) - len(first)
    starts = range(0, len(body) - length + 1, length)
    return [[*first, *body[i : i + length]] for i in starts][:most]


def show(report: dict) -> None:
    """The table of a check."""
    from qkattr.cli.show import console, say, show_table

    rows = [
        (
            c["boundary"],
            f"{c['l0']:.1f}",
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
