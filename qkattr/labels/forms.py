"""What people call features, from whatever file they have it in.

    Neuronpedia's explanations   objects with layer, index and description: one a line (.jsonl,
                                 .jsonl.gz), in a list, or one alone
    CSV                          a header with boundary or layer, index, label
    JSON                         {"23:1441": "text"}; {"1441": "text"} of one boundary
    a graph JSON                 the `clerp` of its features, and the ones edited on its page

The form is recognised by the content; each is a function that gives what the file says of its
features, one `_Said` each, and all are checked and collected in one place. A layer is a number or
the name of a source, `20-gemmascope-res-16k`: layer L of a set over the stream after the block is
boundary L + 1, before the block (`pre`) boundary L. Labels are text: they are cut to one line, and
whatever shows them writes out what a terminal or a page would act on. Any file may be gzipped;
neither a line nor what a file unpacks to may be of any size.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from qkattr.errors import InputError, clipped, quoted

#: Characters of a label that are kept.
LONGEST = 300
#: Bytes of a line, and of a file of lines, at most; a set of 131,072 features has some 50 MB.
LINE, LINES = 2**24, 2**31
#: Bytes of any other file at most; viewers take graphs of 100 MB.
WHOLE = 2**29

_LAYER = re.compile(r"(\d{1,4})(-.*)?", re.DOTALL)
_OTHER_HOOK = re.compile(r"mlp|att|mid|transcoder|clt|hook_z", re.IGNORECASE)
_NAME = re.compile(r"(?:([0-9]{1,5}):)?([0-9]{1,9})")
_NODE_ID = re.compile(r"([0-9]{1,4})_([0-9]{1,9})_[0-9]{1,9}")
_FEATURES = ("residual sae", "cross layer transcoder")
_EXPLANATION = ("layer", "index", "description")
#: What a CSV's columns may be called: where a feature is, its index, its label.
_COLUMNS = (("boundary", "layer"), ("index", "feature"), ("label", "description", "text"))


class _Said(NamedTuple):
    """What a file says of one feature. text: `...`: nothing, it is only named."""

    where: str
    boundary: int
    index: object
    text: object


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What was asked for, and how its features are read; see `read_labels`."""

    path: Path
    widths: Mapping[int, int] | None
    boundary: int | None
    pre: bool

    def layer(self, layer: object, where: str) -> int:
        """The boundary of a layer."""
        match = _LAYER.fullmatch(str(layer).strip())
        if not match or _OTHER_HOOK.search(match[2] or ""):
            raise InputError(
                f"{where} is for {quoted(str(layer))}, which is not a set of SAEs over the "
                f"residual stream; give the explanations of one"
            )
        return int(match[1]) + (not self.pre)

    def feature(self, said: _Said, only: int | None) -> tuple[int, int]:
        """A feature, if it is one of the SAEs, and of the only boundary that it may be of."""
        b, index, widths = said.boundary, str(said.index).strip(), self.widths
        if (widths is not None and b not in widths) or only not in (None, b):
            known = f"boundaries {min(widths)}..{max(widths)}" if widths else "another boundary"
            expected = known if only is None else f"boundary {only}"
            raise InputError(
                f"{said.where} is for boundary {b}; expected {expected}; give the labels of these "
                "SAEs"
            )
        number = int(index) if re.fullmatch(r"[0-9]{1,9}", index) else None
        if number is None or (widths is not None and number >= widths[b]):
            last = f"; boundary {b} has 0..{widths[b] - 1}" if widths is not None else ""
            raise InputError(
                f"{said.where} is for feature {quoted(index)}{last}; give the labels of these SAEs"
            )
        return b, number


def read_labels(
    path: str | Path,
    widths: Mapping[int, int] | None = None,
    *,
    boundary: int | None = None,
    pre: bool = False,
) -> dict[tuple[int, int], str]:
    """Labels by (boundary, feature). Of several for one feature the last counts; of explanations,
    whose first is the best, the first.

    Args:
      widths: how many features each boundary has; None: any feature is taken.
      boundary: of features that are named by their index alone; the only one of explanations.
      pre: the SAEs read the stream before their block, so that their layer is the boundary.

    Raises:
      InputError: the file cannot be read, is of none of the forms, or is for other SAEs.
    """
    asked = _Asked(Path(path), widths, boundary, pre)
    if ".jsonl" in asked.path.name:
        return _from_lines(asked)
    with _opened(asked.path) as file:
        content = file.read(WHOLE + 1)
        if len(content) > WHOLE:
            raise InputError(f"{path} has more than {WHOLE} bytes; give fewer labels")
        text = content.decode("utf-8-sig")
    if not text.lstrip().startswith(("{", "[")):
        return _collected(_csv(text, asked), asked)
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as e:
        if isinstance(e, json.JSONDecodeError) and e.msg == "Extra data":  # a line each
            return _from_lines(asked)
        raise InputError(f"{path} is not JSON: {e}; mend it") from e
    form = next(form for form in _FORMS if form.here(raw))
    return _collected(form.read(raw, asked), asked, explained=form.explained)


def _from_lines(asked: _Asked) -> dict[tuple[int, int], str]:
    labels = _collected(_explanations(_lines(asked.path), asked), asked, explained=True)
    if not labels:
        raise InputError(f"{asked.path} holds no explanations; give Neuronpedia's .jsonl.gz")
    return labels


def _collected(
    every: Iterable[_Said], asked: _Asked, *, explained: bool = False
) -> dict[tuple[int, int], str]:
    """All that was said, checked. explained: by explanations; see `read_labels`."""
    labels: dict[tuple[int, int], str] = {}
    for said in every:
        feature = asked.feature(said, asked.boundary if explained else None)
        if said.text is ...:
            continue
        if not isinstance(said.text, str):
            raise InputError(
                f"{said.where}: its label is {said.text!r:.40}, expected text; give a string"
            )
        if not (explained and feature in labels):
            labels[feature] = clipped(" ".join(said.text.split()), LONGEST)
    return labels


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked if it is gzipped; `InputError` for whatever reading them raises."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as e:
        raise InputError(
            f"{path} is damaged: it is not a whole UTF-8 or gzip file ({e}); mend it, or download "
            "it again"
        ) from e
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}; give another path") from e


# The forms


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The JSON of every line, and where it is."""
    read = 0
    with _opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE + 1), b""), 1):
            where, read = f"{path}, line {number}", read + len(line)
            if len(line) > LINE or read > LINES:
                raise InputError(
                    f"{where}: a line has at most {LINE} bytes and a file {LINES}; give "
                    "Neuronpedia's .jsonl.gz"
                )
            if line.strip():
                text = line.decode("utf-8")
                try:
                    yield where, json.loads(text)
                except (ValueError, RecursionError) as e:
                    raise InputError(f"{where} is not JSON; give Neuronpedia's .jsonl.gz") from e


def _explanations(rows: Iterable[tuple[str, Any]], asked: _Asked) -> Iterator[_Said]:
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where} is {quoted(str(row))}, expected an object with a layer")
        if absent := [name for name in _EXPLANATION if name not in row]:
            raise InputError(
                f"{where} has no {absent[0]}; expected layer, index and description, as "
                "Neuronpedia exports them"
            )
        layer, index, description = (row[name] for name in _EXPLANATION)
        yield _Said(where, asked.layer(layer, where), index, description)


def _listed(raw: Any, asked: _Asked) -> Iterator[_Said]:
    rows = raw if isinstance(raw, list) else [raw]
    yield from _explanations(((f"{asked.path}, item {i}", r) for i, r in enumerate(rows)), asked)


def _csv(text: str, asked: _Asked) -> Iterator[_Said]:
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as e:
        raise InputError(f"{asked.path} is not CSV ({e}); mend it") from e
    header = {(name or "").strip().lower(): name for name in (rows[0] if rows else {}) if name}
    place, index, label = (next((n for n in names if n in header), None) for names in _COLUMNS)
    if index is None or label is None or (place is None and asked.boundary is None):
        raise InputError(
            f"{asked.path} is neither JSON nor CSV with a header and rows of boundary or layer, "
            f"index and label; give one of these"
        )
    for number, row in enumerate(rows, 2):
        where, b = f"{asked.path}, row {number}", asked.boundary
        if place == "layer":
            b = asked.layer(row[header[place]], where)
        elif place is not None:
            b = _number(row[header[place]], where)
        yield _Said(where, b or 0, row[header[index]], row[header[label]])


def _number(value: str | None, where: str) -> int:
    if value is None or not re.fullmatch(r"\s*[0-9]{1,5}\s*", value):
        raise InputError(f"{where} is for boundary {quoted(str(value))}; give a number")
    return int(value)


def _pairs(raw: Any, asked: _Asked) -> Iterator[_Said]:
    if not isinstance(raw, dict):
        raise InputError(f"{asked.path} should hold one object; write " + '{"23:1441": "text"}')
    for name, text in raw.items():
        match = _NAME.fullmatch(name.strip())
        b = asked.boundary if match and match[1] is None else match and int(match[1])
        if match is None or b is None:
            raise InputError(
                f"{asked.path}: {quoted(name)} names no feature; write boundary:feature, or say "
                f"of which boundary all are, as in {asked.path}:23"
            )
        yield _Said(f"{asked.path}: {quoted(name)}", b, match[2], text)


def _graph(graph: dict[str, Any], asked: _Asked) -> Iterator[_Said]:
    """The labels of feature nodes; what was edited on the graph's page goes before them."""
    features: dict[str, _Said] = {}
    for node in graph["nodes"]:
        feature = _of_node(node, asked) if isinstance(node, dict) else None
        if feature is not None:
            features[str(node.get("node_id"))] = feature
            yield feature
    saved = graph.get("qParams")
    for pair in (saved.get("clerps") if isinstance(saved, dict) else None) or ():
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair):
            if pair[0] in features:
                yield features[pair[0]]._replace(text=pair[1])


def _of_node(node: dict[str, Any], asked: _Asked) -> _Said | None:
    """The feature of a node; None if it is none. A graph of qkattr says it outright."""
    if node.get("kind", "feature") != "feature":
        return None
    where = f"{asked.path}: node {quoted(str(node.get('node_id')))}"
    text = node.get("clerp")
    text = text if isinstance(text, str) and text.strip() else ...
    if "kind" in node:
        if type(node.get("boundary")) is not int:
            raise InputError(f"{where} has no boundary; give a graph that is whole")
        return _Said(where, node["boundary"], node.get("index"), text)
    if node.get("feature_type") not in _FEATURES:
        return None
    match = _NODE_ID.fullmatch(str(node.get("node_id")))
    layer, index = (match[1], match[2]) if match else _cantor(node.get("feature"))
    return _Said(where, asked.layer(layer, where), index, text)


def _cantor(pair: object) -> tuple[str, str]:
    """Layer and feature out of their pairing number (layer + feature)(layer + feature + 1)/2 +
    feature."""
    if type(pair) is not int or not 0 <= pair < 2**60:
        return "", ""
    total = (math.isqrt(8 * pair + 1) - 1) // 2
    feature = pair - total * (total + 1) // 2
    return str(total - feature), str(feature)


class _Form(NamedTuple):
    """A form of JSON: whether a file is of it, and what reads it. explained: by explanations."""

    here: Callable[[Any], bool]
    read: Callable[[Any, _Asked], Iterator[_Said]]
    explained: bool = False


#: The first that a file is of reads it.
_FORMS = (
    _Form(lambda raw: isinstance(raw, dict) and isinstance(raw.get("nodes"), list), _graph),
    _Form(lambda raw: isinstance(raw, list), _listed, explained=True),
    _Form(lambda raw: isinstance(raw, dict) and set(raw) >= {*_EXPLANATION}, _listed, True),
    _Form(lambda raw: True, _pairs),
)
