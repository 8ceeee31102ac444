"""The targets of a trace: gathered, swept from, and accounted for.

Logits, differences of logits and scores become covectors (`graph.targets`); the sweep starts from
all of them together, the effects are carried back for a few at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkattr.errors import InputError
from qkattr.graph.accounts import PLACES, main_weights
from qkattr.graph.build import build_graph
from qkattr.graph.effects import Effects, effects
from qkattr.graph.live import logit_gradient, score_gradient
from qkattr.graph.sweep import DirectTargets, sweep
from qkattr.graph.tables import Graph
from qkattr.graph.targets import direct_targets, logit_covectors, score_covectors
from qkattr.kinds import Kind, Place
from qkattr.load.bundle import Bundle
from qkattr.options import TraceOptions
from qkattr.result import Result, logit_name, score_name
from qkattr.session import MainTarget, Session, pad_tokens
from qkattr.sharding import bucket

#: Targets whose effects are computed together; a program's shape, so fewer are padded.
AT_ONCE = 4


class Targets:
    """Direct targets as they are gathered, in order; the sweep from them, and their effects."""

    def __init__(self, session: Session, opts: TraceOptions):
        self.session, self.opts = session, opts
        # boundary, position, covector, constant, influence, kind, index
        self.rows: list[tuple] = []
        self.names: list[str] = []
        self.scores: list[tuple[int, ...]] = []
        self.against = -1  # the token whose logit is subtracted, of a difference

    def add_logits(self, predictions: Sequence[dict[str, Any]]) -> None:
        """The logits after the last token that are targets, or the difference of two."""
        targets = [p for p in predictions if p["target"]]
        against = np.array([p["against"] for p in targets])
        weight = np.array([p["probability"] for p in targets])
        self.against = int(against[0])
        weight = np.ones(1) if against[0] >= 0 else weight / max(weight.sum(), 1e-30)
        bundle, last = self.session.bundle, len(self.session.ids) - 1
        size = bucket(len(targets), smallest=16)  # other numbers of targets meet compiled code
        covectors = logit_covectors(
            bundle.params,
            self.session.last,
            np.resize(np.array([p["id"] for p in targets]), size),
            np.resize(against, size),
            cfg=bundle.config,
        )
        g, constant = jax.device_get(covectors)
        for i, target in enumerate(targets):
            row = (bundle.config.n_blocks, last, g[i], constant[i], weight[i])
            self.rows.append((*row, Kind.LOGIT, target["id"]))
            self.names.append(logit_name(predictions, target))

    def add_scores(self, places: Sequence[Place], influence: Sequence[float]) -> None:
        """Each score is read on both sides, half its influence on each."""
        if not places:
            return
        covectors = score_covectors(
            self.session.bundle.params.blocks,
            self.session.boundaries,
            np.resize(np.array(places, np.int32), (bucket(len(places), smallest=1), 4)),
            cfg=self.session.bundle.config.block,
            precision=self.opts.precision,
        )
        g, constant = jax.device_get(covectors)
        for i, (block, head, query, key) in enumerate(places):
            for side, position in enumerate((query, key)):
                row = (block, position, g[i, side], constant[i, side], influence[i] / 2)
                self.rows.append((*row, Kind.SCORE, len(self.scores)))
                self.names.append(score_name(block, head, query, key))
                self.scores.append((block, head, query, key, side))

    def score_table(self) -> np.ndarray:
        """`[X, 5]` block, head, query, key, side of the scores."""
        return np.array(self.scores, int).reshape(-1, 5)

    def sweep(self) -> Graph:
        """The graph behind all of them."""
        kinds, index = (np.array(column) for column in list(zip(*self.rows, strict=True))[-2:])
        targets = self._padded(slice(None), bucket(len(self.rows), smallest=16))
        swept = sweep(
            self.session.bundle.params.blocks,
            self.session.boundaries,
            self.session.components,
            targets,
            cfg=self.session.bundle.config.block,
            config=self.opts.sweep,
        )
        return build_graph(swept, targets, kinds, index)

    def effects(self, *, heads: bool = False) -> list[Effects]:
        """The effects on all of them, on the host, `AT_ONCE` at a time; covectors stay behind.
        heads: with the arrays of all heads and positions."""
        found = []
        for start in range(0, len(self.rows), AT_ONCE):
            first = start == 0 and not heads
            one = self._first if first else self._effects(start, heads)
            found.append(jax.device_get(dataclasses.replace(one, covector=None)))
        return found

    def main(self) -> MainTarget:
        """The first target, or both sides of the score that it is."""
        covector = self._first.covector
        covector = jnp.einsum("R,LRTD->LTD", self._weights(0), covector, precision="highest")
        return MainTarget(self.names[0], covector, self._live, self.opts.linearisation)

    @functools.cached_property
    def _first(self) -> Effects:
        return self._effects(0)

    @functools.cached_property
    def _live(self) -> jax.Array:
        """What the main target reads of all heads' outputs in the live model."""
        session, (_, position, *_, kind, index) = self.session, self.rows[0]
        model = session.bundle.params, jnp.asarray(pad_tokens(session.ids))
        how = dict(cfg=session.bundle.config, precision=self.opts.precision)
        if kind == Kind.SCORE:
            return score_gradient(*model, jnp.asarray(self.scores[index][:4]), **how)
        return logit_gradient(*model, position, index, self.against, **how)

    def _weights(self, start: int) -> np.ndarray:
        """What the main target has of the targets from there on."""
        weights = main_weights([row[-2] for row in self.rows])[start : start + AT_ONCE]
        return np.pad(weights, (0, AT_ONCE - len(weights)))

    def _effects(self, start: int, heads: bool = False) -> Effects:
        targets = self._padded(slice(start, start + AT_ONCE), AT_ONCE)
        return effects(
            self.session.bundle.params.blocks,
            self.session.boundaries,
            self.session.components,
            targets.boundary,
            targets.position,
            targets.covector,
            targets.constant,
            cfg=self.session.bundle.config.block,
            linearisation=self.opts.linearisation,
            precision=self.opts.precision,
            heads=heads,
            weights=self._weights(start),
            live=self._live,
            strongest=PLACES,
        )

    def _padded(self, some: slice, size: int) -> DirectTargets:
        boundary, position, covector, constant, influence, _, _ = (
            np.stack(column) for column in zip(*self.rows[some], strict=True)
        )
        influence = influence.astype(np.float32)
        return direct_targets(boundary, position, covector, constant, influence, padded_to=size)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a trace is to explain, checked before the model runs. tokens: ids whose logits; none:
    the likeliest, or those of `score`."""

    tokens: list[int]
    score: Place | None

    @classmethod
    def of(cls, bundle: Bundle, tokens: list[str], opts: TraceOptions) -> Asked:
        """Read the options `target`, `contrast` and `score` for a prompt of these tokens.

        Raises:
          InputError: there is no such token or place, or the contrast is of a token with itself.
        """
        asked = [bundle.token_id(token) for token in opts.contrast or opts.target]
        if opts.contrast and asked[0] == asked[1]:
            raise InputError(f"contrast compares two tokens, both given are {opts.contrast[0]!r}")
        score = bundle.find_place(tokens, opts.score) if opts.score else None
        return cls(asked, score)

    def targets(self, session: Session, opts: TraceOptions) -> tuple[Targets, list[dict[str, Any]]]:
        """The targets of a prompt, and its predictions."""
        predictions = _predictions(session.bundle, session.logits, self, opts)
        start = Targets(session, opts)
        if self.score:
            start.add_scores([self.score], [1.0])
        else:
            start.add_logits(predictions)
        return start, predictions


def targets_of(result: Result, session: Session, opts: TraceOptions) -> Targets:
    """The targets of a result, in their order."""
    start = Targets(session, opts)
    if any(p["target"] for p in result.predictions):
        start.add_logits(result.predictions)
    places = [tuple(row) for row in result.scores[::2, :4].tolist()]
    start.add_scores(places, [1.0] * len(places))
    return start


def _predictions(
    bundle: Bundle, logits: np.ndarray, asked: Asked, opts: TraceOptions
) -> list[dict[str, Any]]:
    """The likeliest next tokens, and which of them (or which others) are targets."""
    raised = np.exp(logits - logits.max())
    probability = raised / raised.sum()
    order = np.argsort(-probability, kind="stable")[: max(opts.max_logits, 10)]
    before = np.cumsum(probability[order]) - probability[order]
    found = {
        int(v): (not asked.tokens and asked.score is None)
        and i < opts.max_logits
        and before[i] < opts.logit_mass
        for i, v in enumerate(order)
    }
    for token in asked.tokens:
        found[token] = True
    against = -1
    if opts.contrast:
        against = asked.tokens[1]
        found[against] = False
    return [
        dict(
            token=bundle.token(token),
            id=token,
            probability=float(probability[token]),
            logit=float(logits[token]),
            target=bool(target),
            against=against if target else -1,
        )
        for token, target in found.items()
    ]
