"""QK attributions against the model: is a score what its marginals say, and does it matter?

For the heads with the most influence between two positions, features are removed from what the
head reads on one side (scale 0), one by one and the k strongest together:

    predicted change of the score = - sum of the removed features' marginals
    actual                        = the score recomputed, norm scales frozen (equal), and live

and, against controls (other features of the same position, matched in |vector|), what attention and
the next token lose. On the key side features rank by marginal, on the query side by contrast.
Axes: P places, B runs, C slots of the position, D d_model.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qkattr.analyses.places import terms_at
from qkattr.experiments.control import matched
from qkattr.experiments.edits import Head
from qkattr.experiments.faithfulness.statistics import correlation, slope
from qkattr.experiments.runs import clean_top, run_edits
from qkattr.kinds import Kind
from qkattr.model.attention import apart
from qkattr.model.edits import BlockEdits, Edits, ReadEdits
from qkattr.model.transformer import block
from qkattr.qk.terms import QKTerms
from qkattr.sharding import on_any_mesh
from qkattr.subject import Subject

#: How many features are removed together.
GROUPS = (1, 2, 4, 8, 16)
SIDES = ("key", "query")


@partial(jax.jit, static_argnames=("cfg", "side", "live", "precision"))
@on_any_mesh
def removed_scores(
    blocks,
    boundaries: Float[Array, "L+1 T D"],
    places: Int[Array, "P 4"],
    vectors: Float[Array, "P C D"],
    removed: Float[Array, "P B C"],
    *,
    cfg,
    side: str,
    live: bool,
    precision: str = "highest",
) -> tuple[Float[Array, "P B"], Float[Array, "P B"]]:
    """Score and attention of each place (block, head, query, key) with components removed.

    vectors: the components of the side's position. removed: what share of each is taken out of what
    the head reads.
    """

    def one(inputs):
        (b, head, query, key), vectors, shares = inputs
        weights, x = jax.tree.map(lambda a: a[b], (blocks, boundaries[:-1]))
        alone, n = apart(weights, head)
        position = key if side == "key" else query
        sums = jnp.einsum("BC,CD->BD", shares, vectors, precision="highest")

        def run(vector):
            edit = ReadEdits(
                position_E=position[None],
                vector_ED=vector[None],
                scale_E=jnp.zeros(1),
                heads_EN=(jnp.arange(alone.wq_DNH.shape[1]) == n)[None],
            )
            edits = dataclasses.replace(BlockEdits(live_scales=live), **{side: edit})
            _, seen = block(alone, x, cfg=cfg, edits=edits, precision=precision)
            return seen.scores_NTS[n, query, key], seen.pattern_NTS[n, query, key]

        return jax.lax.map(run, sums, batch_size=16)

    return jax.lax.map(one, (places, vectors, removed))


@dataclasses.dataclass(frozen=True)
class _Ranked:
    """One side of one place: its active features, the strongest first, and their marginals."""

    slots: np.ndarray
    marginal: Array | np.ndarray
    size: np.ndarray


def measure_qk(
    subject: Subject,
    heads: list[Head],
    *,
    query: int,
    key: int,
    draws: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """All of this module's measures on one prompt, as a plain object.

    Places whose position holds no feature (a sink, tokens at boundary 0) are left out, and so is a
    side without places.
    """
    places = np.array([(*head, query, key) for head in heads], np.int32)
    terms = terms_at(subject, places)
    found = {}
    for side in SIDES:
        kinds = terms.key_kind if side == "key" else terms.query_kind
        there = np.flatnonzero((kinds == Kind.FEATURE).any(1))
        if len(there):
            some = jax.tree.map(lambda a, there=there: a[there], terms)
            found[side] = _side(subject, places[there], some, side, draws, rng)
    return found


def _vectors(subject: Subject, places: np.ndarray, side: str) -> Float[Array, "P C D"]:
    """Every component of the side's position, at the boundary of every place.

    Apart from the programs that use them: these do not depend on how many directions a prompt has.
    """
    position = places[:, 3] if side == "key" else places[:, 2]
    at = np.broadcast_to(position[:, None], (len(places), subject.components.n_slots))
    slots = np.broadcast_to(np.arange(at.shape[1]), at.shape)
    return subject.components.at(at, slots, np.broadcast_to(places[:, :1], at.shape))


def _side(subject, places, terms: QKTerms, side: str, draws: int, rng) -> dict[str, Any]:
    vectors = _vectors(subject, places, side)
    size = np.linalg.norm(np.asarray(vectors), axis=-1)
    marginals = terms.terms.sum(1) if side == "key" else terms.terms.sum(2)
    ranking = marginals if side == "key" else terms.query_contrast
    kinds = terms.key_kind if side == "key" else terms.query_kind
    ranked = []
    for i in range(len(places)):
        features = np.flatnonzero(kinds[i] == Kind.FEATURE)
        order = features[np.argsort(-ranking[i, features], kind="stable")]
        ranked.append(_Ranked(order, marginals[i, order], size[i, order]))
    singles = _runs(subject, places, vectors, _single_masks(ranked, kinds.shape[1]), side)
    groups, controls = _group_masks(ranked, kinds.shape[1], draws, rng)
    masks = np.concatenate([groups[:, None], controls], axis=1)
    grouped = _runs(subject, places, vectors, masks, side)
    next_token = _next_tokens(subject, places, vectors, masks, side)
    return dict(
        single=_compare(singles, ranked, terms.score),
        groups=_attention(grouped, marginals, groups, terms),
        next_token=next_token,
    )


def _single_masks(ranked: list[_Ranked], n_slots: int) -> np.ndarray:
    """`[P, B, C]`: one run an active feature, in order; runs beyond their number remove nothing."""
    masks = np.zeros((len(ranked), n_slots, n_slots), np.float32)
    for i, place in enumerate(ranked):
        masks[i, np.arange(len(place.slots)), place.slots] = 1
    return masks


def _group_masks(ranked: list[_Ranked], n_slots: int, draws: int, rng):
    """The k strongest features together `[P, K, C]`, and as many matched others `[P, draws, K, C]`.

    A group takes at most half of the features, so that there are controls for each of them.
    """
    groups = np.zeros((len(ranked), len(GROUPS), n_slots), np.float32)
    controls = np.zeros((len(ranked), draws, len(GROUPS), n_slots), np.float32)
    for i, place in enumerate(ranked):
        for g, k in enumerate(GROUPS):
            k = min(k, len(place.slots) // 2)
            groups[i, g, place.slots[:k]] = 1
            for draw in range(draws):
                drawn = matched(place.size[:k], place.size[k:], rng)
                controls[i, draw, g, place.slots[k:][drawn]] = 1
    return groups, controls


def _runs(subject, places, vectors, masks: np.ndarray, side: str) -> dict[str, tuple]:
    """Scores and attention with these components removed, scales frozen and live; the masks' middle
    axes are kept."""
    flat = masks.reshape(len(places), -1, masks.shape[-1])
    found = {}
    for name, live in (("frozen", False), ("live", True)):
        score, attention = removed_scores(
            subject.bundle.params.blocks,
            subject.boundaries,
            jnp.asarray(places),
            vectors,
            jnp.asarray(flat),
            cfg=subject.bundle.config.block,
            side=side,
            live=live,
            precision=subject.precision,
        )
        shape = masks.shape[:-1]
        found[name] = np.asarray(score).reshape(shape), np.asarray(attention).reshape(shape)
    return found


def _compare(runs, ranked: list[_Ranked], score: Array | np.ndarray) -> dict[str, Any]:
    """Predicted against actual changes of the score from removing single features."""
    predicted = np.concatenate([-place.marginal for place in ranked])
    out: dict[str, Any] = dict(n=len(predicted), predicted=predicted.tolist())
    for name, (after, _) in runs.items():
        change = [after[i, : len(place.slots)] - score[i] for i, place in enumerate(ranked)]
        actual = np.concatenate(change)
        out[name] = dict(
            actual=actual.tolist(),
            worst=float(np.abs(actual - predicted).max() / np.abs(score).max()),
            correlation=correlation(predicted, actual),
            slope=slope(predicted, actual),
        )
    return out


def _attention(runs, marginals, groups, terms: QKTerms) -> list[dict[str, Any]]:
    """Per k: predicted and actual change of the score; what attention loses, against controls."""
    predicted = -np.einsum("PC,PKC->PK", marginals, groups)
    rows = []
    for g, k in enumerate(GROUPS):
        row: dict[str, Any] = dict(k=k, predicted=float(predicted[:, g].mean()))
        for name, (score, attention) in runs.items():
            change = score[:, 0, g] - terms.score
            lost = terms.probability[:, None] - attention[:, :, g]
            row[name] = dict(
                actual=float(change.mean()),
                worst=float(np.abs(change - predicted[:, g]).max() / np.abs(terms.score).max()),
                attention_lost=float(lost[:, 0].mean()),
                control_lost=float(lost[:, 1:].mean()),
            )
        rows.append(row)
    return rows


def _next_tokens(subject: Subject, places, vectors, masks, side: str) -> list[dict[str, Any]]:
    """What the clean top token's log probability loses when each head's group goes, in all heads at
    once, against controls."""
    n_runs, n_groups = masks.shape[1:3]
    top, clean = clean_top(subject)
    found = {}
    for name, live in (("frozen", False), ("live", True)):
        flat = masks.reshape(len(places), n_runs * n_groups, -1)
        edits = _all_heads(subject, places, vectors, flat, side)
        blocks = dataclasses.replace(BlockEdits(live_scales=live), **{side: edits})
        runs = run_edits(subject, Edits(blocks=blocks), queries=[0])
        found[name] = clean - runs.log_p[:, top].reshape(n_runs, n_groups)
    return [
        dict(
            k=k,
            **{
                name: dict(lost=float(lost[0, g]), control_lost=float(lost[1:, g].mean()))
                for name, lost in found.items()
            },
        )
        for g, k in enumerate(GROUPS)
    ]


def _all_heads(subject: Subject, places, vectors, masks, side: str) -> ReadEdits:
    """One edit a place in its block, batched over runs: what is removed there, at scale 0."""
    config = subject.bundle.config
    at = places[:, 3] if side == "key" else places[:, 2]
    row = np.array([(places[:i, 0] == place[0]).sum() for i, place in enumerate(places)])
    # So many rows that every choice of as many heads runs the same program.
    shape = (config.n_blocks, min(len(places), config.n_heads))
    position = np.zeros(shape, np.int32)
    scale = np.ones(shape, np.float32)
    heads = np.zeros((*shape, config.n_heads), bool)
    index = places[:, 0], row
    position[index], scale[index], heads[(*index, places[:, 1])] = at, 0.0, True
    sums = jnp.einsum("PBC,PCD->PBD", masks, vectors, precision="highest")
    vector = jnp.zeros((masks.shape[1], *shape, sums.shape[-1]))
    return ReadEdits(
        position_E=jnp.asarray(position),
        vector_ED=vector.at[:, places[:, 0], row].set(jnp.moveaxis(sums, 0, 1)),
        scale_E=jnp.asarray(scale),
        heads_EN=jnp.asarray(heads),
    )
