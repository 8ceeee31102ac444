"""QK attributions of a prompt: the scores of chosen places, expanded (`qk.terms`), as tables."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from qkattr.analyses.places import moved_at, terms_at
from qkattr.kinds import Place
from qkattr.qk.table import QKAttribution, qk_table
from qkattr.subject import HasSubject, Subject, enter


def attribution(
    subject: HasSubject, *, layer: int, head: int, query: int | str, key: int | str
) -> QKAttribution:
    """Why head `head` of block `layer` attended from `query` to `key`: its score, expanded.

    query, key: positions, negative positions, or token texts.

    Raises:
      InputError: no such head or position, the key comes after the query or lies outside the
        window, or a result was opened without its model.
    """
    subject = enter(subject)
    place = subject.place(layer, head, query, key)
    subject.begin("QK attribution")
    return qk_tables(subject, [place])[place]


def qk_tables(subject: Subject, places: Sequence[Place]) -> dict[Place, QKAttribution]:
    """The QK attributions of several places, computed in one call."""
    if not places:
        return {}
    terms, moved = terms_at(subject, places), moved_at(subject, places)
    return {
        place: qk_table(
            jax.tree.map(lambda a, i=i: a[i], terms), subject.table(place[0]), place, moved[i]
        )
        for i, place in enumerate(places)
    }
