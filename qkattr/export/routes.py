"""Routes as rows for the page, the terminal and the graph JSON: one table a target.

A hop is named by the heads that carry it: the fewest that together carry half of it, at most four.
"""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any

from qkattr.characters import readable
from qkattr.errors import quoted
from qkattr.graph.paths import Hop, Route, target_nodes
from qkattr.kinds import Kind
from qkattr.result import Traced

#: What the named heads of a hop carry of it, and how many are named at most.
HALF, HEADS_NAMED = 0.5, 4
#: Heads with a smaller share of a hop are left out of the graph JSON.
LEAST_LISTED = 0.01
#: Routes of each target in the graph JSON, and on the page.
ROUTES_LISTED = 8

_CAPTION = (
    "A route is a sequence of positions. Its share is the part of this target's influence that "
    "flows along all its paths through the kept edges. A hop between two positions is carried by "
    "heads; named are those that together carry half of it, at most four. Flow has no sign: a path "
    "that speaks against the target counts like one that speaks for it."
)
_ALIKE = (
    " Where the tables of several tokens agree, their routes do not tell these tokens apart; "
    "--contrast explains the difference of two."
)


def about_routes(result: Traced) -> str:
    """What the tables of routes show."""
    logits = int((result.graph.nodes.kind == Kind.LOGIT).sum())
    return _CAPTION + _ALIKE * (logits > 1)


def route_tables(result: Traced, n: int) -> list[dict[str, Any]]:
    """One table a target, the target with most influence first: its name, its influence, and its n
    strongest routes as rows. A target that no route reaches has an empty table."""
    found = {
        target: list(routes) for target, routes in groupby(result.routes(n), lambda r: r.target)
    }
    return [
        dict[str, Any](
            target=target_name(result, node),
            influence=float(result.graph.nodes.influence[node]),
            end=_end(result, node),
            routes=[_row(result, route) for route in found.get(node, [])],
        )
        for node in target_nodes(result.graph)
    ]


def routes_json(result: Traced) -> list[dict[str, Any]]:
    """The `qkattr.routes` of the graph JSON."""
    tables = groupby(result.routes(ROUTES_LISTED), lambda r: r.target)
    return [
        {
            "target": result.node_id(target),
            "routes": [
                {
                    "share": route.share,
                    "positions": list(route.positions),
                    "hops": [_hop_json(hop) for hop in route.hops],
                }
                for route in routes
            ],
        }
        for target, routes in tables
    ]


def _hop_json(hop: Hop) -> dict[str, Any]:
    heads = [{"head": f"{b}.{n}", "share": s} for b, n, s in hop.heads if s >= LEAST_LISTED]
    return {"from": hop.source, "to": hop.target, "heads": heads}


def target_name(result: Traced, node: int) -> str:
    """What a target is called where it stands alone: a logit by its token, a difference by both."""
    label = result.label(node)
    if result.graph.nodes.kind[node] != Kind.LOGIT:
        return label
    token = int(result.graph.nodes.index[node])
    against = {p["id"]: p["against"] for p in result.predictions}.get(token, -1)
    if against < 0:
        return quoted(readable(label))
    other = next(p["token"] for p in result.predictions if p["id"] == against)
    return f"{quoted(readable(label))} less {quoted(readable(other))}"


def _end(result: Traced, node: int) -> str:
    """Where the routes into a target end, in their rows."""
    if result.graph.nodes.kind[node] == Kind.SCORE:
        return "key side" if result.scores[result.graph.nodes.index[node]][4] else "query side"
    return target_name(result, node)


def named_heads(hop: Hop) -> list[tuple[int, int, float]]:
    """The fewest heads that together carry half of a hop, at most four."""
    named, carried = [], 0.0
    for head in hop.heads[:HEADS_NAMED]:
        named.append(head)
        carried += head[2]
        if carried >= HALF:
            break
    return named


def hop_heads(hop: Hop) -> str:
    """The heads of a hop in words."""
    named = named_heads(hop)
    said = [f"{b}.{n} {_percent(share)}" for b, n, share in named]
    rest = 1 - sum(share for *_, share in named)
    if len(hop.heads) > len(named):
        said.append(f"others {_percent(rest)}")
    return ", ".join(said)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _row(result: Traced, route: Route) -> dict[str, Any]:
    """share, and the stations of a route: its positions with the heads that led to each."""
    heads = ["", *map(hop_heads, route.hops)]
    stations = [
        dict(heads=said, position=position, text=result.shown_tokens[position])
        for said, position in zip(heads, route.positions, strict=True)
    ]
    return dict(share=route.share, stations=stations)


def route_lines(row: dict[str, Any], end: str) -> list[str]:
    """A row of a table as text: the route, then a line for every hop."""
    stations: list[dict[str, Any]] = row["stations"]
    route = " → ".join([*(f"{quoted(s['text'])} {s['position']}" for s in stations), end])
    hops = [
        f"  {before['position']} to {after['position']}: {after['heads']}"
        for before, after in pairwise(stations)
    ]
    return [route, *hops]
