"""One prompt of `faithfulness`: its graph, made once and only when a measure asks for it."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import numpy as np

from qkattr.analyses.trace import trace_subject
from qkattr.experiments.choose import heads_between
from qkattr.experiments.edits import Head
from qkattr.experiments.faithfulness.edges import measure_edges
from qkattr.experiments.faithfulness.effects import measure_effects
from qkattr.experiments.faithfulness.heads import measure_heads
from qkattr.experiments.faithfulness.kept import Measured
from qkattr.experiments.faithfulness.nodes import measure_nodes
from qkattr.experiments.faithfulness.qk import measure_qk
from qkattr.experiments.runs import clean_top
from qkattr.options import TraceOptions
from qkattr.result import Traced
from qkattr.subject import Subject

MEASURES = ("qk", "heads", "effects", "edges", "nodes")
#: Heads whose scores are looked at.
HEADS = 8
#: Boundaries of the deletion curves, as shares of the depth.
DEPTHS = (0.2, 0.4, 0.6, 0.8)


@dataclasses.dataclass(frozen=True)
class MeasuredPrompt:
    """A prompt to measure.

    plain: the prompt, before it is traced.
    given_source: None takes the position from which most influence crossed to the target.
    """

    plain: Subject
    given_source: int | None
    target: int
    settings: dict[str, Any]

    @cached_property
    def _traced(self) -> tuple[Traced, Subject]:
        return trace_subject(self.plain, self._options())

    def _options(self, **options: Any) -> TraceOptions:
        return TraceOptions(qk=0, **(vars(self.plain.options) | options))

    @property
    def result(self) -> Traced:
        """The prompt, traced."""
        return self._traced[0]

    @property
    def subject(self) -> Subject:
        """The prompt with its model."""
        return self._traced[1]

    @cached_property
    def source(self) -> int:
        if self.given_source is not None:
            return self.given_source
        return _busiest_source(self.result, self.target)

    @cached_property
    def heads(self) -> list[Head]:
        """The heads that carried anything from the source to the target, by influence."""
        return heads_between(
            self.result, self.subject, source=self.source, target=self.target, by="influence"
        )

    def rng(self, measure: str) -> np.random.Generator:
        """Every measure draws for itself, so that none depends on which others are taken."""
        seed = [self.settings["seed"], MEASURES.index(measure), *self.plain.ids]
        return np.random.default_rng(seed)

    def about(self) -> Measured:
        """What the report says of the prompt."""
        return dict(
            tokens=self.result.tokens,
            prediction=self.plain.bundle.token(clean_top(self.subject)[0]),
            probability=self.result.predictions[0]["probability"],
            source=self.source,
            target=self.target,
            heads_named=[f"{layer}.{head}" for layer, head in self.heads[:HEADS]],
        )

    def measure(self, name: str) -> Measured:
        """One of `MEASURES` by its name; empty where there is nothing to measure."""
        self.plain.progress(name)
        found = getattr(self, f"_{name}")()
        return {name: found} if found else {}

    def _qk(self) -> Any:
        few = max(4, self.settings["draws"] // 4)
        return self.heads and measure_qk(
            self.subject, self.heads[:HEADS], query=self.target, key=self.source,
            draws=few, rng=self.rng("qk"),
        )  # fmt: skip

    def _heads(self) -> Any:
        return self.heads and measure_heads(
            self.result, self.subject, source=self.source, target=self.target,
            draws=self.settings["draws"], rng=self.rng("heads"),
        )  # fmt: skip

    def _effects(self) -> Any:
        return measure_effects(self.subject, self.result.graph)

    def _edges(self) -> Any:
        encoders = dataclasses.replace(self.plain.options, read="encoder")
        return measure_edges(self.plain.but(options=encoders), self.result.graph)

    def _nodes(self) -> Any:
        leaves, _ = trace_subject(self.plain, self._options(through_errors=False))
        graphs = dict(through=self.result.graph, leaves=leaves.graph)
        n_blocks = self.plain.facts.n_blocks
        boundaries = sorted({max(1, round(depth * n_blocks)) for depth in DEPTHS})
        return measure_nodes(self.subject, graphs, boundaries, draws=3, rng=self.rng("nodes"))


def _busiest_source(result: Traced, target: int) -> int:
    """The earlier position, other than a sink, from which most influence crossed to the target."""
    sinks = {sink["position"] for sink in result.sinks}
    flow = {
        p: float(result.head_loadings(source=p, target=target).influence.sum())
        for p in range(target)
        if p not in sinks
    }
    return max(flow, key=flow.__getitem__) if flow else target
