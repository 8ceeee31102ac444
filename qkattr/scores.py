"""QK attributions of a prompt: which place is meant, and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from qkattr.errors import InputError
from qkattr.graph.effects import PlaceEffects, effects_at, masking_at
from qkattr.kinds import Kind, Place
from qkattr.load.bundle import Bundle, Prompt
from qkattr.model.forward import block
from qkattr.options import make_options
from qkattr.qk.pair_effects import pair_effects
from qkattr.qk.table import Labeller, Moved, QKAttribution, qk_table
from qkattr.qk.terms import QKTerms, qk_terms_many
from qkattr.result import Result
from qkattr.session import Progress, Session, prompt_labels, start_session
from qkattr.sharding import bucket
from qkattr.stored import place_in, stored_in_full

Labels = Mapping[tuple[int, int], str]


def qk_attribution(
    result: Result, *, layer: int, head: int, query: int | str, key: int | str
) -> QKAttribution:
    """Why head `head` of block `layer` attended from `query` to `key`: its score, expanded.

    Args:
      query, key: positions, negative positions, or token texts.

    Raises:
      InputError: no such head or position, the key comes after the query or lies outside the
        window, or the result was opened without its model and does not hold this place in full.
    """
    place = place_in(result, (layer, head, query, key))
    stored = stored_in_full(result, place)
    if stored is not None:
        return stored
    return qk_tables(need_session(result), [place], result.labels)[place]


def attribute_qk(
    bundle: Bundle,
    prompt: Prompt,
    *,
    layer: int,
    head: int,
    query: int | str,
    key: int | str,
    labels: Labels | None = None,
    progress: Progress = lambda stage: None,
    **options: Any,
) -> QKAttribution:
    """`qk_attribution` of a prompt without tracing a graph first.

    Raises:
      InputError: the prompt, the place or an option (see `TraceOptions`) cannot be used.
    """
    session, place, labels = open_place(
        bundle, prompt, (layer, head, query, key), labels=labels, progress=progress, **options
    )
    progress("QK attribution")
    return qk_tables(session, [place], labels)[place]


def attention_at(session: Session, query: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Every head's score and attention at one (query, key): two arrays `[L, N]`."""
    score, probability = _scores_at(
        session.bundle.params.blocks,
        session.boundaries,
        query,
        key,
        cfg=session.bundle.config.block,
    )
    return np.asarray(score), np.asarray(probability)


@partial(jax.jit, static_argnames=("cfg",))
def _scores_at(blocks, boundaries, query, key, *, cfg):
    def one(inputs):
        weights, x = inputs
        _, seen = block(weights, x, cfg=cfg)
        return seen.scores_NTS[:, query, key], seen.pattern_NTS[:, query, key]

    return jax.lax.map(one, (blocks, boundaries[:-1]))


def need_session(result: Result) -> Session:
    """The result's session.

    Raises:
      InputError: it was opened from disk without its model.
    """
    if result.session is None:
        raise InputError(
            "this result was opened without its model and does not hold that; open it with "
            "qkattr.open(folder, bundle=qkattr.load(...))"
        )
    return result.session


def terms_at(session: Session, places: Sequence[Place] | np.ndarray) -> QKTerms:
    """The terms of P places (block, head, query, key), on the host, with a leading axis P."""
    terms = qk_terms_many(
        session.bundle.params.blocks,
        session.boundaries,
        session.components,
        _padded(places),
        cfg=session.bundle.config.block,
        precision=session.precision,
    )
    return jax.tree.map(lambda a: a[: len(places)], jax.device_get(terms))


def qk_tables(
    session: Session, places: Sequence[Place], labels: Labels
) -> dict[Place, QKAttribution]:
    """The QK attributions of several places, computed in one call."""
    if not places:
        return {}
    terms, moved = terms_at(session, places), moved_at(session, places)
    tables = {}
    for i, place in enumerate(places):
        block_, _, query, key = place
        tables[place] = qk_table(
            jax.tree.map(lambda a, i=i: a[i], terms),
            tokens=session.tokens,
            place=place,
            label_query=labeller(session, labels, block_, query),
            label_key=labeller(session, labels, block_, key),
            moved=moved[i],
        )
    return tables


def moved_at(session: Session, places: Sequence[Place]) -> list[Moved | None]:
    """What P places do to the target of the trace; None where nothing was traced."""
    target = session.target
    if target is None:
        return [None] * len(places)
    at = _effects_at(session, places)
    pairs = pair_effects(
        session.bundle.params.blocks,
        session.boundaries,
        session.components,
        _padded(places),
        at.derivative,
        cfg=session.bundle.config.block,
        precision=session.precision,
    )
    head, derivative, over_keys = (
        at.head[:, 0].sum(-1),
        at.derivative[:, 0],
        np.asarray(pairs.over_keys)[:, 0],
    )
    return [
        Moved(target.name, float(head[i]), float(derivative[i, key]), over_keys[i])
        for i, (_, _, _, key) in enumerate(places)
    ]


def heads_at(result: Result, *, query: int, key: int) -> list[dict[str, Any]]:
    """All heads at one (query, key), by falling |masking|; see `Result.head_effects`.

    Raises:
      InputError: the result was opened without its model and does not hold all of them.
    """
    if result.graph.heads.complete:
        return result.head_effects(source=key, target=query)
    session = need_session(result)
    score, probability = attention_at(session, query, key)
    heads = list(np.ndindex(score.shape))
    found = _effects_at(session, [(*head, query, key) for head in heads])
    effect, derivative = found.head[:, 0].sum(-1), found.derivative[:, 0, key]
    masked = _masking_at(session, query, key)
    block, head = np.array(heads).T
    flow = result.graph.influence_at(block, np.full(len(block), query), np.full(len(block), key))
    rows = [
        dict(
            layer=b, head=n, query=query, key=key, masking=float(masked[b, n]),
            effect=float(effect[i]),
            derivative=float(derivative[i]), score=float(score[b, n]),
            probability=float(probability[b, n]), influence=float(flow[i, n]),
        )
        for i, (b, n) in enumerate(heads)
        if effect[i] or masked[b, n]
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -abs(row["masking"]))


def _masking_at(session: Session, query: int, key: int) -> np.ndarray:
    """`[L, N]` on the host; for a traced session."""
    target = session.target
    assert target is not None
    found = masking_at(
        session.bundle.params.blocks,
        session.boundaries,
        target.live,
        np.int32(query),
        np.int32(key),
        cfg=session.bundle.config.block,
        precision=session.precision,
    )
    return np.asarray(found)


def _effects_at(session: Session, places: Sequence[Place]) -> PlaceEffects:
    """On the host, of the main target; for a traced session. Padding is still there."""
    target = session.target
    assert target is not None
    return jax.device_get(
        effects_at(
            session.bundle.params.blocks,
            session.boundaries,
            session.components,
            target.covector[:, None],
            _padded(places),
            cfg=session.bundle.config.block,
            linearisation=target.linearisation,
            precision=session.precision,
        )
    )


def _padded(places: Sequence[Place] | np.ndarray) -> np.ndarray:
    """Padded to a bucket of their number, so that other numbers meet compiled code."""
    return np.resize(np.asarray(places, np.int32), (bucket(len(places), smallest=1), 4))


def labeller(session: Session, labels: Labels, boundary: int, position: int) -> Labeller:
    """What components of a position are called: a feature's label, a token's text."""
    return partial(_label, labels, boundary, session.tokens[position])


def open_place(
    subject: Result | Bundle,
    prompt: Prompt | None,
    place: tuple,
    *,
    labels: Labels | None = None,
    progress: Progress = lambda stage: None,
    **options: Any,
) -> tuple[Session, Place, Labels]:
    """The session, the checked place (block, head, query, key) and the labels of an analysis.

    subject: a result (then no prompt and no options), or a bundle with a prompt and its options.

    Raises:
      InputError: the place, the prompt or an option cannot be used, or the result has no model.
    """
    if isinstance(subject, Result):
        found = place_in(subject, place)
    else:
        ids, _ = subject.tokenize(_need(prompt), make_options(options).bos)
        found = subject.find_place(subject.tokens(ids), place)
    session, labels = open_session(subject, prompt, labels=labels, progress=progress, **options)
    return session, found, labels


def open_session(
    subject: Result | Bundle,
    prompt: Prompt | None,
    *,
    labels: Labels | None = None,
    progress: Progress = lambda stage: None,
    **options: Any,
) -> tuple[Session, Labels]:
    """The session and the labels of an analysis of a whole prompt; see `open_place`.

    Raises:
      InputError: the prompt or an option cannot be used, or the result has no model.
    """
    if isinstance(subject, Result):
        if prompt is not None or options:
            raise InputError("a result has its prompt and options; give them with a bundle only")
        return need_session(subject), subject.labels if labels is None else labels
    opts = make_options(options)
    ids, _ = subject.tokenize(_need(prompt), opts.bos)
    session = start_session(subject, ids, opts, progress)
    return session, prompt_labels(session) if labels is None else labels


def _need(prompt: Prompt | None) -> Prompt:
    if prompt is None:
        raise InputError("a bundle needs a prompt; give text, token ids or messages")
    return prompt


def _label(labels: Labels, boundary: int, token: str, kind: Kind, index: int) -> str:
    if kind == Kind.FEATURE:
        return labels.get((boundary, index), "")
    return token if kind == Kind.TOKEN else ""
