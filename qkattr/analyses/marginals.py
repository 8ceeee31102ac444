"""All marginals of a prompt, block by block, and where its heads look with what makes them.

for layer, found in all_marginals(subject): ...       arrays, see `qk.marginals`
marginals(subject, attention=)                        a table of the places that matter
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from qkattr.errors import InputError
from qkattr.kinds import Kind
from qkattr.positions import check_head
from qkattr.qk import marginals as qk_marginals
from qkattr.subject import HasSubject, Subject, enter


@dataclasses.dataclass(frozen=True)
class Looks:
    """Where heads look, and the largest marginals there. Attributes are the keys of the JSON.

    attention: the least attention that is listed. places: by falling attention, each with `layer`,
    `head`, `query`, `key`, `probability`, `score`, and `query_marginals` and `key_marginals`:
    components with `value`, by falling |value|. n_places: how many there are, listed or not.
    sinks_left_out: whether keys that are sinks are left out, since one component explains nothing,
    and the first position, which has no choice.
    """

    tokens: list[str]
    attention: float
    places: list[dict[str, Any]]
    n_places: int
    sinks_left_out: bool

    def to_json(self) -> dict[str, Any]:
        """A plain object."""
        return dataclasses.asdict(self)


def all_marginals(
    subject: HasSubject,
    *,
    layer: int | None = None,
    top: int = 5,
) -> Iterator[tuple[int, qk_marginals.Marginals]]:
    """The largest marginals of all heads at all (query, key) of a prompt: one block at a time, on
    the host, without the padding of the prompt.

    layer: this block only. top: marginals a side at each place.

    Raises:
      InputError: the layer or `top` cannot be used.
    """
    subject = enter(subject)
    check_head(layer, None, subject.facts.head_grid)
    config, n = subject.bundle.config, len(subject.ids)
    if not 1 <= top <= subject.components.n_slots:
        raise InputError(
            f"top should lie in 1..{subject.components.n_slots}, the components of a position, "
            f"got {top}; give another number"
        )
    everything = subject.bundle.params.blocks, subject.boundaries, subject.components
    for b in range(config.n_blocks) if layer is None else [layer]:
        subject.progress(f"block {b} of {config.n_blocks}")
        found = qk_marginals.block_marginals(
            *jax.tree.map(lambda a, b=b: a[b], everything),
            top=top,
            cfg=config.block,
            precision=subject.precision,
        )
        yield b, jax.tree.map(lambda a: a[..., :n, :n], jax.device_get(found))


def marginals(
    subject: HasSubject,
    *,
    attention: float = 0.3,
    layer: int | None = None,
    head: int | None = None,
    query: int | str | None = None,
    key: int | str | None = None,
    limit: int = 200,
    top: int = 5,
    sinks_too: bool = False,
) -> Looks:
    """Every place at which a head gives a key at least so much attention, with its largest
    marginals.

    attention: the least attention, 0 to 1. layer, head, query, key: only these. limit: places
    listed, at most. top: marginals a side. sinks_too: list keys that are sinks as
    well, and the first position.

    Raises:
      InputError: one of these cannot be used.
    """
    subject = enter(subject)
    if not 0 <= attention <= 1:
        raise InputError(f"attention should lie in 0..1, got {attention:g}; give a share")
    check_head(layer, head, subject.facts.head_grid)
    only = [None if p is None else subject.position(p) for p in (query, key)]
    sink = np.asarray((subject.components.kind == Kind.SINK).any(-1))
    places = []
    for b, found in all_marginals(subject, layer=layer, top=top):
        n = len(subject.ids)
        chosen = (found.pattern >= attention) & np.tril(np.ones((n, n), bool))
        chosen &= found.pattern > 0
        if not sinks_too:
            chosen &= ~sink[b, None, None, :n]
            chosen[:, 0] = False  # it sees itself alone
        at_ends = [np.arange(n) == p if p is not None else np.ones(n, bool) for p in only]
        chosen &= at_ends[0][None, :, None] & at_ends[1][None, None, :]
        if head is not None:
            chosen &= (np.arange(len(chosen)) == head)[:, None, None]
        of_block = [(float(found.pattern[at]), at) for at in zip(*np.nonzero(chosen), strict=True)]
        places += [(p, b, at, _at(found, at)) for p, at in of_block]
    places.sort(key=lambda place: -place[0])
    listed = [_described(subject, *place) for place in places[:limit]]
    return Looks(
        tokens=subject.tokens,
        attention=attention,
        places=listed,
        n_places=len(places),
        sinks_left_out=not sinks_too,
    )


def _at(found: qk_marginals.Marginals, at: tuple) -> tuple:
    head, t, s = at
    sides = [
        (np.array(value[head, :, t, s]), np.array(slot[head, :, t, s]))
        for value, slot in (
            (found.query_value, found.query_slot),
            (found.key_value, found.key_slot),
        )
    ]
    return float(found.score[at]), sides


def _described(subject: Subject, probability, layer, at, found) -> dict[str, Any]:
    head, query, key = (int(i) for i in at)
    score, sides = found
    table, listed = subject.table(layer), []
    for position, (values, slots) in zip((query, key), sides, strict=True):
        kept = slots >= 0
        described = table.rows(position, slots[kept])
        listed.append(
            [d | dict(value=float(v)) for d, v in zip(described, values[kept], strict=True)]
        )
    return dict(layer=layer, head=head, query=query, key=key, probability=probability, score=score,
                query_marginals=listed[0], key_marginals=listed[1])  # fmt: skip
