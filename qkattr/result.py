"""What a trace found, as data: the graph of one prompt and all that is said of it.

`qkattr.trace` returns it as a `Result` (see `api`), which can also be saved, drawn and asked for
more. Nothing here needs JAX or the model.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict, TypeVar

import numpy as np

from qkattr.cards.card import Card
from qkattr.characters import readable, shown
from qkattr.config import ModelFacts
from qkattr.errors import InputError, one_of, printable, quoted
from qkattr.graph.paths import Route, strongest_routes
from qkattr.graph.tables import Graph
from qkattr.kinds import Kind, Labels, Place
from qkattr.options import TraceOptions
from qkattr.positions import find_place, find_position
from qkattr.qk.table import QKAttribution

TracedT = TypeVar("TracedT", bound="Traced")

#: What names the nodes of one end of an edge: a position (index, negative index or token text), a
#: node id, or several of them.
Ends = int | str | Iterable["int | str"]

#: What places of heads are ranked by. "masking" agrees best with what masking them does.
RANKINGS = ("masking", "effect", "influence", "attention")

#: Kinds of nodes that edges lead into.
TARGET_KINDS = (Kind.FEATURE, Kind.ERROR, Kind.LOGIT, Kind.SCORE)


class Prediction(TypedDict):
    """A next token. target: whether its logit was traced; against: the token whose logit is
    subtracted from it, or -1."""

    token: str
    id: int
    probability: float
    logit: float
    target: bool
    against: int


class PlaceRow(TypedDict):
    """A head at one (query, key): what masking it takes from the main target (see `graph.live`),
    its effect, the target's derivative with respect to its score, its score, attention and share of
    the targets' influence."""

    layer: int
    head: int
    query: int
    key: int
    masking: float
    effect: float
    derivative: float
    score: float
    probability: float
    influence: float


def measured(row: PlaceRow, by: str) -> float:
    """What a place is ranked by, one of `RANKINGS`."""
    return row["probability"] if by == "attention" else row[by]  # pyright: ignore


def logit_name(predictions: Sequence[Prediction], target: Prediction) -> str:
    """What a person calls the logit of a token, or its difference to that of another."""
    name = f"logit of {quoted(readable(target['token']))}"
    if target["against"] < 0:
        return name
    other = next(p["token"] for p in predictions if p["id"] == target["against"])
    return f"{name} less that of {quoted(readable(other))}"


def score_name(block: int, head: int, query: int, key: int) -> str:
    """What a person calls an attention score as a target."""
    return f"score of {block}.{head} at {query} to {key}"


def sink_positions(sinks: Sequence[dict[str, Any]], with_sinks: bool) -> list[int]:
    """Positions that are a sink at any boundary, and the first; none without sinks."""
    first = [0] if with_sinks else []
    return sorted({*first, *(sink["position"] for sink in sinks)})


def ranked_heads(value: np.ndarray, n: int | None = None) -> list[tuple[int, int]]:
    """The n heads (block, head) of largest value in `[L, N]`, or all, by falling value."""
    order = np.argsort(-value, axis=None, kind="stable")[:n]
    return [(int(b), int(h)) for b, h in zip(*np.unravel_index(order, value.shape), strict=True)]


@dataclasses.dataclass(frozen=True, repr=False)
class HeadLoadings:
    """Head loadings summed over the edges between two sets of nodes.

    Loadings of edges into features, errors, logits and scores have no unit in common: ask for one
    kind of target (`into`) before you read much into a sum.

    into: the kind of the edges' targets, None: all. loadings: `[L, N]` signed sums. influence:
    `[L, N]` what flows through the head there, as a share of the targets' influence. residual, mlp:
    the other parts' sums. n_edges: how many edges were summed.
    """

    source: str
    target: str
    into: str | None
    loadings: np.ndarray
    influence: np.ndarray
    residual: float
    mlp: float
    n_edges: int

    def __repr__(self) -> str:
        first = ", ".join(f"{h['layer']}.{h['head']} {h['loading']:+.4g}" for h in self.top(3))
        return (
            f"<HeadLoadings from {self.source} to {self.target}: {self.n_edges} edges"
            f"{'' if self.into is None else f' into nodes of kind {self.into}'}, "
            f"{first or 'no head'}>"
        )

    def top(self, n: int | None = None) -> list[dict[str, Any]]:
        """The heads by falling |loading|, those without any left out."""
        return [
            dict(
                layer=layer,
                head=head,
                loading=float(self.loadings[layer, head]),
                influence=float(self.influence[layer, head]),
            )
            for layer, head in ranked_heads(np.abs(self.loadings), n)
            if self.loadings[layer, head] != 0
        ]


@dataclasses.dataclass(frozen=True, repr=False)
class Traced:
    """An attribution graph with its prompt.

    tokens: decoded one by one.
    prompt: the tokens decoded together, without the BOS before them; their ids where there is no
      tokenizer.
    token_ids: of the tokens.
    bos: what was done about it.
    predictions: the next tokens, by falling probability.
    graph: nodes and edges.
    sinks: positions by boundary.
    scores: `[X, 5]` block, head, query, key, side (0 query, 1 key) of SCORE nodes.
    qk: QK attributions by "L.H.query.key".
    facts: of the model and its SAEs.
    options: of the trace.
    provenance: what made it.
    labels: of features, by (boundary, index).
    vocabulary: the text of logit nodes, by token id.
    cards: of the features that the page shows.
    scan: what graph viewers call the model, where it was given.
    """

    tokens: list[str]
    prompt: str
    token_ids: tuple[int, ...]
    bos: str
    predictions: list[Prediction]
    graph: Graph
    sinks: list[dict[str, Any]]
    scores: np.ndarray
    qk: dict[str, QKAttribution]
    facts: ModelFacts
    options: TraceOptions
    provenance: dict[str, Any]
    labels: Labels = dataclasses.field(default_factory=dict)
    vocabulary: dict[int, str] = dataclasses.field(default_factory=dict)
    cards: dict[tuple[int, int], Card] = dataclasses.field(default_factory=dict)
    scan: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of the model and the SAEs."""
        return self.facts.notes

    @property
    def n_blocks(self) -> int:
        return self.facts.n_blocks

    @property
    def settings(self) -> dict[str, Any]:
        """All that was asked for, as JSON has it."""
        scan = {} if self.scan is None else dict(scan=self.scan)
        return self.facts.to_json() | self.options.to_json() | scan

    @functools.cached_property
    def shown_tokens(self) -> list[str]:
        """The tokens as people are shown them, see `qkattr.characters.shown`."""
        return shown(self.tokens)

    def position(self, where: int | str) -> int:
        """A position from an index, a negative index, or a token's text, as in `" Aunt#2"`."""
        return find_position(self.tokens, where)

    def place(self, layer: int, head: int, query: int | str, key: int | str) -> Place:
        """A place whose positions may be given as token texts, checked.

        Raises:
          InputError: no such block, head or position, or the query does not see the key.
        """
        facts, place = self.facts, (layer, head, query, key)
        return find_place(self.tokens, place, n_heads=facts.n_heads, windows=facts.windows)

    def stored(self, place: Place, most: int | None = None) -> QKAttribution | None:
        """The attribution that it holds, unless some of its pairs were left out.

        most: how many of the strongest pairs are needed; None: all.
        """
        stored = self.qk.get(".".join(map(str, place)))
        if stored is None:
            return None
        needed = stored.n_pairs if most is None else min(most, stored.n_pairs)
        return stored if needed <= len(stored.pairs) else None

    def node_id(self, node: int) -> str:
        """The name of a node in the graph JSON."""
        nodes = self.graph.nodes
        b, t, index = int(nodes.boundary[node]), int(nodes.position[node]), int(nodes.index[node])
        kind = Kind(nodes.kind[node])
        if kind == Kind.FEATURE:
            return f"{b - 1}_{index}_{t}" if b else f"E_f{index}_{t}"
        if kind == Kind.TOKEN:
            return f"E_{index}_{t}"
        if kind == Kind.POSITION:
            return f"E_position_{t}"
        if kind == Kind.LOGIT:
            return f"{self.n_blocks + 1}_{index}_{t}"
        if kind == Kind.SCORE:
            block, head, query, key, side = self.scores[index]
            return f"score_{block}.{head}_{query}_{key}_{'key' if side else 'query'}"
        return f"{b - 1}_{kind.label}_{t}" if b else f"E_{kind.label}_{t}"

    def label(self, node: int) -> str:
        """What a person calls a node."""
        nodes = self.graph.nodes
        kind, index = Kind(nodes.kind[node]), int(nodes.index[node])
        if kind == Kind.FEATURE:
            return self.labels.get((int(nodes.boundary[node]), index), "")
        if kind == Kind.TOKEN:
            return self.tokens[nodes.position[node]]
        if kind == Kind.LOGIT:
            return self.vocabulary.get(index, str(index))
        if kind == Kind.SCORE:
            block, head, query, key, side = self.scores[index]
            read = "key" if side else "query"
            return f"score of {block}.{head} at {query} to {key}, read on its {read} side"
        return ""

    def with_labels(self: TracedT, labels: Labels) -> TracedT:
        """The result with these labels before its own; those of features it lacks do no harm."""
        labels = {**self.labels, **labels}
        qk = {place: table.with_labels(labels) for place, table in self.qk.items()}
        return dataclasses.replace(self, labels=labels, qk=qk)

    def head_loadings(self, *, source: Ends, target: Ends, into: str | None = None) -> HeadLoadings:
        """Every head's loading between two ends, summed over the edges of the graph between them.

        Args:
          source, target: a position, a node id, or several of either; a position means all nodes
            there.
          into: only edges into nodes of this kind, "feature", "error", "logit" or "score".

        Raises:
          InputError: there is no such position, node or kind of target.
        """
        edges = self.graph.edges
        between = self._at(source)[edges.source] & self._at(target)[edges.target]
        if into is not None:
            one_of("into", into, [kind.label for kind in TARGET_KINDS])
            between &= self.graph.nodes.kind[edges.target] == Kind[into.upper()]
        through = np.flatnonzero(between & (edges.block >= 0))
        shape = (self.n_blocks, edges.heads.shape[1])
        loadings, influence = np.zeros(shape), np.zeros(shape)
        np.add.at(loadings, edges.block[through], edges.heads[through])
        np.add.at(influence, edges.block[through], self.graph.head_influence()[through])
        return HeadLoadings(
            source=self._describe(source),
            target=self._describe(target),
            into=into,
            loadings=loadings,
            influence=influence,
            residual=float(edges.residual[through].sum(dtype=float)),
            mlp=float(edges.mlp[through].sum(dtype=float)),
            n_edges=len(through),
        )

    def head_effects(
        self, n: int | None = None, *, source: int | str | None = None,
        target: int | str | None = None, by: str = "masking",
    ) -> list[PlaceRow]:  # fmt: skip
        """Places (layer, head, query, key), the strongest first, each with what masking it takes
        from the main target, its effect, score, attention and influence.

        Args:
          n: how many; None: all that the result holds.
          source, target: positions, both or neither. The head looks from the target (the query) at
            the source (the key). Neither: places between two different positions.
          by: which of `RANKINGS` ranks them, by its size.

        Raises:
          InputError: there is no such position or ranking, or only one position was given.
        """
        one_of("by", by, RANKINGS)
        heads = self.graph.heads
        if (source is None) != (target is None):
            raise InputError("head effects are between two positions; give both, or neither")
        if source is None or target is None:
            at = np.flatnonzero(heads.query != heads.key)
        else:
            key, query = self.position(source), self.position(target)
            at = np.flatnonzero((heads.query == query) & (heads.key == key))
        flow = self.graph.influence_at(heads.block[at], heads.query[at], heads.key[at])
        influence = flow[np.arange(len(at)), heads.head[at]]
        sizes = dict(influence=influence, attention=heads.probability[at])
        size = sizes[by] if by in sizes else np.abs(getattr(heads, by)[at])
        order = np.argsort(-size, kind="stable")[:n]
        rows = zip(heads.rows(at[order]), influence[order].tolist(), strict=True)
        return [PlaceRow(**row, influence=share) for row, share in rows]

    def places_that_matter(self, n: int) -> list[Place]:
        """The n places (block, head, query, key) with the largest |masking| between two positions
        of which the key is no sink."""
        return self.graph.places_that_matter(n, self.sink_positions)

    @property
    def sink_positions(self) -> list[int]:
        """Positions that are a sink at any boundary, and the first; none without sinks."""
        return sink_positions(self.sinks, self.options.sinks)

    @property
    def main_target(self) -> str:
        """What effects are effects on, in words."""
        traced = next((p for p in self.predictions if p["target"]), None)
        if traced is not None:
            return logit_name(self.predictions, traced)
        block, head, query, key, _ = self.scores[0].tolist()
        return score_name(block, head, query, key)

    def routes(self, n: int = 5) -> list[Route]:
        """The n strongest routes from the prompt into each target, see `graph.paths`; the target
        with most influence comes first."""
        return strongest_routes(self.graph, n)

    def _at(self, ends: Ends) -> np.ndarray:
        """Which nodes an end names: a mask over the nodes."""
        nodes, mask = self.graph.nodes, np.zeros(len(self.graph.nodes), bool)
        for end in [ends] if isinstance(ends, int | str) else ends:
            named = self._ids.get(end) if isinstance(end, str) else None
            if named is not None:
                mask[named] = True
            else:
                mask |= nodes.position == self.position(end)
        return mask

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {self.node_id(i): i for i in range(len(self.graph.nodes))}

    def _describe(self, ends: Ends) -> str:
        if not isinstance(ends, int | str):
            return ", ".join(self._describe(end) for end in ends)
        if isinstance(ends, str) and ends in self._ids:
            return ends
        at = self.position(ends)
        return f"{self.tokens[at]!r} at {at}"

    def __repr__(self) -> str:
        graph = self.graph
        said = printable(json.dumps(self.prompt, ensure_ascii=False))
        return f"{type(self).__name__}({said}, {len(graph.nodes)} nodes, {len(graph.edges)} edges)"
