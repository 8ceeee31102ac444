"""The graph as JSON: valid against Neuronpedia's graph schema, with qkattr's own keys beside it.

Per node `boundary`, `kind`, `index` (`ctx_idx` is its position); per link `resid`, `mlp` and
`heads`; on top a `qkattr` object. Numbers are rounded to 6 significant digits; the columns beside
it (`graph.npz`) hold them as computed. Where Neuronpedia has the SAEs, `scan` and
`neuronpedia_source_set` say so, and a feature's `layer` is the layer of its source.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np

from qkattr.result import Result
from qkattr.types import Kind

SCHEMA = 2

#: Links listed in the file, the strongest by influence; `graph.npz` has all. Viewers take 100 MB.
LINKS = 200_000

#: Pairs and marginals listed of each QK attribution in the file.
LISTED = 100

_FEATURE_TYPES = {
    Kind.FEATURE: "residual sae",
    Kind.ERROR: "residual reconstruction error",
    Kind.TOKEN: "embedding",
    Kind.POSITION: "embedding",
    Kind.LOGIT: "logit",
    Kind.SCORE: "attention score",
    Kind.BIAS: "bias",
    Kind.CONST: "bias",
    Kind.SINK: "attention sink",
}


def dumps(value: Any, *, ascii: bool = False) -> str:
    """JSON as the standard has it: what is not finite is null."""
    try:
        return json.dumps(value, ensure_ascii=ascii, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=ascii, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def graph_json(result: Result) -> dict[str, Any]:
    """The whole file as an object."""
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
        "links": _links(result),
        "qkattr": header(result),
    }


def header(result: Result) -> dict[str, Any]:
    """The `qkattr` object: everything but nodes and links."""
    graph = result.graph
    return {
        "version": result.provenance["qkattr"],
        "schema": SCHEMA,
        "settings": result.settings,
        "provenance": result.provenance,
        "tokens": result.tokens,
        "token_ids": list(result.token_ids),
        "bos": result.bos,
        "predictions": result.predictions,
        "completeness": graph.completeness,
        "replacement": graph.replacement,
        "leak": graph.leak,
        "links": {"listed": min(LINKS, len(graph.edges)), "all": len(graph.edges)},
        "sinks": result.sinks,
        "scores": result.scores.tolist(),
        "labels": {f"{b}:{i}": text for (b, i), text in result.labels.items()},
        "vocabulary": {str(i): text for i, text in result.vocabulary.items()},
        "cards": [dataclasses.asdict(card) for card in result.cards.values()],
        "qk": {place: table.to_json(LISTED) for place, table in result.qk.items()},
    }


def _metadata(result: Result) -> dict[str, Any]:
    source = _source(result)
    source_set = source.get("source_set")
    known = {"feature_details": {"neuronpedia_source_set": source_set}} if source_set else {}
    return {
        "slug": f"qkattr-{result.provenance['run']}",
        "scan": source.get("scan") or result.settings["model"],
        **known,
        "prompt_tokens": result.tokens,
        "prompt": "".join(result.tokens),
        "schema_version": 1,
        "node_threshold": result.settings["keep"],
        "info": {"generator": {"name": "qkattr", "version": result.provenance["qkattr"]}},
        "generation_settings": {
            "max_n_logits": result.settings["max_logits"],
            "desired_logit_prob": result.settings["logit_mass"],
            "max_feature_nodes": result.settings["max_rows"],
        },
    }


def _source(result: Result) -> dict[str, Any]:
    """Where Neuronpedia has the SAEs; empty where that is not known."""
    return result.settings.get("neuronpedia") or {}


def _layer(kind: Kind, boundary: int, n_blocks: int, before: int) -> str:
    """before: how many boundaries lie before that of layer 0: the SAE of a layer reads the stream
    after its block (1), or before it (0)."""
    if kind == Kind.LOGIT:
        return str(n_blocks + 1)
    if boundary < before or (boundary == 0 and kind != Kind.FEATURE):
        return "E"
    return str(boundary - before)


def cantor(a: int, b: int) -> int:
    return (a + b) * (a + b + 1) // 2 + b


def _nodes(result: Result) -> list[dict[str, Any]]:
    graph, n_blocks = result.graph.nodes, result.n_blocks
    before = 0 if _source(result).get("pre") else 1
    probability = {p["id"]: p["probability"] for p in result.predictions}
    nodes = []
    for i in range(len(graph)):
        kind, boundary, index = Kind(graph.kind[i]), int(graph.boundary[i]), int(graph.index[i])
        node_id = result.node_id(i)
        label = result.label(i)
        node = {
            "node_id": node_id,
            "feature": _feature(kind, boundary, index, int(graph.position[i]), before),
            "layer": _layer(kind, boundary, n_blocks, before),
            "ctx_idx": int(graph.position[i]),
            "feature_type": _FEATURE_TYPES[kind],
            "jsNodeId": node_id,
            "clerp": label,
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
        nodes.append(node)
    return nodes


def _feature(kind: Kind, boundary: int, index: int, position: int, before: int) -> int | None:
    if kind == Kind.FEATURE and boundary >= before:
        return cantor(boundary - before, index)
    return position if kind == Kind.TOKEN else None


def _links(result: Result) -> list[dict[str, Any]]:
    edges = result.graph.edges
    at = _listed(result)
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


def _listed(result: Result) -> np.ndarray:
    """Which edges the file lists, in their order: all, or the strongest by influence."""
    influence = result.graph.edge_influence()
    if len(influence) <= LINKS:
        return np.arange(len(influence))
    return np.sort(np.argsort(-influence, kind="stable")[:LINKS])


def _significant(x: np.ndarray, digits: int = 6) -> np.ndarray:
    x = x.astype(float)
    with np.errstate(divide="ignore"):
        power = np.floor(np.log10(np.abs(np.where(x == 0, 1, x))))
    scale = 10.0 ** (digits - 1 - power)
    return np.round(x * scale) / scale


def _round(x: float, digits: int = 6) -> float:
    return float(f"{float(x):.{digits}g}")
