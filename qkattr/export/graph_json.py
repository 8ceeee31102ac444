"""The graph as JSON: valid against Neuronpedia's graph schema and in circuit-tracer's reader, with
qkattr's own keys beside theirs.

Per node `boundary`, `kind`, `index` (`ctx_idx` is its position); per link `resid`, `mlp` and
`heads`; on top a `qkattr` object. Numbers are rounded to 6 significant digits; the columns beside
it (`graph.npz`) hold them as computed. Where Neuronpedia has the SAEs, `scan` and
`neuronpedia_source_set` say so, and a feature's `layer` is the layer of its source. What viewers
make of the nodes is in `export.viewers`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qkattr.errors import InputError
from qkattr.export.predictions import predictions
from qkattr.export.routes import routes_json
from qkattr.export.summary import name
from qkattr.export.viewers import FEATURE_TYPES, node_layer, node_number, scan_of, source_of
from qkattr.graph.accounts import ACCOUNT_COLUMNS
from qkattr.kinds import Kind
from qkattr.result import Traced

SCHEMA = 3

#: Links listed where nobody says how many, the strongest by influence: a file of a few megabytes,
#: more than a viewer can draw. `graph.npz` has all.
LINKS = 10_000

#: Places of heads listed, the strongest by |effect|; `graph.npz` has more.
HEADS = 1000

#: Pairs and marginals listed of each QK attribution in the file.
LISTED = 100


def check_links(links: Any) -> int | None:
    """How many links to list: a number, None where nobody said, or "all", which is None here.

    Raises:
      InputError: it is none of these.
    """
    if links is None:
        return LINKS
    if links == "all":
        return None
    if type(links) is int and links >= 0:
        return links
    raise InputError(f'links is {links!r:.40}, expected a number of links, or "all"')


def graph_json(result: Traced, links: int | str | None = None) -> dict[str, Any]:
    """The whole file as an object. links: see `check_links`."""
    listed = _listed(result, check_links(links))
    return {
        "metadata": _metadata(result),
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": _nodes(result),
        "links": _links(result, listed),
        "qkattr": header(result, len(listed)),
    }


def header(result: Traced, listed: int) -> dict[str, Any]:
    """The `qkattr` object: everything but nodes and links, of which so many are listed."""
    graph = result.graph
    return {
        "version": result.provenance["qkattr"],
        "schema": SCHEMA,
        "settings": result.settings,
        "provenance": result.provenance,
        "tokens": result.tokens,
        "prompt": result.prompt,
        "token_ids": list(result.token_ids),
        "bos": result.bos,
        "predictions": predictions(result),
        "completeness": graph.completeness,
        "replacement": graph.replacement,
        "targets": _targets(result),
        "account": _account(result),
        "heads": [_rounded(row) for row in result.head_effects(HEADS)],
        "leak": graph.leak,
        "routes": routes_json(result),
        "links": {"listed": listed, "all": len(graph.edges)},
        "sinks": result.sinks,
        "scores": result.scores.tolist(),
        "labels": {f"{b}:{i}": text for (b, i), text in result.labels.items()},
        "vocabulary": {str(i): text for i, text in result.vocabulary.items()},
        "cards": [dataclasses.asdict(card) for card in result.cards.values()],
        "qk": {place: table.to_json(LISTED) for place, table in result.qk.items()},
    }


def _metadata(result: Traced) -> dict[str, Any]:
    scan, source_set = scan_of(result.settings), source_of(result.settings).get("source_set")
    known = {"feature_details": {"neuronpedia_source_set": source_set}} if source_set else {}
    return {
        "slug": f"qkattr-{result.provenance['run']}",
        "scan": scan,
        "transcoder_list": [scan] * (result.n_blocks + 1),  # whose features each layer has
        **known,
        "prompt_tokens": result.tokens,
        "prompt": result.prompt,
        "schema_version": 1,
        "node_threshold": result.options.keep,
        "info": {"generator": {"name": "qkattr", "version": result.provenance["qkattr"]}},
        "generation_settings": {
            "max_n_logits": result.options.max_logits,
            "desired_logit_prob": result.options.logit_mass,
            "max_feature_nodes": result.options.max_rows,
        },
    }


def _targets(result: Traced) -> list[dict[str, Any]]:
    """What the trace started from, in the order of a node's `effects`."""
    graph = result.graph
    value = _significant(graph.effect()).tolist()
    return [
        {"node": result.node_id(i), "value": value[i], "name": result.label(i)}
        for i in graph.targets
    ]


def _account(result: Traced) -> list[dict[str, Any]]:
    """One row a target and boundary, of numbers that add up to the target."""
    account = result.graph.account
    names = {int(i): result.node_id(int(i)) for i in result.graph.targets}
    columns = [getattr(account, name).tolist() for name in ("target", *ACCOUNT_COLUMNS)]
    return [
        {"boundary": b, "node": names[i]}
        | dict(zip(("target", *ACCOUNT_COLUMNS), values, strict=True))
        for b, i, *values in zip(
            account.boundary.tolist(), account.node.tolist(), *columns, strict=True
        )
    ]


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _round(v) if isinstance(v, float) else v for k, v in row.items()}


def _nodes(result: Traced) -> list[dict[str, Any]]:
    pre = source_of(result.settings).get("pre", False)
    probability = {p["id"]: p["probability"] for p in result.predictions}
    effect = _significant(result.graph.effect()).tolist()
    nodes = [_node(result, i, pre, probability) for i in range(len(result.graph.nodes))]
    for node, value in zip(nodes, effect, strict=True):
        node["effect"] = value
    if result.graph.nodes.effect.shape[1] > 1:
        every = _significant(result.graph.nodes.effect).tolist()
        for node, values in zip(nodes, every, strict=True):
            node["effects"] = values
    return nodes


def _node(result: Traced, i: int, pre: bool, probability: dict[int, float]) -> dict[str, Any]:
    graph = result.graph.nodes
    kind, boundary, index = Kind(graph.kind[i]), int(graph.boundary[i]), int(graph.index[i])
    position, node_id, label = int(graph.position[i]), result.node_id(i), result.label(i)
    layer = node_layer(kind, boundary, n_blocks=result.n_blocks, pre=pre)
    node = {
        "node_id": node_id,
        "feature": node_number(kind, layer, index, position),
        "layer": layer,
        "ctx_idx": position,
        "feature_type": FEATURE_TYPES[kind],
        "jsNodeId": node_id,
        "clerp": label if label or kind == Kind.FEATURE else name(result, i),
        "influence": _round(graph.share[i]),
        "boundary": boundary,
        "kind": kind.label,
        "index": index if index >= 0 else None,
        "raw_influence": _round(graph.influence[i]),
    }
    if kind == Kind.FEATURE:
        node["activation"] = _round(graph.activation[i])
    if kind == Kind.LOGIT:
        node["token_prob"] = _round(probability[index])
        node["is_target_logit"] = True
        node["clerp"] = f'Output "{label}" (p={probability[index]:.3f})'
    if np.isfinite(graph.absolute[i]):
        node["total"] = _round(graph.total[i])
        node["kept_share"] = _round(graph.kept[i] / max(graph.absolute[i], 1e-30))
        node["error_share"] = _round(graph.error[i] / max(graph.absolute[i], 1e-30))
    return node


def _links(result: Traced, at: np.ndarray) -> list[dict[str, Any]]:
    edges = result.graph.edges
    names = [result.node_id(i) for i in range(len(result.graph.nodes))]
    columns = zip(
        edges.source[at].tolist(),
        edges.target[at].tolist(),
        edges.block[at].tolist(),
        _significant(edges.weight[at]).tolist(),
        _significant(edges.residual[at]).tolist(),
        _significant(edges.mlp[at]).tolist(),
        _significant(edges.heads[at]).tolist(),
        strict=True,
    )
    return [
        {
            "source": names[source],
            "target": names[target],
            "weight": weight,
            "resid": resid,
            "mlp": mlp,
            "heads": {f"{block}.{n}": v for n, v in enumerate(loadings) if v},
        }
        for source, target, block, weight, resid, mlp, loadings in columns
    ]


def _listed(result: Traced, most: int | None) -> np.ndarray:
    """Which edges the file lists, in their order: all, or the strongest by influence."""
    influence = result.graph.edge_influence()
    if most is None or len(influence) <= most:
        return np.arange(len(influence))
    return np.sort(np.argsort(-influence, kind="stable")[:most])


def _significant(x: np.ndarray, digits: int = 6) -> np.ndarray:
    x = x.astype(float)
    with np.errstate(divide="ignore"):
        power = np.floor(np.log10(np.abs(np.where(x == 0, 1, x))))
    scale = 10.0 ** (digits - 1 - power)
    return np.round(x * scale) / scale


def _round(x: float, digits: int = 6) -> float:
    return float(f"{float(x):.{digits}g}")
