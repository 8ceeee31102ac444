"""Routes: every share against all paths of a graph, listed one by one."""

from __future__ import annotations

import dataclasses
import html
from collections import defaultdict

import folders
import numpy as np
import pytest
from tiny import within

import qkattr
from qkattr.export.html import page
from qkattr.export.routes import hop_heads, named_heads, route_tables
from qkattr.graph.paths import Hop, strongest_routes
from qkattr.graph.tables import Edges, Graph, Nodes
from qkattr.kinds import Kind

#: Sums of some thousand float64 products, made in another order.
SUMS = 1e-9
N_HEADS = 3


def graph_of(nodes: list[tuple], edges: list[tuple], lost: float = 0.0) -> Graph:
    """A graph from (boundary, position, kind) and (source, target, block, residual, heads). lost:
    how much more every target's row has than its edges show."""
    boundary, position, kind = (np.array(column) for column in zip(*nodes, strict=True))
    source, target, block, residual, heads = zip(*edges, strict=True)
    heads = np.array(heads, np.float32)
    weight = np.array(residual, np.float32) + heads.sum(1)
    depends = ~np.isin(kind[list(source)], (Kind.BIAS, Kind.CONST))
    absolute = np.full(len(nodes), np.nan)
    for node in set(target):
        of_node = (np.array(target) == node) & depends
        absolute[node] = np.abs(weight[of_node]).sum() * (1 + lost)
    is_target = np.isin(kind, (Kind.LOGIT, Kind.SCORE))
    zeros = np.zeros(len(nodes))
    columns = dict.fromkeys(("activation", "share", "total", "error", "kept"), zeros)
    columns["effect"] = np.zeros((len(nodes), 0))
    influence = np.where(is_target, 1 / max(is_target.sum(), 1), 0.0)
    return Graph(
        nodes=Nodes(
            boundary=boundary, position=position, kind=kind, index=np.arange(len(nodes)),
            influence=influence, absolute=absolute, **columns,
        ),
        edges=Edges(
            source=np.array(source), target=np.array(target), block=np.array(block), weight=weight,
            residual=np.array(residual), mlp=np.zeros(len(edges)), heads=heads,
        ),
        leak=[], replacement=0.0, completeness=0.0,
    )  # fmt: skip


def random_graph(seed: int, blocks: int = 3, positions: int = 4) -> Graph:
    """Two nodes at every place, some of them bias, error or sink; half the edges; two targets."""
    rng = np.random.default_rng(seed)
    kinds = [Kind.FEATURE] * 5 + [Kind.ERROR] * 2 + [Kind.BIAS, Kind.SINK]
    nodes = [
        (b, t, Kind.TOKEN if b == 0 else kinds[rng.integers(len(kinds))])
        for b in range(blocks + 1)
        for t in range(positions)
        for _ in range(1 if b == 0 else 2)
    ]
    edges = []
    for y, (b, t, kind) in enumerate(nodes):
        if b == 0 or kind in (Kind.BIAS, Kind.SINK):
            continue
        for x, (c, s, _) in enumerate(nodes):
            if c != b - 1 or s > t or rng.random() < 0.5:
                continue
            residual = rng.normal() if s == t else 0.0
            edges.append((x, y, c, residual, rng.normal(size=N_HEADS)))
    for kind in (Kind.LOGIT, Kind.SCORE):
        b = blocks if kind == Kind.LOGIT else blocks - 1
        y = len(nodes)
        nodes.append((b, positions - 1, kind))
        edges += [
            (x, y, -1, rng.normal(), np.zeros(N_HEADS))
            for x, (c, s, _) in enumerate(nodes[:-1])
            if (c, s) == (b, positions - 1) and nodes[x][2] not in (Kind.LOGIT, Kind.SCORE)
        ]
    return graph_of(nodes, edges, lost=0.2)


def all_routes(graph: Graph, target: int):
    """`{route: share}` and `{route: {(s, t): {(block, head): flow}}}`, path by path."""
    nodes, edges = graph.nodes, graph.edges
    into = defaultdict(list)
    for e, y in enumerate(edges.target):
        if nodes.kind[edges.source[e]] not in (Kind.BIAS, Kind.CONST):
            into[y].append(e)
    shares: dict = defaultdict(float)
    heads: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(float)))

    def walk(node: int, share: float, path: list[int]) -> None:
        if nodes.boundary[node] == 0 and node != target:
            visited = [int(nodes.position[target])]
            crossings = []
            for e in path:
                s, t = nodes.position[edges.source[e]], nodes.position[edges.target[e]]
                if s != t:
                    visited.append(int(s))
                    crossings.append(e)
            route = tuple(reversed(visited))
            shares[route] += share
            for e in crossings:
                hop = int(nodes.position[edges.source[e]]), int(nodes.position[edges.target[e]])
                part = np.abs(edges.heads[e].astype(float))
                for n, p in enumerate(part / part.sum()):
                    heads[route][hop][int(edges.block[e]), n] += share * p
            return
        for e in into[node]:
            fraction = abs(float(edges.weight[e])) / graph.nodes.absolute[node]
            walk(int(edges.source[e]), share * fraction, [*path, e])

    walk(target, 1.0, [])
    return shares, heads


def check(graph: Graph, n: int = 10_000) -> None:
    """The routes of every target are the n strongest of all, their hops' heads as counted."""
    found = defaultdict(list)
    for route in strongest_routes(graph, n, least=0.0):
        found[route.target].append(route)
    assert found
    for target in np.flatnonzero(np.isin(graph.nodes.kind, (Kind.LOGIT, Kind.SCORE))).tolist():
        shares, heads = all_routes(graph, target)
        expected = sorted(shares.values(), reverse=True)
        routes = found[target]
        assert len(routes) == min(n, len(shares))
        within("strongest", [r.share for r in routes], expected[: len(routes)], SUMS)
        for route in routes:
            within("share", route.share, shares[route.positions], SUMS)
            pairs = list(zip(route.positions, route.positions[1:], strict=False))
            assert [(hop.source, hop.target) for hop in route.hops] == pairs
            for hop in route.hops:
                within("heads", sum(share for *_, share in hop.heads), 1.0, SUMS)
                naive = heads[route.positions][hop.source, hop.target]
                assert {(b, h) for b, h, _ in hop.heads} == set(naive)
                for b, h, share in hop.heads:
                    within("head", share, naive[b, h] / route.share, SUMS)
                assert [s for *_, s in hop.heads] == sorted((s for *_, s in hop.heads))[::-1]


@pytest.mark.parametrize("seed", range(12))
def test_routes_are_sums_over_all_paths(seed):
    check(random_graph(seed))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_first_few_routes_are_the_strongest(n):
    for seed in range(4):
        check(random_graph(seed, positions=5), n)


def test_shares_add_up_to_what_reaches_the_prompt():
    graph = random_graph(3)
    for target in {r.target for r in strongest_routes(graph, 10_000, least=0.0)}:
        routes = [r for r in strongest_routes(graph, 10_000, least=0.0) if r.target == target]
        within(
            "all", sum(r.share for r in routes), sum(all_routes(graph, target)[0].values()), SUMS
        )


def test_weak_routes_are_left_out_by_their_share_of_what_arrives():
    graph = random_graph(1, positions=5)
    every = strongest_routes(graph, 10_000, least=0.0)
    arrives = defaultdict(float)
    for route in every:
        arrives[route.target] += route.share
    kept = strongest_routes(graph, 10_000, least=0.05)
    assert kept == [r for r in every if r.share >= 0.05 * arrives[r.target]]
    assert 0 < len(kept) < len(every)


def planted() -> Graph:
    """Position 1 writes to position 2 in block 0 or block 1, position 2 is read at 3 in block 2.

    The strongest single path crosses in block 0 through head 0: one edge of weight 3. In block 1
    ten features of weight 1 each cross through head 1: together they carry more.
    """
    nodes = [(0, 1, Kind.TOKEN), (0, 2, Kind.TOKEN), (1, 2, Kind.FEATURE)]
    edges = [(0, 2, 0, 0.0, (3, 0, 0))]
    middle = []
    for _ in range(10):
        nodes.append((1, 1, Kind.FEATURE))
        edges.append((0, len(nodes) - 1, 0, 1.0, (0, 0, 0)))
        middle.append(len(nodes) - 1)
    nodes.append((2, 2, Kind.FEATURE))
    name = len(nodes) - 1
    edges.append((2, name, 1, 3.0, (0, 0, 0)))
    edges += [(x, name, 1, 0.0, (0, -1, 0)) for x in middle]
    nodes += [(3, 3, Kind.FEATURE), (3, 3, Kind.LOGIT)]
    edges += [
        (name, len(nodes) - 2, 2, 0.0, (0, 0, -2)),
        (len(nodes) - 2, len(nodes) - 1, -1, 5.0, (0, 0, 0)),
    ]
    return graph_of(nodes, edges)


def test_a_hop_is_named_by_what_its_heads_carry_not_by_the_strongest_path():
    [route] = strongest_routes(planted())
    assert route.positions == (1, 2, 3) and route.share == pytest.approx(1.0)
    first, second = route.hops
    assert [(b, n) for b, n, _ in first.heads] == [(1, 1), (0, 0)]
    assert [share for *_, share in first.heads] == pytest.approx([10 / 13, 3 / 13])
    assert second.heads == ((2, 2, 1.0),)
    assert named_heads(first) == [first.heads[0]]
    assert hop_heads(first) == "1.1 77 %, others 23 %" and hop_heads(second) == "2.2 100 %"


@pytest.mark.parametrize(
    "shares, said",
    [
        ((0.6, 0.4), "0.0 60 %, others 40 %"),
        ((0.3, 0.3, 0.4 / 2, 0.4 / 2), "0.0 30 %, 0.1 30 %, others 40 %"),
        ((0.1,) * 10, "0.0 10 %, 0.1 10 %, 0.2 10 %, 0.3 10 %, others 60 %"),
        ((0.5, 0.5), "0.0 50 %, others 50 %"),
        ((1.0,), "0.0 100 %"),
    ],
)
def test_heads_named_carry_half_or_are_four(shares, said):
    hop = Hop(0, 1, tuple((0, n, share) for n, share in enumerate(shares)))
    assert hop_heads(hop) == said


# On a traced model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("routes")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_saes(root / "saes")
    return qkattr.load(root / "model", root / "saes")


@pytest.mark.parametrize(
    "options", [{}, {"target": ("hi", " hi")}, {"score": (1, 2, -1, 2)}, {"through_qk": 2}]
)
def test_routes_of_a_traced_prompt_are_sums_over_all_paths(bundle, options):
    check(qkattr.trace(bundle, "hi hi 12", qk=0, **options).graph)


@pytest.mark.parametrize(
    "options, names",
    [
        ({"target": ("hi", " hi")}, {"'hi'", "' hi'"}),
        ({"contrast": ("hi", " hi")}, {"'hi' less ' hi'"}),
        (
            {"score": (1, 2, -1, 2)},
            {f"score of 1.2 at 4 to 2, read on its {side} side" for side in ("query", "key")},
        ),
    ],
)
def test_one_table_a_target_with_its_name(bundle, options, names):
    result = qkattr.trace(bundle, "hi hi 12", qk=0, **options)
    tables = route_tables(result, 3)
    assert {table["target"] for table in tables} == names and len(tables) == len(names)
    shown = html.unescape(page(result))
    influence = [table["influence"] for table in tables]
    assert influence == sorted(influence, reverse=True)
    for table in tables:
        assert 0 < len(table["routes"]) <= 3
        assert table["end"] in (table["target"], "query side", "key side")
        assert f"Into <bdi>{table['target']}</bdi>" in shown


def test_routes_of_the_graph_json(bundle):
    result = qkattr.trace(bundle, "hi hi 12", qk=0, target=("hi", " hi"))
    listed = result.to_json()["qkattr"]["routes"]
    ids = {node["node_id"]: node["kind"] for node in result.to_json()["nodes"]}
    assert [ids[table["target"]] for table in listed] == ["logit", "logit"]
    for table in listed:
        shares = [route["share"] for route in table["routes"]]
        assert shares == sorted(shares, reverse=True) and 0 < len(shares) <= 8
        for route in table["routes"]:
            steps = [(hop["from"], hop["to"]) for hop in route["hops"]]
            assert steps == list(zip(route["positions"], route["positions"][1:], strict=False))
            for hop in route["hops"]:
                assert all(head["share"] >= 0.01 for head in hop["heads"])
                assert 0 < sum(head["share"] for head in hop["heads"]) <= 1 + SUMS


def test_a_target_that_nothing_reaches_has_an_empty_table(bundle):
    result = qkattr.trace(bundle, "hi hi 12", qk=0)
    edges = result.graph.edges
    cut = dataclasses.replace(edges, **{
        f.name: getattr(edges, f.name)[edges.block != 0] for f in dataclasses.fields(edges)
    })  # fmt: skip
    result = dataclasses.replace(result, graph=dataclasses.replace(result.graph, edges=cut))
    assert result.routes() == []
    assert all(table["routes"] == [] for table in route_tables(result, 3))
