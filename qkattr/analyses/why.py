"""Why a head looked at this key and not at the others: the competition of `qk.why` as tables.

    why(subject, layer=, head=, query=, key=)

lists what pushes the head towards the key and what pulls it away (the most inhibitory terms first,
at the key itself and at its competitors), every key with its attention and its part, features
summed over keys, and for each competitor the terms that decided between the two. With `against=`
the same lists decompose the difference of two scores, s(query, key) - s(query, against), and no
other key takes part.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import jax
import numpy as np

from qkattr.analyses.places import moved_at
from qkattr.errors import InputError, quoted
from qkattr.kinds import FOLDED_KINDS, Kind, Place
from qkattr.qk.table import shares_by_kind
from qkattr.qk.why import Competition, Nets, Rows, competition
from qkattr.sources.table import ComponentRow
from qkattr.subject import HasSubject, Subject, enter

#: A key "got attention" from here on: it is compared with the one asked about.
ATTENDED = 0.01
#: Competitors that are compared, the most attended first.
COMPETITORS = 8


@dataclasses.dataclass(frozen=True)
class Why:
    """One place, decomposed. Attributes are the keys of the JSON.

    form: "odds", "log" or "difference". against: the other key of a difference, else None. value:
    log(A / (1 - A)), log A, or log(A / A') = the difference of the two scores (after a softcap);
    entropy: of the pattern over the keys that w weighs, 0 for a difference; sum: of all rows, equal
    to value + entropy. pushes, pulls: pairs of a query and a
    key component, summed over the positions `at` of the key component, so that what is equal at all
    keys cancels; row_pushes, row_pulls: the single rows, each at one key. keys: every visible key
    with its attention, score, weight and the sum of its rows. query_side, features: components
    summed over all that they meet (on the key side over positions too). versus: for every other key
    that got attention, log(A / A') and the pairs that decided. shares: by kind on either side,
    signed and absolute. target: what was traced, in words, else None; then pushes and pulls also
    have their `effect` on it over all keys.
    """

    tokens: list[str]
    layer: int
    head: int
    query: int
    key: int
    against: int | None
    form: str
    probability: float
    value: float
    entropy: float
    sum: float
    pushes: list[dict[str, Any]]
    pulls: list[dict[str, Any]]
    row_pushes: list[dict[str, Any]]
    row_pulls: list[dict[str, Any]]
    keys: list[dict[str, Any]]
    query_side: list[dict[str, Any]]
    features: list[dict[str, Any]]
    versus: list[dict[str, Any]]
    shares: dict[str, dict[str, float]]
    target: str | None = None

    @property
    def error_share(self) -> float:
        """The absolute share of rows with an error slot on either side."""
        error = Kind.ERROR.label
        return sum(s["absolute"] for name, s in self.shares.items() if error in name.split("-"))

    def to_json(self) -> dict[str, Any]:
        """A plain object."""
        return dataclasses.asdict(self) | dict(error_share=self.error_share)


def why(
    subject: HasSubject,
    *,
    layer: int,
    head: int,
    query: int | str,
    key: int | str,
    against: int | str | None = None,
    form: str = "odds",
    top: int = 20,
    folded: bool = False,
) -> Why:
    """Decompose the log-odds (or the log) of one attention probability over all keys, or the
    difference between two keys.

    query, key, against: positions or token texts. form: "odds" or "log"; with `against` it is
    "difference". top: rows and components of each list. folded: leave rows and components with
    bias, error or sink on either side out of the lists; the sums and shares are of all.

    Raises:
      InputError: the place, the other key or the form cannot be used; or the query sees no other
        key, so that nothing competes.
    """
    form = check_form(form, against)
    subject = enter(subject)
    place = subject.place(layer, head, query, key)
    other = None if against is None else other_key(subject, place, against)
    subject.begin("competition")
    listed = _Listed(subject, place, other, folded)
    found = _compete(subject, place, listed, form, top, other or 0)
    if found.seen_S.sum() < 2:
        raise InputError(
            f"the query at {place[2]} sees no key but {place[3]}: nothing competes with it; "
            "give a later query"
        )
    return Why(
        tokens=subject.tokens,
        layer=place[0],
        head=place[1],
        query=place[2],
        key=place[3],
        against=other,
        form=form,
        probability=float(found.pattern_S[place[3]]),
        value=float(found.value),
        entropy=float(found.entropy),
        sum=float(found.total),
        pushes=listed.with_effects(listed.nets(found.net_pushes), found.net_pushes),
        pulls=listed.with_effects(listed.nets(found.net_pulls), found.net_pulls),
        target=None if subject.target is None else subject.target.name,
        row_pushes=listed.rows(found.pushes),
        row_pulls=listed.rows(found.pulls),
        keys=_keys(subject, found, listed.keys),
        query_side=listed.query_side(found)[:top],
        features=listed.features(found)[:top],
        versus=_versus(subject, place, found, listed, top) if other is None else [],
        shares=_shares(found),
    )


def check_form(form: str, against: int | str | None = None) -> str:
    """What is decomposed: the form, or "difference" where there is another key.

    Raises:
      InputError: `why` does not decompose the form, or it does not go with the other key.
    """
    if form not in ("odds", "log"):
        raise InputError(f"form is {quoted(form)}; give odds or log")
    if against is None:
        return form
    if form != "odds":
        raise InputError(f"form {form} weighs all keys, and against compares two; give one of them")
    return "difference"


def other_key(subject: Subject, place: Place, against: int | str) -> int:
    """The position of the other key.

    Raises:
      InputError: it is the key itself, or the query does not see it.
    """
    layer, _, query, key = place
    tokens, window = subject.tokens, subject.facts.windows[layer]
    other = subject.position(against)
    if other == key:
        raise InputError(
            f"against is {quoted(tokens[other])} {other}, which is the key itself; give another "
            "position"
        )
    if other > query or query - other >= window:
        first = max(0, query - window + 1)
        raise InputError(
            f"the query at {query} does not see the other key, {quoted(tokens[other])} {other}; "
            f"give a position from {first} to {query}"
        )
    return other


def _compete(
    subject: Subject, place, listed: _Listed, form: str, top: int, other: int = 0
) -> Competition:
    """On the host."""
    layer, head, query, key = place
    weights, x, parts = jax.tree.map(
        lambda a: a[layer],
        (subject.bundle.params.blocks, subject.boundaries, subject.components),
    )
    return jax.device_get(
        competition(
            weights, x, parts, listed.table.identities[0], head=head, query=query, key=key,
            other=other, listed=listed.shown(listed.table.kind), form=form, top=top,
            kinds=len(Kind), cfg=subject.bundle.config.block, precision=subject.precision,
        )
    )  # fmt: skip


class _Listed:
    """Rows of a place in words.

    keys: the positions that take part, all that the query may see unless two are compared.
    folded: rows and components with bias, error or sink are left out.
    """

    def __init__(self, subject: Subject, place: Place, other: int | None, folded: bool):
        layer, _, self.query, key = place
        self.keys = np.arange(self.query + 1) if other is None else np.array([key, other])
        self.subject, self.place, self.folded = subject, place, folded
        self.table = subject.table(layer)

    def shown(self, kind: np.ndarray) -> np.ndarray:
        """Which slots are listed."""
        return ~(np.isin(kind, FOLDED_KINDS) & self.folded)

    def rows(self, rows: Rows) -> list[dict[str, Any]]:
        return [
            dict(
                query=self.table.row(self.query, a),
                key=self.table.row(s, c),
                at=int(s),
                value=float(value),
            )
            for value, a, s, c in zip(
                rows.value, rows.query_slot, rows.key, rows.key_slot, strict=True
            )
            if value != 0
        ]

    def nets(self, nets: Nets) -> list[dict[str, Any]]:
        identity, first = self.table.identities
        found = []
        for value, a, name in zip(nets.value, nets.query_slot, nets.identity, strict=True):
            if value == 0:
                continue
            key = self.table.row(*first[name])
            active = (identity[self.keys] == name).any(1)
            at = np.sort(self.keys[active]).tolist()
            query = self.table.row(self.query, a)
            found.append(dict(query=query, key=_anywhere(key), at=at, value=float(value)))
        return found

    def with_effects(self, rows: list[dict], nets: Nets) -> list[dict[str, Any]]:
        """The rows of `nets`, each with what its match moves the trace's target by, over all keys
        (see `qk.effects`); as they are where nothing was traced."""
        if self.subject.target is None or not rows:
            return rows
        _, first = self.table.identities
        columns = zip(nets.value, nets.query_slot, nets.identity, strict=True)
        at = [(a, *first[i]) for value, a, i in columns if value != 0]
        keys = sorted({int(s) for _, s, _ in at})
        layer, head, query, _ = self.place
        moved = moved_at(self.subject, [(layer, head, query, s) for s in keys])
        pairs = {s: one.pairs for s, one in zip(keys, moved, strict=True) if one is not None}
        return [
            row | dict(effect=float(pairs[int(s)][a, c]))
            for row, (a, s, c) in zip(rows, at, strict=True)
        ]

    def query_side(self, found: Competition) -> list[dict[str, Any]]:
        slots = np.flatnonzero(found.query_used & self.shown(self.table.kind[self.query]))
        values = [
            self.table.row(self.query, int(a)) | dict(value=float(found.by_query_A[a]))
            for a in slots
        ]
        return sorted(values, key=lambda row: -abs(row["value"]))

    def features(self, found: Competition) -> list[dict[str, Any]]:
        """Key-side components of one kind and index, summed over positions."""
        total: dict[tuple, float] = defaultdict(float)
        places: dict[tuple, list[tuple[int, int]]] = defaultdict(list)
        taking_part = np.isin(np.arange(len(found.seen_S)), self.keys) & found.seen_S
        used = found.key_used_SC & taking_part[:, None] & self.shown(self.table.kind)
        for s, c in zip(*np.nonzero(used), strict=True):
            [name] = self.table.names(s, [c])
            total[name] += float(found.by_component_SC[s, c])
            places[name].append((int(s), int(c)))
        return [
            _anywhere(self.table.row(*places[name][0]))
            | dict(value=value, at=[s for s, _ in places[name]])
            for name, value in sorted(total.items(), key=lambda item: -abs(item[1]))
        ]


def _anywhere(row: ComponentRow) -> dict[str, Any]:
    """A component whose activation differs between positions."""
    return {k: v for k, v in row.items() if k != "activation"}


def _keys(subject: Subject, found: Competition, keys: np.ndarray) -> list[dict[str, Any]]:
    rows = [
        dict(
            position=int(s),
            token=subject.tokens[s],
            probability=float(found.pattern_S[s]),
            score=float(found.raw_S[s]),
            capped=float(found.capped_S[s]),
            weight=float(found.weight_S[s]),
            value=float(found.by_key_S[s]),
        )
        for s in keys[found.seen_S[keys]]
    ]
    return sorted(rows, key=lambda row: -row["probability"])


def _versus(subject, place, found: Competition, listed: _Listed, top: int):
    """Every other key that got attention, and what decided between it and the key."""
    key = place[3]
    order = np.argsort(-found.pattern_S, kind="stable")
    others = [int(s) for s in order if s != key and found.seen_S[s]]
    others = [s for s in others if found.pattern_S[s] >= ATTENDED][:COMPETITORS]
    few = max(1, top // 4)
    rows = []
    for other in others:
        decided = _compete(subject, place, listed, "difference", few, other)
        rows.append(
            dict(
                key=other,
                token=subject.tokens[other],
                probability=float(found.pattern_S[other]),
                log_ratio=float(decided.value),
                pushes=listed.nets(decided.net_pushes),
                pulls=listed.nets(decided.net_pulls),
            )
        )
    return rows


def _shares(found: Competition) -> dict[str, dict[str, float]]:
    absolute = found.by_kind_absolute
    used = zip(*np.nonzero(absolute), strict=True)
    cells = [(q, k, float(found.by_kind[q, k]), float(absolute[q, k])) for q, k in used]
    return shares_by_kind(cells, float(absolute.sum()))
