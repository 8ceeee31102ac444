"""`qkattr heads`: every head's loading between two positions, with its score."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qkattr.cli import common, options


def heads(
    context: typer.Context,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT|DIR", help="Text, or a folder of `qkattr trace`.")
    ],
    source: Annotated[
        str, typer.Option("--from", help='Source position: index, or token text (" Aunt#2").')
    ],
    target: Annotated[str, typer.Option("--to", help="Target position.")],
    model: options.Saes = options.Saes(),
    top: Annotated[
        int | None,
        typer.Option(
            min=1, help="Heads to list. Default: 20, all with --json.", show_default=False
        ),
    ] = None,
    reading: options.Subject = options.Subject(),
    json: common.Json = False,
) -> None:
    """Which heads carried information between two positions, and how strongly they looked."""
    with common.progress() as progress:
        if common.is_result(prompt):
            result = options.open_saved(prompt, context)
            _ends(result.tokens, source, target)
            progress("loading the model")
            result = options.with_model(result, model)
        else:
            from qkattr.analysis import trace
            from qkattr.session import token_texts

            given = reading.read(prompt)
            bundle = model.open()
            tokens = token_texts(bundle, bundle.tokenize(given, reading.bos)[0])
            _ends(tokens, source, target)
            result = trace(bundle, given, progress=progress, qk=0, **reading.components)
        report = heads_between(result, source, target)
    if json:
        common.print_json({**report, "heads": report["heads"][:top]}, result.notes)
    else:
        _show(report, top or 20)


def _ends(tokens: list[str], source: str, target: str) -> tuple[int, int]:
    """Both positions, in the order in which attention runs."""
    from qkattr.errors import InputError
    from qkattr.session import find_position

    s, t = find_position(tokens, source), find_position(tokens, target)
    if s > t:
        raise InputError(
            f"--from {s} comes after --to {t}; attention is causal, give the earlier position first"
        )
    return s, t


def heads_between(result, source: str, target: str) -> dict[str, Any]:
    """The loadings with scores and attention, by falling |loading|."""
    from qkattr.scores import attention_at, need_session

    s, t = _ends(result.tokens, source, target)
    loadings = result.head_loadings(source=s, target=t)
    score, probability = attention_at(need_session(result), t, s)
    rows = [
        {
            **row,
            "score": float(score[row["layer"], row["head"]]),
            "probability": float(probability[row["layer"], row["head"]]),
        }
        for row in loadings.top()
    ]
    return dict(
        tokens=result.tokens,
        source=s,
        target=t,
        edges=loadings.n_edges,
        residual=loadings.residual,
        mlp=loadings.mlp,
        heads=rows,
        settings=result.settings,
    )


def _show(report: dict[str, Any], top: int) -> None:
    from qkattr.cli.show import console, percent, say, show_table
    from qkattr.errors import quoted

    out, tokens = console(), report["tokens"]
    s, t = report["source"], report["target"]
    ends = f"{quoted(tokens[s])} {s} to {quoted(tokens[t])} {t}"
    say(out, f"From {ends}: {report['edges']} edges of the graph")
    rows = [
        (
            f"{h['layer']}.{h['head']}",
            f"{h['loading']:+.5g}",
            percent(h["influence"]),
            f"{h['score']:.3f}",
            f"{h['probability']:.4f}",
        )
        for h in report["heads"][:top]
    ]
    columns = ("head", "loading|", "influence|", "score|", "attention|")
    show_table(out, "Heads by loading, summed over those edges", columns, rows)
