"""The strongest pairs of components of a prompt, over all heads and places (`qk.pairs`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qkattr.errors import InputError
from qkattr.kinds import Kind
from qkattr.positions import check_head
from qkattr.qk import pairs as qk_pairs
from qkattr.sources.table import ComponentTable
from qkattr.subject import HasSubject, Subject, enter

#: Pairs of either sign that a call may ask for.
MOST = 4096


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The strongest terms of a prompt. Attributes are the keys of the JSON.

    prompt: the text. layers: the blocks that were searched. features: only pairs of two features
    were. searched: how many terms. positive, negative: over all heads, the strongest first; each
    with `layer`, `head`, `query` and `key` (components, with `position` and `token`), `value`, the
    head's `score` and `probability` there. heads: the same of each head, by "L.H". error_share: how
    much of the sum of |value| over both lists has an error slot on either side.
    """

    tokens: list[str]
    prompt: str
    layers: list[int]
    features: bool
    searched: int
    positive: list[dict[str, Any]]
    negative: list[dict[str, Any]]
    heads: dict[str, dict[str, list[dict[str, Any]]]]
    error_share: float

    def to_json(self) -> dict[str, Any]:
        """A plain object."""
        return dataclasses.asdict(self)


def check_top(top: int) -> None:
    """Raise `InputError` unless so many pairs can be asked for."""
    if not 1 <= top <= MOST:
        raise InputError(f"top should lie in 1..{MOST}, got {top}; give another number")


def pairs(
    subject: HasSubject,
    *,
    layer: int | None = None,
    head: int | None = None,
    top: int = 20,
    features: bool = True,
) -> Pairs:
    """The strongest positive and negative pairs over all heads and all (query, key) of a prompt.

    layer, head: only these. top: pairs of either sign, overall and of each head. features: only
    pairs of two features are searched; False: of all components.

    Raises:
      InputError: there is no such block or head.
    """
    check_top(top)
    subject = enter(subject)
    check_head(layer, head, subject.facts.head_grid)
    components = subject.components
    config, blocks = subject.bundle.config, subject.bundle.params.blocks
    kinds = (Kind.FEATURE,) if features else ()
    slots = qk_pairs.search_slots(blocks, components, kinds)
    layers = range(config.n_blocks) if layer is None else [layer]
    found = []
    for b in layers:
        subject.progress(f"block {b} of {config.n_blocks}")
        inputs = jax.tree.map(lambda a, b=b: a[b], (blocks, subject.boundaries, components))
        of_block = qk_pairs.top_pairs(
            *inputs, slots[b], top=top, cfg=config.block, precision=subject.precision
        )
        found.append(jax.device_get(of_block))
    heads = range(config.n_heads) if head is None else [head]
    both, of_heads = _listed(subject, dict(zip(layers, found, strict=True)), heads, top)
    size = np.array([abs(row["value"]) for rows in both for row in rows])
    error = [
        Kind.ERROR.label in (row["query"]["kind"], row["key"]["kind"])
        for rows in both
        for row in rows
    ]
    return Pairs(
        tokens=subject.tokens,
        prompt=subject.bundle.text(subject.ids),
        layers=list(layers),
        features=features,
        searched=_searched(subject, slots, layers) * len(heads),
        positive=both[0],
        negative=both[1],
        heads=of_heads,
        error_share=float(size[np.array(error, bool)].sum() / max(size.sum(), 1e-300)),
    )


def _listed(subject: Subject, found, heads: Sequence[int], top: int):
    """`(the lists of both signs over all heads, those of each head)`."""
    signs, of_heads = ("positive", "negative"), {}
    for b, of_block in found.items():
        table = subject.table(b)
        for head in heads:
            of_heads[f"{b}.{head}"] = {
                name: _rows(table, of_block, head, i) for i, name in enumerate(signs)
            }
    both = []
    for name in signs:
        every = [row for of_head in of_heads.values() for row in of_head[name]]
        both.append(sorted(every, key=lambda row: -abs(row["value"]))[:top])
    return both, of_heads


def _rows(
    table: ComponentTable, found: qk_pairs.TopPairs, head: int, sign: int
) -> list[dict[str, Any]]:
    """The pairs of one head and sign in words."""

    def component(position, slot) -> dict[str, Any]:
        p = int(position)
        return table.row(p, int(slot)) | dict(position=p, token=table.tokens[p])

    return [
        dict(
            layer=table.boundary,
            head=head,
            query=component(found.query[head, sign, i], found.query_slot[head, sign, i]),
            key=component(found.key[head, sign, i], found.key_slot[head, sign, i]),
            value=float(value),
            score=float(found.score[head, sign, i]),
            probability=float(found.probability[head, sign, i]),
        )
        for i, value in enumerate(found.value[head, sign])
        if value != 0
    ]


def _searched(subject: Subject, slots: np.ndarray, layers: Sequence[int]) -> int:
    """How many terms of visible places a head of each of the blocks has, in all."""
    config, n = subject.bundle.config, len(subject.ids)
    total = 0
    for b in layers:
        chosen = slots[b][slots[b] >= 0] // subject.components.n_slots
        counts = np.bincount(chosen, minlength=n)
        before = np.concatenate([[0], np.cumsum(counts)])
        first = np.maximum(np.arange(n) - config.windows[b] + 1, 0)
        total += int((counts * (before[1:] - before[first])).sum())
    return total
