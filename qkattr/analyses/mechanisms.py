"""The parallel reasons of one score, or of the same score over several prompts.

    mechanisms(subject, layer=, head=, query=, key=)
    mechanisms([subject, ...], layer=, head=, query=, key=)

Over prompts, components are matched by kind and index, and their terms summed before the matrix is
decomposed (see `qk.mechanisms`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qkattr.analyses.places import terms_at
from qkattr.errors import InputError
from qkattr.kinds import Kind, Place
from qkattr.qk.mechanisms import Mechanisms, decompose_terms
from qkattr.subject import HasSubject, Subject, enter


@dataclasses.dataclass(frozen=True)
class MechanismTable:
    """Attributes are the keys of the JSON.

    score: the sum of the terms (over all prompts). features: whether only pairs of two features
    were decomposed; rest: what the other terms add to the score. rank: effective rank of the matrix
    decomposed. cross: the share of its sum |terms| between components of different mechanisms.
    mechanisms: by falling sigma, each with what it `carried` of the score, its `share` of
    sum sigma^2, and its largest `query` and `key` components with their `weight`, the entry of the
    singular vector. n_prompts: how many were summed. error_share: of sum |all terms|, with an error
    slot on either side.
    """

    tokens: list[str]
    layer: int
    head: int
    query: int
    key: int
    score: float
    features: bool
    rest: float
    rank: float
    cross: float
    mechanisms: list[dict[str, Any]]
    n_prompts: int
    error_share: float

    def to_json(self) -> dict[str, Any]:
        """A plain object."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class _Side:
    """Components of one side: their names (kind, index) and how the JSON describes them."""

    names: list[tuple[int, int]]
    described: Sequence[Mapping[str, Any]]


def mechanisms(
    subject: HasSubject | Sequence[HasSubject],
    *,
    layer: int,
    head: int,
    query: int | str,
    key: int | str,
    top: int = 8,
    features: bool = False,
) -> MechanismTable:
    """The mechanisms of one score, or of the same score summed over several prompts.

    subject: one, or several; positions are those of every prompt (token texts or negative
    ones, where lengths differ), and tokens, query and key of the result are the first one's.
    features: decompose only the pairs of two features; the bias, which meets everything, often
    hides them.

    Raises:
      InputError: there are no prompts, or the place is not one of each of them.
    """
    given = list(subject) if isinstance(subject, Sequence) else [subject]
    if not given:
        raise InputError("mechanisms got no prompts; give at least one")
    subjects = [enter(each) for each in given]
    places = [each.place(layer, head, query, key) for each in subjects]
    parts = []
    for i, (each, place) in enumerate(zip(subjects, places, strict=True)):
        many = len(subjects) > 1
        each.begin(f"prompt {i + 1} of {len(subjects)}" if many else "mechanisms")
        parts.append(_terms(each, place))
    return _table(parts, place=places[0], tokens=subjects[0].tokens, top=top, features=features)


def _terms(subject: Subject, place: Place) -> tuple[np.ndarray, _Side, _Side]:
    layer, _, query, key = place
    qk, table = terms_at(subject, [place]), subject.table(layer)
    rows, columns = np.flatnonzero(qk.query_used[0]), np.flatnonzero(qk.key_used[0])
    return (
        np.asarray(qk.terms[0], float)[np.ix_(rows, columns)],
        _Side(table.names(query, rows), table.rows(query, rows)),
        _Side(table.names(key, columns), table.rows(key, columns)),
    )


def _united(sides: list[_Side]) -> tuple[_Side, list[list[int]]]:
    """All components of several prompts, each once, and where each prompt's are among them."""
    at: dict[tuple[int, int], int] = {}
    described, where = [], []
    for side in sides:
        for name, words in zip(side.names, side.described, strict=True):
            if at.setdefault(name, len(at)) == len(described):
                described.append({k: v for k, v in words.items() if k != "activation"})
        where.append([at[name] for name in side.names])
    return _Side(list(at), described), where


def _table(parts, *, place, tokens, top: int, features: bool) -> MechanismTable:
    queries, query_at = _united([query for _, query, _ in parts])
    keys, key_at = _united([key for _, _, key in parts])
    terms = np.zeros((len(queries.names), len(keys.names)))
    for (of_prompt, _, _), rows, columns in zip(parts, query_at, key_at, strict=True):
        np.add.at(terms, np.ix_(rows, columns), of_prompt)
    sides, size = (queries, keys), np.abs(terms)
    sound = np.ix_(*([kind != Kind.ERROR for kind, _ in side.names] for side in sides))
    asked = terms
    if features:
        both = np.ix_(*([kind == Kind.FEATURE for kind, _ in side.names] for side in sides))
        asked = np.zeros_like(terms)
        asked[both] = terms[both]
    found = decompose_terms(asked)
    layer, head, query, key = place
    return MechanismTable(
        tokens=tokens,
        layer=layer,
        head=head,
        query=query,
        key=key,
        score=float(terms.sum()),
        features=features,
        rest=float(terms.sum() - asked.sum()),
        rank=found.rank,
        cross=found.cross,
        mechanisms=[_mechanism(found, i, queries, keys, top) for i in range(_listed(found, top))],
        n_prompts=len(parts),
        error_share=float(1 - size[sound].sum() / max(size.sum(), 1e-300)),
    )


def _listed(found: Mechanisms, top: int) -> int:
    return min(top, int((found.sigma_I > 1e-9 * max(found.sigma_I[0], 1e-300)).sum()))


def _mechanism(found: Mechanisms, i: int, queries: _Side, keys: _Side, top: int) -> dict[str, Any]:
    def largest(vector: np.ndarray, side: _Side) -> list[dict[str, Any]]:
        order = np.argsort(-np.abs(vector), kind="stable")[:top]
        return [side.described[j] | dict(weight=float(vector[j])) for j in order]

    square = found.sigma_I**2
    return dict(
        sigma=float(found.sigma_I[i]),
        carried=float(found.carried_I[i]),
        share=float(square[i] / max(square.sum(), 1e-300)),
        query=largest(found.query_IA[i], queries),
        key=largest(found.key_IC[i], keys),
    )
