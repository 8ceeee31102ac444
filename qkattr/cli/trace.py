"""`qkattr trace`: the graph of a prompt, its page, and a summary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from qkattr.cli import common, options
from qkattr.errors import InputError, printable, quoted

if TYPE_CHECKING:
    from qkattr.api import Result
    from qkattr.load.bundle import Bundle
    from qkattr.result import Traced
    from qkattr.subject import Stages


def trace(
    prompt: Annotated[str, typer.Argument(help="The text to explain.")],
    model: options.Saes = options.Saes(),
    out: Annotated[
        Path | None,
        Option(
            help="The folder to write graph.json, graph.npz and index.html into.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, Option("--force", help="Write into --out even though it holds other files.")
    ] = False,
    target: Annotated[
        list[str] | None,
        Option(
            help="A next token to explain (repeatable). Default: the likeliest ones.",
            show_default=False,
        ),
    ] = None,
    contrast: Annotated[
        tuple[str, str] | None,
        Option(
            help="Explain the logit of the first token less that of the second.", show_default=False
        ),
    ] = None,
    score: Annotated[
        str | None,
        Option(
            help="Explain an attention score instead of a token: LAYER.HEAD.QUERY.KEY.",
            show_default=False,
        ),
    ] = None,
    through_qk: Annotated[
        int, Option(help="Also trace the attention scores behind the N strongest edges.")
    ] = 0,
    linearisation: Annotated[
        str,
        Option(
            "--linearisation",
            "--linearization",
            help="How the MLP is linearised: jacobian, frozen-gate or half.",
        ),
    ] = "jacobian",
    read: Annotated[
        str,
        Option(help="The direction by which a feature is read as a target: decoder or encoder."),
    ] = "decoder",
    through_errors: Annotated[
        bool,
        Option(
            "--through-errors/--no-through-errors",
            help="Trace on from error nodes to what they come from.",
        ),
    ] = True,
    keep: Annotated[
        float, Option(help="The share of each boundary's influence that the kept nodes carry.")
    ] = 0.95,
    max_rows: Annotated[
        int, Option(help="The largest number of nodes to keep at a boundary.")
    ] = 256,
    max_edges: Annotated[
        int, Option(help="The largest number of edges to keep for one target.")
    ] = 64,
    max_slots: Annotated[
        int,
        Option(
            help="The largest number of features to keep at one position; the rest joins the error."
        ),
    ] = 256,
    max_logits: Annotated[
        int, Option(help="The largest number of next tokens to take as targets.")
    ] = 10,
    logit_mass: Annotated[
        float,
        Option(
            help="Take as targets the likeliest next tokens that together reach this probability."
        ),
    ] = 0.95,
    qk: Annotated[
        int,
        Option(
            help="The number of QK attributions to include, of the heads that carried most to "
            "positions that are no sinks."
        ),
    ] = 8,
    cards: Annotated[
        Path | None,
        Option(
            help="A file of feature cards, which name the features; --saes smollm2 brings its own.",
            show_default=False,
        ),
    ] = None,
    labels: common.LabelsOption = None,
    scan: Annotated[
        str | None,
        Option(
            help="Name of the model in graph.json, as Neuronpedia has it. Default: the one of its "
            "SAEs there, or the last part of --model.",
            show_default=False,
        ),
    ] = None,
    links: Annotated[
        str | None,
        Option(
            help="Links listed in graph.json, the strongest by influence: a number, or all. "
            "Default: 10000; graph.npz has all.",
            show_default=False,
        ),
    ] = None,
    reading: options.ComponentOptions = options.ComponentOptions(),
    precision: Annotated[
        str, Option(help="The precision of matrix products: default, high or highest.")
    ] = "highest",
    json: common.Json = False,
) -> None:
    """Trace the next token of PROMPT back to its tokens, with head loadings and QK attributions."""
    from qkattr.options import TraceOptions, make_options

    model.check_both()
    given = reading.read(prompt)
    settings = dict(
        target=tuple(target or ()),
        contrast=contrast,
        score=_place(score),
        through_qk=through_qk,
        linearisation=linearisation,
        read=read,
        through_errors=through_errors,
        keep=keep,
        max_rows=max_rows,
        max_edges=max_edges,
        max_slots=max_slots,
        max_logits=max_logits,
        logit_mass=logit_mass,
        qk=qk,
        precision=precision,
        **reading.components,
    )
    make_options(TraceOptions, settings)
    written = json or out is not None
    if scan is not None:
        _check_scan(scan, written=written)
    most = None if links is None else _read_links(links, written=written)
    if out is not None:
        from qkattr.export.folder import check_ours
        from qkattr.files import check_writable

        check_ours(out, force=force)
        check_writable(out)

    def find(progress: Stages) -> Result:
        from qkattr.api import trace

        bundle = _named(model.open(), cards, labels, progress)
        result = trace(bundle, given, progress=progress, **settings)
        result = result if scan is None else result.with_scan(scan)
        progress("writing")
        if out is not None:
            result.save(out, links=most)
        return result

    def show(result: Result) -> None:
        summarise(result)
        if out is not None:
            print(printable(f"Open {(out / 'index.html').resolve()}"))

    common.answer(find, show, json=json, to_json=lambda result: result.to_json(links=most))


def _named(bundle: Bundle, cards: Path | None, labels: list[str] | None, progress) -> Bundle:
    """The bundle with what --cards and --labels call its features."""
    if cards is not None:
        from qkattr.labels.read import with_cards

        bundle = with_cards(bundle, cards)
    if labels:
        from qkattr.labels.read import labelled

        bundle = labelled(bundle, labels, progress)
    return bundle


def _check_scan(scan: str, *, written: bool) -> None:
    from qkattr.export.viewers import check_scan

    if not written:
        raise InputError("--scan names the model in graph.json; give --out or --json with it")
    check_scan(scan)


def _read_links(links: str, *, written: bool) -> int | str:
    if not written:
        raise InputError("--links is a number of links in graph.json; give --out or --json with it")
    if links == "all" or (links.isdecimal() and len(links) < 10):
        return links if links == "all" else int(links)
    raise InputError(f"--links expects a number of links, or all; got {quoted(links)}")


def _place(score: str | None) -> tuple[int, int, str, str] | None:
    if score is None:
        return None
    parts = score.split(".", 3)
    try:
        return int(parts[0]), int(parts[1]), parts[2], parts[3]
    except (ValueError, IndexError) as e:
        raise InputError(
            f"--score expects LAYER.HEAD.QUERY.KEY, as in 23.2.-1.6, got {quoted(score)}"
        ) from e


def summarise(result: Traced) -> None:
    """Predictions, the strongest routes, the heads that carried most, and what leaked."""
    from qkattr.characters import readable
    from qkattr.cli.show import console, percent, say, show_table
    from qkattr.export.effect_rows import ABOUT_HEADS, strongest_heads
    from qkattr.export.predictions import shown

    out, graph = console(), result.graph
    say(
        out,
        f"{result.bos[:1].upper()}{result.bos[1:]}. {len(result.tokens)} tokens, "
        f"{len(graph.nodes)} nodes, {len(graph.edges)} edges.",
    )
    rows = [
        (quoted(readable(p["token"])), f"{p['probability']:.4f}", p["note"])
        for p in shown(result, 5)
    ]
    show_table(out, "Next token", ("token", "probability|", ""), rows)
    heads, folded = strongest_heads(result, 8)
    rows = [
        (
            h["head"],
            f"{quoted(h['source'])} {h['key']}",
            f"{quoted(h['target'])} {h['query']}",
            h["masking"],
            h["effect"],
            f"{h['attention']:.3f}",
            percent(h["influence"]),
        )
        for h in heads
    ]
    columns = ("head", "from", "to", "masking|", "effect|", "attention|", "influence|")
    show_table(out, f"Heads that matter to the {result.main_target}", columns, rows)
    say(out, " ".join([ABOUT_HEADS, folded]).strip())
    _account(result, out)
    _routes(result, out)
    _leak(result, out)


def _routes(result: Traced, out, targets: int = 3) -> None:
    """One table for each of the targets with most influence."""
    from qkattr.cli.show import percent, say, show_table
    from qkattr.export.routes import about_routes, route_lines, route_tables

    tables = route_tables(result, 5)
    for table in tables[:targets]:
        rows = []
        for row in table["routes"]:
            route, *hops = route_lines(row, table["end"])
            rows += [(percent(row["share"]), route), *(("", hop) for hop in hops)]
        title = f"Strongest routes into {table['target']} (share of its influence)"
        if rows:
            show_table(out, title, ("share|", "route"), rows)
        else:
            say(out, f"No path from {table['target']} reaches the tokens; see what leaked.")
    say(out, about_routes(result))
    if len(tables) > targets:
        others = ", ".join(table["target"] for table in tables[targets:])
        say(out, f"The page (--out) has those into the other targets too: {others}.")


def _every_fifth(rows: list) -> list:
    return [row for i, row in enumerate(rows) if i % 5 == 0 or i == len(rows) - 1]


def _account(result: Traced, out) -> None:
    from qkattr.cli.show import say, show_table
    from qkattr.export.effect_rows import ACCOUNTED, accounts

    columns = ("boundary|", *(f"{name}|" for name, _ in ACCOUNTED))
    for account in accounts(result):
        rows = [
            (row["boundary"], *(f"{100 * share:.1f} %" for share in row["shares"]))
            for row in _every_fifth(account["rows"])
        ]
        title = f"What the {account['name']} ({account['value']:+.4g}) is made of"
        show_table(out, title, columns, rows)
    say(
        out,
        "Signed shares, at every fifth boundary; each row sums to 100 %. Constants are biases and "
        "what the linearised MLPs do not depend on. Features explain neither errors nor sinks.",
    )


def _leak(result: Traced, out) -> None:
    from qkattr.cli.show import say, show_table

    leak = result.graph.leak
    shown = _every_fifth(leak)
    columns = (
        "boundary|",
        "arriving|",
        "features|",
        "tokens|",
        "errors|",
        "sinks|",
        "dropped|",
        "nodes|",
    )
    rows = [
        (
            r["boundary"],
            f"{r['surviving']:.4f}",
            f"{r['feature']:.4f}",
            f"{r['token'] + r['position']:.4f}",
            f"{r['error']:.4f}",
            f"{r['sink']:.4f}",
            f"{r['dropped']:.4f}",
            f"{r['kept_nodes']}{'+' if r['overflow'] else ''}",
        )
        for r in shown
    ]
    show_table(
        out, "What leaked (shares of the targets' influence; every fifth boundary)", columns, rows
    )
    options = result.options
    say(
        out,
        f"Completeness {result.graph.completeness:.3f}, "
        f"replacement {result.graph.replacement:.4f}. Frozen: patterns, norm scales; "
        f"MLP linearisation {options.linearisation}; "
        f"errors {'are' if options.through_errors else 'are not'} traced through.",
    )
