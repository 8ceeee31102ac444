"""Why a head looked at this key and not at the others: `qk.competition` as tables.

    why(subject, prompt, layer=, head=, query=, key=)

lists what pushes the head towards the key and what pulls it away (the most inhibitory terms first,
at the key itself and at its competitors), every key with its attention and its part, features
summed over keys, and for each competitor the terms that decided between the two. With `against=`
the same lists decompose the difference of two scores, s(query, key) - s(query, against), and no
other key takes part.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qkattr.errors import InputError, quoted
from qkattr.kinds import FOLDED_KINDS, Kind, Place
from qkattr.load.bundle import Bundle, Prompt
from qkattr.positions import find_position
from qkattr.qk.table import describe
from qkattr.qk.why import Competition, Nets, Rows, competition
from qkattr.result import Result
from qkattr.scores import Labels, labeller, moved_at, open_place
from qkattr.session import Progress, Session

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
    subject: Result | Bundle,
    prompt: Prompt | None = None,
    *,
    layer: int,
    head: int,
    query: int | str,
    key: int | str,
    against: int | str | None = None,
    form: str = "odds",
    top: int = 20,
    folded: bool = False,
    labels: Labels | None = None,
    progress: Progress = lambda stage: None,
    **options: Any,
) -> Why:
    """Decompose the log-odds (or the log) of one attention probability over all keys, or the
    difference between two keys.

    subject: a result, or a bundle with a prompt and options (see `TraceOptions`). query, key,
    against: positions or token texts. form: "odds" or "log"; with `against` it is "difference".
    top: rows and components of each list. folded: leave rows and components with bias, error or
    sink on either side out of the lists; the sums and shares are of all.

    Raises:
      InputError: the place, the other key, the form, the prompt or an option cannot be used; or the
        query sees no other key, so that nothing competes.
    """
    form = check_form(form, against)
    session, place, labels = open_place(
        subject, prompt, (layer, head, query, key), labels=labels, progress=progress, **options
    )
    progress("competition")
    other = None if against is None else _other(session, place, against)
    listed = _Described(session, labels, place, other, folded)
    found = _compete(session, place, listed, form, top, other or 0)
    if found.seen_S.sum() < 2:
        raise InputError(
            f"the query at {place[2]} sees no key but {place[3]}: nothing competes with it; "
            "give a later query"
        )
    return Why(
        tokens=session.tokens,
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
        pushes=listed.with_effects(listed.nets(found.net_pushes), found.net_pushes, place),
        pulls=listed.with_effects(listed.nets(found.net_pulls), found.net_pulls, place),
        target=None if session.target is None else session.target.name,
        row_pushes=listed.rows(found.pushes),
        row_pulls=listed.rows(found.pulls),
        keys=_keys(session, found, listed.keys),
        query_side=listed.query_side(found)[:top],
        features=listed.features(found)[:top],
        versus=_versus(session, place, found, listed, top) if other is None else [],
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


def check_against(
    tokens: list[str], place: Place, against: int | str, windows: Sequence[int]
) -> int:
    """The position of the other key.

    Raises:
      InputError: it is the key itself, or the query does not see it.
    """
    layer, _, query, key = place
    other = find_position(tokens, against)
    if other == key:
        raise InputError(
            f"against is {quoted(tokens[other])} {other}, which is the key itself; give another "
            "position"
        )
    if other > query or query - other >= windows[layer]:
        first = max(0, query - int(windows[layer]) + 1)
        raise InputError(
            f"the query at {query} does not see the other key, {quoted(tokens[other])} {other}; "
            f"give a position from {first} to {query}"
        )
    return other


def _other(session: Session, place: Place, against: int | str) -> int:
    return check_against(session.tokens, place, against, session.bundle.config.windows)


def _compete(
    session: Session, place, listed: _Described, form: str, top: int, other: int = 0
) -> Competition:
    """On the host."""
    layer, head, query, key = place
    weights, x, parts = jax.tree.map(
        lambda a: a[layer],
        (session.bundle.params.blocks, session.boundaries, session.components),
    )
    return jax.device_get(
        competition(
            weights, x, parts, listed.identity, head=head, query=query, key=key, other=other,
            listed=listed.shown(listed.kind), form=form, top=top, kinds=len(Kind),
            cfg=session.bundle.config.block, precision=session.precision,
        )
    )  # fmt: skip


class _Described:
    """Slots of the place's boundary in words. keys: the positions that take part, all that the
    query may see unless two are compared."""

    def __init__(self, session: Session, labels: Labels, place, other: int | None, folded: bool):
        self.layer, _, self.query, key = place
        self.keys = np.arange(self.query + 1) if other is None else np.array([key, other])
        self.folded = folded
        self.session, self.labels = session, labels
        parts = jax.tree.map(lambda a: a[self.layer], session.components)
        self.kind, self.index, activation = jax.device_get(
            (parts.kind, parts.index, parts.activation)
        )
        self.activation = np.pad(activation, ((0, 0), (0, 2)))
        # A component is its kind and index; a query's keys end where the query stands.
        names = np.stack([self.kind.ravel(), self.index.ravel()], axis=1)
        _, first, found = np.unique(names, axis=0, return_index=True, return_inverse=True)
        self.identity = found.reshape(self.kind.shape).astype(np.int32)
        self.first = np.stack(np.unravel_index(first, self.kind.shape), axis=1)

    def at(self, position: int, slots) -> list[dict[str, Any]]:
        columns = (self.kind[position], self.index[position], self.activation[position])
        label = labeller(self.session, self.labels, self.layer, position)
        return describe(*columns, slots, label)

    def shown(self, kind: np.ndarray) -> np.ndarray:
        """Which slots are listed."""
        return ~(np.isin(kind, FOLDED_KINDS) & self.folded)

    def rows(self, rows: Rows) -> list[dict[str, Any]]:
        return [
            dict(
                query=self.at(self.query, [a])[0],
                key=self.at(s, [c])[0],
                at=int(s),
                value=float(value),
            )
            for value, a, s, c in zip(
                rows.value, rows.query_slot, rows.key, rows.key_slot, strict=True
            )
            if value != 0
        ]

    def nets(self, nets: Nets) -> list[dict[str, Any]]:
        found = []
        for value, a, identity in zip(nets.value, nets.query_slot, nets.identity, strict=True):
            if value == 0:
                continue
            s, c = self.first[identity]
            key = {k: v for k, v in self.at(s, [c])[0].items() if k != "activation"}
            active = (self.identity[self.keys] == identity).any(1)
            at = np.sort(self.keys[active]).tolist()
            query = self.at(self.query, [a])[0]
            found.append(dict(query=query, key=key, at=at, value=float(value)))
        return found

    def with_effects(self, rows: list[dict], nets: Nets, place: Place) -> list[dict[str, Any]]:
        """The rows of `nets`, each with what its match moves the trace's target by, over all keys
        (see `qk.pair_effects`); as they are where nothing was traced."""
        if self.session.target is None or not rows:
            return rows
        columns = zip(nets.value, nets.query_slot, nets.identity, strict=True)
        at = [(a, *self.first[i]) for value, a, i in columns if value != 0]
        keys = sorted({int(s) for _, s, _ in at})
        moved = moved_at(self.session, [(*place[:3], s) for s in keys])
        pairs = {s: one.pairs for s, one in zip(keys, moved, strict=True) if one is not None}
        return [
            row | dict(effect=float(pairs[int(s)][a, c]))
            for row, (a, s, c) in zip(rows, at, strict=True)
        ]

    def query_side(self, found: Competition) -> list[dict[str, Any]]:
        slots = np.flatnonzero(found.query_used & self.shown(self.kind[self.query]))
        described = self.at(self.query, slots)
        values = [
            dict(d, value=float(found.by_query_A[a])) for d, a in zip(described, slots, strict=True)
        ]
        return sorted(values, key=lambda row: -abs(row["value"]))

    def features(self, found: Competition) -> list[dict[str, Any]]:
        """Key-side components of one kind and index, summed over positions."""
        total: dict[tuple, float] = defaultdict(float)
        places: dict[tuple, list[tuple[int, int]]] = defaultdict(list)
        taking_part = np.isin(np.arange(len(found.seen_S)), self.keys) & found.seen_S
        used = found.key_used_SC & taking_part[:, None] & self.shown(self.kind)
        for s, c in zip(*np.nonzero(used), strict=True):
            name = (int(self.kind[s, c]), int(self.index[s, c]))
            total[name] += float(found.by_component_SC[s, c])
            places[name].append((int(s), int(c)))
        rows = []
        for name, value in sorted(total.items(), key=lambda item: -abs(item[1])):
            described = self.at(places[name][0][0], [places[name][0][1]])[0]
            described.pop("activation")
            rows.append(described | dict(value=value, at=[s for s, _ in places[name]]))
        return rows


def _keys(session: Session, found: Competition, keys: np.ndarray) -> list[dict[str, Any]]:
    rows = [
        dict(
            position=int(s),
            token=session.tokens[s],
            probability=float(found.pattern_S[s]),
            score=float(found.raw_S[s]),
            capped=float(found.capped_S[s]),
            weight=float(found.weight_S[s]),
            value=float(found.by_key_S[s]),
        )
        for s in keys[found.seen_S[keys]]
    ]
    return sorted(rows, key=lambda row: -row["probability"])


def _versus(session, place, found: Competition, listed: _Described, top: int):
    """Every other key that got attention, and what decided between it and the key."""
    key = place[3]
    order = np.argsort(-found.pattern_S, kind="stable")
    others = [int(s) for s in order if s != key and found.seen_S[s]]
    others = [s for s in others if found.pattern_S[s] >= ATTENDED][:COMPETITORS]
    few = max(1, top // 4)
    rows = []
    for other in others:
        decided = _compete(session, place, listed, "difference", few, other)
        rows.append(
            dict(
                key=other,
                token=session.tokens[other],
                probability=float(found.pattern_S[other]),
                log_ratio=float(decided.value),
                pushes=listed.nets(decided.net_pushes),
                pulls=listed.nets(decided.net_pulls),
            )
        )
    return rows


def _shares(found: Competition) -> dict[str, dict[str, float]]:
    total = max(float(found.by_kind_absolute.sum()), 1e-30)
    shares = {
        f"{Kind(q).label}-{Kind(k).label}": dict(
            signed=float(found.by_kind[q, k]), absolute=float(found.by_kind_absolute[q, k]) / total
        )
        for q, k in zip(*np.nonzero(found.by_kind_absolute), strict=True)
    }
    return dict(sorted(shares.items(), key=lambda item: -item[1]["absolute"]))
