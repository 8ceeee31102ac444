"""The page: one self-contained HTML file without scripts.

Prompts, tokens and labels are hostile: everything is escaped.
"""

from __future__ import annotations

import functools
from typing import Any

import jinja2

from qkattr import characters
from qkattr.cards.card import Card, Example
from qkattr.characters import joined
from qkattr.errors import quoted
from qkattr.export.effect_rows import ABOUT_HEADS, ACCOUNTED, accounts, in_short, strongest_heads
from qkattr.export.predictions import shown
from qkattr.export.routes import ROUTES_LISTED, about_routes, route_tables
from qkattr.export.summary import (
    both_aucs,
    called,
    component,
    pieces,
    quality,
    strongest_edges,
    visible,
)
from qkattr.qk.rows import (
    MARGINALS_SHOWN,
    PAIRS_SHOWN,
    feature_in,
    folded_line,
    folded_marginal,
    rests_on,
    unfolded,
)
from qkattr.result import Traced

#: Next tokens that are shown beside those that were traced.
PREDICTIONS_SHOWN = 5


def page(result: Traced) -> str:
    """The result as one HTML page."""
    sinks = {s["position"]: len(s["boundaries"]) for s in result.sinks}
    leak = result.graph.leak
    heads, folded = strongest_heads(result)
    return _template().render(
        title="qkattr: " + visible(result.prompt, 80),
        answer=_answer(result),
        bos=result.bos[:1].upper() + result.bos[1:],
        notes=result.notes,
        settings=result.settings,
        provenance=result.provenance,
        prompt=result.prompt,
        cut=joined(result.tokens) != "".join(result.tokens),
        tokens=[dict(text=t, sink=sinks.get(i)) for i, t in enumerate(result.shown_tokens)],
        predictions=shown(result, PREDICTIONS_SHOWN),
        routes=route_tables(result, ROUTES_LISTED),
        about_routes=about_routes(result),
        main=result.main_target,
        in_short=in_short(result),
        heads=heads,
        heads_folded=folded,
        accounted=[name for name, _ in ACCOUNTED],
        accounts=accounts(result),
        qk=[_qk(table) for table in result.qk.values() if not rests_on(table)],
        about_heads=ABOUT_HEADS,
        edges=[
            dict(e, ends=zip((e["source"], e["target"]), e["features"], strict=True))
            for e in strongest_edges(result)
        ],
        cards={feature: _card(card) for feature, card in result.cards.items()},
        leak=leak,
        completeness=result.graph.completeness,
        replacement=result.graph.replacement,
        reached=leak[-1]["token"] + leak[-1]["position"],
        overflow=sum(row["overflow"] for row in leak),
    )


@functools.cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("qkattr", "viewer")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["visible"] = visible
    return environment.get_template("page.html.j2")


def _answer(result: Traced) -> str:
    targets = [p["token"] for p in result.predictions if p["target"]]
    if len(result.scores) and not targets:
        block, head, query, key, _ = result.scores[0]
        tokens = result.shown_tokens
        return f"{block}.{head}: {quoted(tokens[query])} to {quoted(tokens[key])}"
    return targets[0]


def _qk(table) -> dict[str, Any]:
    shown = unfolded(table.pairs)[:PAIRS_SHOWN]
    most = max((abs(p["value"]) for p in shown), default=1.0)
    pairs = [
        dict(
            sides=[_side(table.layer, p[side]) for side in ("query", "key")],
            value=p["value"],
            contrast=p["contrast"],
            effect=p.get("effect"),
            bar=abs(p["value"]) / max(most, 1e-30),
        )
        for p in shown
    ]
    shares = [dict(name=k, **v) for k, v in table.shares.items() if v["absolute"] >= 0.005]
    return dict(
        head=f"{table.layer}.{table.head}",
        query=table.query,
        key=table.key,
        query_token=characters.shown(table.tokens)[table.query],
        key_token=characters.shown(table.tokens)[table.key],
        probability=table.probability,
        score=table.score,
        sum=table.sum,
        target=table.target,
        effect=table.effect,
        derivative=table.derivative,
        n_pairs=table.n_pairs,
        shares=shares,
        pairs=pairs,
        folded=folded_line(table.shares),
        query_marginals=_marginals(table.layer, table.query_marginals),
        key_marginals=_marginals(table.layer, table.key_marginals),
    )


def _side(layer: int, described: dict[str, Any]) -> tuple[str, tuple[int, int] | None]:
    return component(described), feature_in(layer, described)


def _marginals(layer: int, marginals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    shown = [dict(m, side=_side(layer, m)) for m in unfolded(marginals)[:MARGINALS_SHOWN]]
    folded = folded_marginal(marginals)
    return shown + ([] if folded is None else [dict(folded, side=("bias, sink and error", None))])


def _card(card: Card) -> dict[str, Any]:
    contexts = [_context(example, card.max) for example in card.examples]
    return dict(
        card=card,
        called=called(card.label),
        aucs=both_aucs(card),
        quality=quality(card),
        contexts=contexts,
    )


def _context(example: Example, most: float) -> dict[str, Any]:
    """Runs of text of one shade: a context's inactive tokens are one run."""
    runs: list[dict[str, Any]] = []
    for piece in pieces(example):
        if piece.activation <= 0 and not piece.at and runs and not runs[-1]["shade"]:
            runs[-1]["text"] += piece.text
            continue
        shade = min(max(piece.activation, 0) / max(most, 1e-30), 1)
        runs.append(dict(text=piece.text, shade=round(100 * shade), at=piece.at))
    return dict(quantile=example.quantile, activation=example.activation, runs=runs)
