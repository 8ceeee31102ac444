"""What graph viewers make of a node and of a graph's names: facts about Neuronpedia's viewer and
circuit-tracer's, and the rules that follow.

- A node of a type outside `NO_CARD` has a card. Neuronpedia asks for the one of the node's `layer`
  and of the index that its number decodes to, `cantor(layer, index)`; circuit-tracer for the file
  of that name. So only features have such a type, and only theirs decodes to a layer of the model.
- Other nodes have negative numbers, which decode to nothing. The error's is -1, as circuit-tracer
  writes it.
- `layer_number_position` is the node's name under the pointer. No two nodes of a graph share one.
- A graph's model is named by letters, digits, `_`, `.` and `-`; Neuronpedia refuses others.
"""

from __future__ import annotations

import re
from typing import Any

from qkattr.errors import InputError, quoted
from qkattr.kinds import Kind

#: The types that viewers know, of each kind of node.
FEATURE_TYPES = {
    Kind.FEATURE: "cross layer transcoder",
    Kind.ERROR: "mlp reconstruction error",
    Kind.TOKEN: "embedding",
    Kind.POSITION: "embedding",
    Kind.LOGIT: "logit",
    Kind.SCORE: "unknown",
    Kind.BIAS: "bias",
    Kind.CONST: "bias",
    Kind.SINK: "unknown",
}

#: The types whose nodes have no card, the same in both viewers.
NO_CARD = frozenset(FEATURE_TYPES.values()) - {FEATURE_TYPES[Kind.FEATURE]}

#: The layer in the numbers of features of the embedding output, whose `layer` is "E". No model has
#: so many, and no position is as large as such a number.
EMBEDDING_LAYER = 10_000

#: The kinds with negative numbers.
_UNNUMBERED = (Kind.ERROR, Kind.SINK, Kind.BIAS, Kind.CONST, Kind.POSITION, Kind.SCORE)

_NAME = re.compile(r"(?!\.+$)[a-zA-Z0-9_.-]+")


def cantor(a: int, b: int) -> int:
    """Cantor's pairing of two numbers, which viewers take apart again."""
    return (a + b) * (a + b + 1) // 2 + b


def node_layer(kind: Kind, boundary: int, *, n_blocks: int, pre: bool) -> str:
    """The layer of a node.

    pre: the SAE of a layer reads the stream before its block, and not after it.
    """
    before = 0 if pre else 1  # boundaries before that of layer 0
    if kind == Kind.LOGIT:
        return str(n_blocks + 1)
    if boundary < before or (boundary == 0 and kind != Kind.FEATURE):
        return "E"
    return str(boundary - before)


def node_number(kind: Kind, layer: str, index: int, position: int) -> int:
    """The number of a node, its `feature`. index: of the kind, -1 where it has none."""
    if kind == Kind.FEATURE:
        return cantor(EMBEDDING_LAYER if layer == "E" else int(layer), index)
    if kind == Kind.TOKEN:
        return position
    if kind == Kind.LOGIT:
        return index
    return -1 - _UNNUMBERED.index(kind) - len(_UNNUMBERED) * (index + 1)


def check_scan(name: str) -> str:
    """A name of a model as Neuronpedia takes it.

    Raises:
      InputError: it is none.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"scan {quoted(name)} should have only letters a-z, digits, '_', '.' and '-'; "
            f"give Neuronpedia's name of the model, as in gpt2-small"
        )
    return name


def scan_of(settings: dict[str, Any]) -> str:
    """The name of the model: the one that was given; else Neuronpedia's where it has the SAEs; else
    the last part of the model's path or repository, what the site refuses replaced."""
    return settings.get("scan") or source_of(settings).get("scan") or _cleaned(settings["model"])


def source_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Where Neuronpedia has the SAEs (see `load.registry.Source`); empty if that is not known, or
    the model was given a name under which it does not have them."""
    source = settings.get("neuronpedia") or {}
    known = settings.get("scan") in (None, source.get("scan"))
    return source if known else {"pre": source.get("pre", False)}


def _cleaned(model: str) -> str:
    repository = re.fullmatch(r"[\w.-]+/([\w.-]+)@.*", model)  # its revision is left out
    last = repository[1] if repository else re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    return re.sub(r"[^a-zA-Z0-9_.-]+", "-", last.removesuffix(".gguf")).strip(".-") or "model"
