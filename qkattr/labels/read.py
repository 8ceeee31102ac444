"""What people call features, from whatever file they have it in.

    Neuronpedia's explanations   .jsonl, .jsonl.gz: see `explanations`
    CSV                          a header with boundary or layer, index, label
    JSON                         {"23:1441": "text"}; {"1441": "text"} of one boundary
    a graph JSON                 the `clerp` of its features, and the ones edited on its page

The kind is recognised by the content. Labels are text: they are cut to one line, and whatever shows
them writes out what a terminal or a page would act on.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkattr.errors import InputError, quoted
from qkattr.labels import explanations as ex
from qkattr.load.registry import Source

if TYPE_CHECKING:
    from qkattr.load.bundle import Bundle

Labels = dict[tuple[int, int], str]

#: Bytes of a CSV or JSON file at most; viewers take graphs of 100 MB.
WHOLE = 2**29

_COLUMNS = {"index": ("index", "feature"), "label": ("label", "description", "text")}
_FEATURES = ("residual sae", "cross layer transcoder")
_NODE_ID = re.compile(r"([0-9]{1,4})_([0-9]{1,9})_[0-9]{1,9}")
_NAME = re.compile(r"(?:([0-9]{1,5}):)?([0-9]{1,9})")


@dataclasses.dataclass(frozen=True)
class _Asked:
    """Where labels are from and what they may be for; see `read_labels`."""

    path: Path
    widths: Mapping[int, int] | None
    boundary: int | None
    pre: bool

    def feature(self, boundary: int, index: object, where: str) -> tuple[int, int]:
        return ex.checked((boundary, index), where, self.widths)


def read_labels(
    path: str | Path,
    widths: Mapping[int, int] | None = None,
    *,
    boundary: int | None = None,
    pre: bool = False,
) -> Labels:
    """Labels by (boundary, feature).

    Args:
      widths: how many features each boundary has; None: any feature is taken.
      boundary: of features that are named by their index alone; the only one of explanations.
      pre: the SAEs read the stream before their block, so that their layer is the boundary.

    Raises:
      InputError: the file cannot be read, is of none of the kinds, or is for other SAEs.
    """
    asked = _Asked(Path(path), widths, boundary, pre)
    if ".jsonl" in asked.path.name:
        return ex.read_explanations(path, widths, pre=pre, boundary=boundary)
    text = _text(asked.path)
    if not text.lstrip().startswith(("{", "[")):
        return _from_csv(text, asked)
    try:
        return _from_json(json.loads(text), asked)
    except (ValueError, RecursionError) as e:
        if isinstance(e, InputError):
            raise
        if isinstance(e, json.JSONDecodeError) and e.msg == "Extra data":  # a line each
            return ex.read_explanations(path, widths, pre=pre, boundary=boundary)
        raise InputError(f"{path} is not JSON: {e}; mend it") from e


def _text(path: Path) -> str:
    try:
        with ex.open_bytes(path) as file:
            content = file.read(WHOLE + 1)
        if len(content) > WHOLE:
            raise InputError(f"{path} has more than {WHOLE} bytes; give fewer labels")
        return content.decode("utf-8-sig")
    except ex.DAMAGED as e:
        raise InputError(f"{path} is not a whole UTF-8 or gzip file ({e}); mend it") from e
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}; give another path") from e


def _from_csv(text: str, asked: _Asked) -> Labels:
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as e:
        raise InputError(f"{asked.path} is not CSV ({e}); mend it") from e
    header = {(name or "").strip().lower(): name for name in (rows[0] if rows else {}) if name}
    place = next((header[n] for n in ("boundary", "layer") if n in header), None)
    index, label = (
        next((header[n] for n in names if n in header), None) for names in _COLUMNS.values()
    )
    if index is None or label is None or (place is None and asked.boundary is None):
        raise InputError(
            f"{asked.path} is neither JSON nor CSV with a header and rows of boundary or layer, "
            f"index and label; give one of these"
        )
    labels: Labels = {}
    for number, row in enumerate(rows, 2):
        where = f"{asked.path}, row {number}"
        b = asked.boundary if place is None else _place(row[place], place, where, asked.pre)
        labels[asked.feature(b, row[index], where)] = ex.label_of(row[label], where)
    return labels


def _place(value: str | None, column: str, where: str, pre: bool) -> int:
    if column.strip().lower() == "layer":
        return ex.boundary_of(value, where, pre)
    if value is None or not re.fullmatch(r"\s*[0-9]{1,5}\s*", value):
        raise InputError(f"{where} is for boundary {quoted(str(value))}; give a number")
    return int(value)


def _from_json(raw: Any, asked: _Asked) -> Labels:
    if isinstance(raw, dict) and isinstance(raw.get("nodes"), list):
        return _from_graph(raw, asked)
    if isinstance(raw, dict) and set(raw) >= {"layer", "index", "description"}:
        raw = [raw]
    if isinstance(raw, list):
        return _from_rows(raw, asked)
    if not isinstance(raw, dict):
        raise InputError(f"{asked.path} should hold one object; write " + '{"23:1441": "text"}')
    labels: Labels = {}
    for name, text in raw.items():
        match = _NAME.fullmatch(name.strip())
        b = asked.boundary if match and match[1] is None else match and int(match[1])
        if match is None or b is None:
            raise InputError(
                f"{asked.path}: {quoted(name)} names no feature; write boundary:feature, or say "
                f"of which boundary all are, as in {asked.path}:23"
            )
        if not isinstance(text, str):
            raise InputError(
                f"{asked.path}: the label of {quoted(name)} is not text; give a string"
            )
        where = f"{asked.path}: {quoted(name)}"
        labels[asked.feature(b, match[2], where)] = ex.label_of(text, where)
    return labels


def _from_rows(rows: list[Any], asked: _Asked) -> Labels:
    labels: Labels = {}
    for number, row in enumerate(rows):
        where = f"{asked.path}, item {number}"
        if not isinstance(row, dict) or not set(row) >= {"layer", "index", "description"}:
            raise InputError(f"{where} has no layer, index and description; give explanations")
        b = ex.boundary_of(row["layer"], where, asked.pre)
        feature = ex.checked((b, row["index"]), where, asked.widths, asked.boundary)
        labels.setdefault(feature, ex.label_of(row["description"], where))
    return labels


def _from_graph(graph: dict[str, Any], asked: _Asked) -> Labels:
    """The labels of feature nodes; what was edited on the graph's page goes before them."""
    features: dict[str, tuple[int, int]] = {}
    labels: Labels = {}
    for node in graph["nodes"]:
        feature = _of_node(node, asked) if isinstance(node, dict) else None
        if feature is None:
            continue
        features[str(node.get("node_id"))] = feature
        if isinstance(node.get("clerp"), str) and node["clerp"].strip():
            labels[feature] = ex.label_of(node["clerp"], str(asked.path))
    for node_id, text in _edited(graph):
        if node_id in features:
            labels[features[node_id]] = ex.label_of(text, str(asked.path))
    return labels


def _edited(graph: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """`qParams.clerps`: pairs of a node's id and a label."""
    saved = graph.get("qParams")
    for pair in (saved.get("clerps") if isinstance(saved, dict) else None) or ():
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair):
            yield pair[0], pair[1]


def _of_node(node: dict[str, Any], asked: _Asked) -> tuple[int, int] | None:
    """The feature of a node; None if it is none. A graph of qkattr says it outright."""
    if node.get("kind", "feature") != "feature":
        return None
    where = f"{asked.path}: node {quoted(str(node.get('node_id')))}"
    if "kind" in node:
        b, index = node.get("boundary"), node.get("index")
        if type(b) is not int:
            raise InputError(f"{where} has no boundary; give a graph that is whole")
        return asked.feature(b, index, where)
    if node.get("feature_type") not in _FEATURES:
        return None
    match = _NODE_ID.fullmatch(str(node.get("node_id")))
    layer, index = (match[1], match[2]) if match else _cantor(node.get("feature"))
    return asked.feature(ex.boundary_of(layer, where, asked.pre), index, where)


def _cantor(pair: object) -> tuple[str, str]:
    """Layer and feature out of their pairing number (layer + feature)(layer + feature + 1)/2 +
    feature."""
    if type(pair) is not int or not 0 <= pair < 2**60:
        return "", ""
    total = (math.isqrt(8 * pair + 1) - 1) // 2
    feature = pair - total * (total + 1) // 2
    return str(total - feature), str(feature)


def labelled(
    bundle: Bundle, given: Sequence[str], progress: Callable[[str], None] = lambda stage: None
) -> Bundle:
    """The bundle with labels, which name the features of whatever is traced with it.

    given: as `read_given` has it; of two labels of a feature the last one counts.

    Raises:
      InputError: see `read_given`; or there are no SAEs.
    """
    if bundle.dictionaries is None:
        raise InputError("labels name the features of SAEs, and there are none; give --saes")
    widths = {b: d.width for b, d in enumerate(bundle.dictionaries) if d is not None}
    labels = read_given(given, widths, bundle.source, progress)
    return dataclasses.replace(bundle, labels={**bundle.labels, **labels})


def read_given(
    given: Sequence[str],
    widths: Mapping[int, int] | None,
    source: Source | None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Labels:
    """Labels as they are named on a command line.

    given: paths, `PATH:23` for the labels of one boundary, `PATH:pre` where a layer's SAE is before
    its block; "neuronpedia" for those of the source; or "neuronpedia:NAME" for those of a set of
    the registry.

    Raises:
      InputError: see `read_labels` and `neuronpedia.fetch_labels`.
    """
    labels: Labels = {}
    for name in given:
        if name.split(":")[0] == "neuronpedia" and not Path(name).exists():
            from qkattr.labels.neuronpedia import fetch_labels, source_of

            set_ = name.partition(":")[2]
            labels |= fetch_labels(source_of(set_) if set_ else source, widths, progress)
            continue
        path, _, part = name.rpartition(":")
        whole = not path or Path(name).exists() or not re.fullmatch(r"pre|[0-9]{1,5}", part)
        pre = source.pre if source is not None else False
        if whole:
            labels |= read_labels(name, widths, pre=pre)
        elif part == "pre":
            labels |= read_labels(path, widths, pre=True)
        else:
            labels |= read_labels(path, widths, boundary=int(part), pre=pre)
    return labels
