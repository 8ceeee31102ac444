"""QK attributions as a table: what `qk_terms` computed, on the host,
under the names of `qkattr qk --json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qkattr.errors import InputError, quoted
from qkattr.extras import need
from qkattr.kinds import Kind, Place
from qkattr.sources.table import ComponentTable, Number

if TYPE_CHECKING:
    from qkattr.qk.terms import QKTerms


@dataclasses.dataclass(frozen=True, repr=False)
class QKAttribution:
    """One head's score at one (query, key) position, expanded. Attributes are the keys of the JSON.

    tokens: of the prompt, in words.
    layer, head, query, key: the place.
    score: after the scale, before the softcap.
    capped: the score after the softcap.
    slope: d capped / d score.
    probability: the attention there.
    sum: of all terms.
    shares: by "query kind-key kind", the signed sums (adding to the score) and the absolute shares
      (adding to 1).
    pairs: by falling |value|, each with its contrast (see `qk.terms`); with a target, every pair
      and marginal has its `effect` on it over all keys (see `qk.effects`).
    n_pairs: how many there are, listed or not.
    query_marginals, key_marginals: sums of terms over the other side.
    target: of the trace, in words; None where no target was traced.
    effect: what the head brings the target from the key to the query.
    derivative: of the target with respect to the score.
    """

    tokens: list[str]
    layer: int
    head: int
    query: int
    key: int
    score: float
    capped: float
    slope: float
    probability: float
    sum: float
    shares: dict[str, dict[str, float]]
    pairs: list[dict[str, Any]]
    n_pairs: int
    query_marginals: list[dict[str, Any]]
    key_marginals: list[dict[str, Any]]
    target: str | None = None
    effect: float | None = None
    derivative: float | None = None

    def __repr__(self) -> str:
        query, key = (f"{quoted(self.tokens[p], 20)} {p}" for p in (self.query, self.key))
        return (
            f"<QKAttribution {self.layer}.{self.head} from {query} to {key}: score "
            f"{self.score:.3f}, probability {self.probability:.3f}, {self.n_pairs} pairs>"
        )

    def to_pandas(self, table: str = "pairs"):
        """The "pairs", "query_marginals" or "key_marginals" as a data frame; a side of a pair is
        the columns `query_kind`, `query_index`, ...

        Raises:
          InputError: there is no such table, or pandas is not installed.
        """
        known = ("pairs", "query_marginals", "key_marginals")
        if table not in known:
            raise InputError(f"no table {table!r}; expected one of {', '.join(known)}")
        return need("pandas", "to_pandas needs").DataFrame(
            [_flat(row) for row in getattr(self, table)]
        )

    def to_json(self, top: int | None = None) -> dict[str, Any]:
        """A plain object; `top` bounds the pairs and the marginals listed."""
        bounded = ("pairs", "query_marginals", "key_marginals")
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {k: v[:top] if k in bounded else v for k, v in values.items()}

    def with_labels(self, labels: Mapping[tuple[int, int], str]) -> QKAttribution:
        """The same with other labels of features, by (boundary, index)."""

        def named(component: dict[str, Any]) -> dict[str, Any]:
            if component["kind"] != Kind.FEATURE.label:
                return component
            feature = (self.layer, component["index"])
            return {**component, "label": labels.get(feature, component["label"])}

        pairs = [{**p, "query": named(p["query"]), "key": named(p["key"])} for p in self.pairs]
        return dataclasses.replace(
            self,
            pairs=pairs,
            query_marginals=[named(m) for m in self.query_marginals],
            key_marginals=[named(m) for m in self.key_marginals],
        )

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> QKAttribution:
        return cls(**raw)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Nested objects as columns of their own."""
    flat = {}
    for name, value in row.items():
        inner = value if isinstance(value, dict) else None
        flat |= {name: value} if inner is None else {f"{name}_{k}": v for k, v in inner.items()}
    return flat


@dataclasses.dataclass(frozen=True)
class Moved:
    """What one place does to a target.

    name: the target, in words.
    effect: what the head brings it from the key.
    derivative: of the target with respect to the score.
    pairs: `[A, C]` what each pair's match moves it by, over all keys.
    """

    name: str
    effect: float
    derivative: float
    pairs: np.ndarray

    @property
    def numbers(self) -> dict[str, Any]:
        return dict(target=self.name, effect=self.effect, derivative=self.derivative)


def qk_table(
    terms: QKTerms, components: ComponentTable, place: Place, moved: Moved | None = None
) -> QKAttribution:
    """The table of one place (block, head, query, key).

    components: of the boundary that the block reads. moved: what the place does to a target.
    """
    layer, head, query, key = place
    rows, columns = np.flatnonzero(terms.query_used), np.flatnonzero(terms.key_used)
    value = terms.terms[np.ix_(rows, columns)].astype(float)
    contrast = terms.contrast[np.ix_(rows, columns)].astype(float)
    queries, keys = components.rows(query, rows), components.rows(key, columns)
    order = np.argsort(-np.abs(value), axis=None, kind="stable")
    at = zip(*np.unravel_index(order, value.shape), strict=True)
    effect = None if moved is None else moved.pairs[np.ix_(rows, columns)].astype(float)
    known = {} if moved is None else moved.numbers
    pairs = [
        dict(
            query=queries[a],
            key=keys[c],
            value=float(value[a, c]),
            contrast=float(contrast[a, c]),
            **({} if effect is None else dict(effect=float(effect[a, c]))),
        )
        for a, c in at
    ]
    by_query, by_key = (None, None) if effect is None else (effect.sum(1), effect.sum(0))
    return QKAttribution(
        tokens=components.tokens,
        layer=layer,
        head=head,
        query=query,
        key=key,
        score=float(terms.score),
        capped=float(terms.capped),
        slope=float(terms.slope),
        probability=float(terms.probability),
        sum=float(value.sum()),
        shares=_shares(value, terms.query_kind[rows], terms.key_kind[columns]),
        pairs=pairs,
        n_pairs=len(pairs),
        query_marginals=_marginals(queries, value.sum(1), terms.query_contrast[rows], by_query),
        key_marginals=_marginals(keys, value.sum(0), contrast.sum(0), by_key),
        **known,
    )


def _shares(value, query_kind, key_kind) -> dict[str, dict[str, float]]:
    cells = []
    for q in sorted(set(query_kind.tolist())):
        for k in sorted(set(key_kind.tolist())):
            part = value[np.ix_(query_kind == q, key_kind == k)]
            cells.append((q, k, part.sum(), np.abs(part).sum()))
    return shares_by_kind(cells, np.abs(value).sum())


def shares_by_kind(
    cells: Iterable[tuple[Number, Number, float, float]], total: float
) -> dict[str, dict[str, float]]:
    """Shares by "query kind-key kind", the largest first.

    cells: kind of the query side and of the key side, signed sum, absolute sum. total: of all the
    absolute sums.
    """
    shares = {
        f"{Kind(q).label}-{Kind(k).label}": dict(
            signed=float(signed), absolute=float(absolute / max(total, 1e-30))
        )
        for q, k, signed, absolute in cells
    }
    return dict(sorted(shares.items(), key=lambda item: -item[1]["absolute"]))


def _marginals(described, values, contrasts, effects) -> list[dict[str, Any]]:
    columns = dict(value=values, contrast=contrasts)
    if effects is not None:
        columns["effect"] = effects
    listed = [
        {k: d[k] for k in ("kind", "index", "label")}
        | {name: float(column[i]) for name, column in columns.items()}
        for i, d in enumerate(described)
    ]
    return sorted(listed, key=lambda m: -abs(m["value"]))
