"""The targets of a trace: chosen, swept from, and accounted for.

Logits, differences of logits and scores become covectors (`graph.targets`); the sweep starts from
all of them together, the effects are carried back for a few at a time. Axes: P targets, D d_model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qkattr.errors import InputError
from qkattr.graph.accounts import PLACES, main_weights
from qkattr.graph.backward import DirectTargets, sweep
from qkattr.graph.build import build_graph
from qkattr.graph.effects import Effects, target_effects
from qkattr.graph.live import logit_gradient, score_gradient
from qkattr.graph.tables import Graph
from qkattr.graph.targets import direct_targets, logit_covectors, score_covectors
from qkattr.kinds import Kind, Place
from qkattr.options import TraceOptions
from qkattr.result import Prediction, Traced, logit_name, score_name
from qkattr.sharding import bucket
from qkattr.subject import MainTarget, Subject

#: Targets whose effects are computed together; a program's shape, so fewer are padded.
AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a trace is to explain, checked before the model runs.

    tokens: ids whose logits; none: the likeliest, or those of `score`.
    contrast: whether it is the difference of two.
    score: an attention score instead.
    """

    tokens: list[int]
    contrast: bool
    score: Place | None

    @classmethod
    def of(cls, subject: Subject, opts: TraceOptions) -> Asked:
        """Read the options `target`, `contrast` and `score`.

        Raises:
          InputError: there is no such token or place, or the contrast is of a token with itself.
        """
        asked = [subject.bundle.token_id(token) for token in opts.contrast or opts.target]
        if opts.contrast and asked[0] == asked[1]:
            raise InputError(f"contrast compares two tokens, both given are {opts.contrast[0]!r}")
        score = subject.place(*opts.score) if opts.score else None
        return cls(asked, opts.contrast is not None, score)

    def predictions(self, subject: Subject, opts: TraceOptions) -> list[Prediction]:
        """The likeliest next tokens, and which of them (or which others) are targets."""
        logits, bundle = subject.logits, subject.bundle
        raised = np.exp(logits - logits.max())
        probability = raised / raised.sum()
        order = np.argsort(-probability, kind="stable")[: max(opts.max_logits, 10)]
        before = np.cumsum(probability[order]) - probability[order]
        likely = (np.arange(len(order)) < opts.max_logits) & (before < opts.logit_mass)
        likely &= not self.tokens and self.score is None
        found = dict(zip(order.tolist(), likely.tolist(), strict=True))
        found |= dict.fromkeys(self.tokens, True)
        against = self.tokens[1] if self.contrast else -1
        if self.contrast:
            found[against] = False
        return [
            Prediction(
                token=bundle.token(token),
                id=token,
                probability=float(probability[token]),
                logit=float(logits[token]),
                target=target,
                against=against if target else -1,
            )
            for token, target in found.items()
        ]

    def targets(self, subject: Subject, opts: TraceOptions, said: list[Prediction]) -> Targets:
        """Where the sweep starts. said: the predictions."""
        start = Targets.of_logits(subject, opts, said)
        return start if self.score is None else start.with_scores([self.score], [1.0])


@dataclasses.dataclass(frozen=True)
class Targets:
    """P direct targets of a subject, in order, on the host.

    direct: boundary, position, covector, constant and influence of each.
    kind, index: `[P]` LOGIT and the token, or SCORE and its row of `scores`.
    names: in words.
    scores: `[X, 5]` block, head, query, key, side.
    against: the token whose logit is subtracted, of a difference; else -1.
    """

    subject: Subject
    opts: TraceOptions
    direct: DirectTargets
    kind: np.ndarray
    index: np.ndarray
    names: list[str]
    scores: np.ndarray
    against: int = -1

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of_logits(cls, subject: Subject, opts: TraceOptions, said: list[Prediction]) -> Targets:
        """The logits after the last token that are targets, or the difference of two."""
        chosen, config = [p for p in said if p["target"]], subject.bundle.config
        token = np.array([p["id"] for p in chosen], int)
        against = np.array([p["against"] for p in chosen], int)
        probability = np.array([p["probability"] for p in chosen])
        difference = (against >= 0).any()
        weight = np.ones(1) if difference else probability / max(probability.sum(), 1e-30)
        covector, constant = np.zeros((0, config.d_model), np.float32), np.zeros(0, np.float32)
        if chosen:
            size = bucket(len(chosen), smallest=16)  # other numbers of targets meet compiled code
            found = logit_covectors(
                subject.bundle.params,
                subject.last,
                np.resize(token, size),
                np.resize(against, size),
                cfg=config,
            )
            covector, constant = (a[: len(chosen)] for a in jax.device_get(found))
        last = len(subject.ids) - 1
        return cls(
            subject=subject,
            opts=opts,
            direct=DirectTargets(
                boundary=np.full(len(chosen), config.n_blocks),
                position=np.full(len(chosen), last),
                covector=covector,
                constant=constant,
                influence=weight.astype(np.float32),
            ),
            kind=np.full(len(chosen), int(Kind.LOGIT)),
            index=token,
            names=[logit_name(said, p) for p in chosen],
            scores=np.zeros((0, 5), int),
            against=int(against[0]) if difference else -1,
        )

    def with_scores(self, places: Sequence[Place], influence: Sequence[float]) -> Targets:
        """These and some scores, each read on both sides, half its influence on each."""
        if not places:
            return self
        found = score_covectors(
            self.subject.bundle.params.blocks,
            self.subject.boundaries,
            np.resize(np.array(places, np.int32), (bucket(len(places), smallest=1), 4)),
            cfg=self.subject.bundle.config.block,
            precision=self.opts.precision,
        )
        covector, constant = (
            a[: len(places)].reshape(2 * len(places), *a.shape[2:]) for a in jax.device_get(found)
        )
        at, side = np.repeat(np.array(places), 2, axis=0), np.tile([0, 1], len(places))
        more = DirectTargets(
            boundary=at[:, 0],
            position=np.where(side == 0, at[:, 2], at[:, 3]),
            covector=covector,
            constant=constant,
            influence=(np.repeat(np.array(influence), 2) / 2).astype(np.float32),
        )
        index = len(self.scores) + np.arange(len(at))
        return dataclasses.replace(
            self,
            direct=jax.tree.map(lambda *both: np.concatenate(both), self.direct, more),
            kind=np.concatenate([self.kind, np.full(len(at), int(Kind.SCORE))]),
            index=np.concatenate([self.index, index]),
            names=[*self.names, *(score_name(*place) for place in at.tolist())],
            scores=np.concatenate([self.scores, np.column_stack([at, side])]),
        )

    def sweep(self) -> Graph:
        """The graph behind all of them."""
        targets = self._padded(slice(None), bucket(len(self), smallest=16))
        swept = sweep(
            self.subject.bundle.params.blocks,
            self.subject.boundaries,
            self.subject.components,
            targets,
            cfg=self.subject.bundle.config.block,
            config=self.opts.sweep,
        )
        return build_graph(swept, targets, self.kind, self.index)

    def effects(self, *, heads: bool = False) -> list[Effects]:
        """The effects on all of them, on the host, `AT_ONCE` at a time; covectors stay behind.
        heads: with the arrays of all heads and positions."""
        found = []
        for start in range(0, len(self), AT_ONCE):
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
        bundle = self.subject.bundle
        model = bundle.params, jnp.asarray(self.subject.padded)
        how = dict(cfg=bundle.config, precision=self.opts.precision)
        if self.kind[0] == Kind.SCORE:
            return score_gradient(*model, jnp.asarray(self.scores[self.index[0], :4]), **how)
        at = int(self.direct.position[0]), int(self.index[0])
        return logit_gradient(*model, *at, self.against, **how)

    def _weights(self, start: int) -> np.ndarray:
        """What the main target has of the targets from there on."""
        weights = main_weights(self.kind)[start : start + AT_ONCE]
        return np.pad(weights, (0, AT_ONCE - len(weights)))

    def _effects(self, start: int, heads: bool = False) -> Effects:
        targets = self._padded(slice(start, start + AT_ONCE), AT_ONCE)
        return target_effects(
            self.subject.bundle.params.blocks,
            self.subject.boundaries,
            self.subject.components,
            targets.boundary,
            targets.position,
            targets.covector,
            targets.constant,
            cfg=self.subject.bundle.config.block,
            linearisation=self.opts.linearisation,
            precision=self.opts.precision,
            heads=heads,
            weights=self._weights(start),
            live=self._live,
            strongest=PLACES,
        )

    def _padded(self, some: slice, size: int) -> DirectTargets:
        chosen = jax.tree.map(lambda column: column[some], self.direct)
        return direct_targets(**vars(chosen), padded_to=size)


def targets_of(traced: Traced, subject: Subject) -> Targets:
    """The targets of what was traced, in their order."""
    start = Targets.of_logits(subject, traced.options, traced.predictions)
    places = [tuple(row) for row in traced.scores[::2, :4].tolist()]
    return start.with_scores(places, [1.0] * len(places))
