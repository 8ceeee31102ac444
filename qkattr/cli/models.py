"""`qkattr models`: what is known by name, and what of it is on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkattr.cli import common

if TYPE_CHECKING:
    from qkattr.load.cached import Cached


#: Rows of which everything is said.
FEW = 6


def models(
    search: Annotated[
        str | None,
        typer.Argument(help="List only names that contain this text.", show_default=False),
    ] = None,
    cached: Annotated[
        bool, typer.Option("--cached", help="List only what needs no download.")
    ] = False,
    json: common.Json = False,
) -> None:
    """List models and SAEs that can be named, and which of them are in the hub's cache."""
    from qkattr.load.cached import known_models, known_saes, other_models

    def wanted(rows: list[Cached]) -> list[Cached]:
        text = (search or "").lower()
        found = (r for r in rows if text in r.name.lower() or text in r.repo.lower())
        return [r for r in found if r.size is not None or not cached]

    named, saes = wanted([*known_models(), *other_models()]), wanted(known_saes())
    if json:
        common.print_json(dict(models=[_object(r) for r in named], saes=[_object(r) for r in saes]))
    else:
        _show(named, saes)


def _object(row: Cached) -> dict[str, Any]:
    cached = dict(cached_bytes=row.size, complete=row.complete)
    return dict(name=row.name, repo=row.repo, **cached, **row.facts)


def _show(named: list[Cached], saes: list[Cached]) -> None:
    from qkattr.cli.show import console, say, show_table

    out = console()
    fully = len(named) + len(saes) <= FEW
    rows = [(r.name, r.repo, r.facts["blocks"] or "", _here(r), _said(r, fully)) for r in named]
    columns = ("name", "repository", "blocks|", "cached|", "")
    show_table(out, "Models (--model)", columns, rows)
    rows = [(r.name, r.facts["model"], r.facts["choices"], _here(r), _said(r, fully)) for r in saes]
    columns = ("name", "of model", "choices", "cached|", "")
    show_table(out, "SAEs (--saes), NAME or NAME:CHOICE,CHOICE", columns, rows)
    say(
        out,
        "Any other user/repo or user/repo@revision of the hub may be given as well. "
        "A search that leaves few says what is particular about them.",
    )


def _here(row: Cached) -> str:
    if row.size is None:
        return "-"
    size = f"{row.size / 1e9:.2f} GB" if row.size >= 1e8 else f"{row.size / 1e6:.1f} MB"
    return size if row.complete else f"{size}, in part"


def _said(row: Cached, fully: bool) -> str:
    gated = "gated" if row.facts.get("gated") else ""
    if not fully:
        return gated
    unsure = f"not verified: {row.facts['unsure']}" if row.facts.get("unsure") else ""
    return "; ".join(filter(None, (gated, row.facts["note"], unsure)))
