"""The strongest pairs of components over everything: all heads and places of a prompt
(`qk.search`), or a head's whole dictionary x dictionary without one (`qk.weights`).

    top_pairs(subject, prompt, top=, features=)
    weight_pairs(bundle, layer=, head=, distance=)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkattr.cards.norms import NormScales
from qkattr.errors import InputError
from qkattr.kinds import Kind
from qkattr.load.bundle import Bundle, Prompt
from qkattr.model.layers import f32
from qkattr.positions import check_head
from qkattr.qk import pairs as search
from qkattr.qk import weights as of_weights
from qkattr.qk.table import describe
from qkattr.result import Result
from qkattr.scores import Labels, labeller, open_session
from qkattr.session import Progress, Session
from qkattr.sources.dictionary import Dictionary

#: Pairs of either sign that a call may ask for.
MOST = 4096


@dataclasses.dataclass(frozen=True)
class TopPairs:
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


@dataclasses.dataclass(frozen=True)
class WeightPairs:
    """The strongest feature pairs of a head's weights. Attributes are the keys of the JSON.

    boundary: of the features. distance: of the key before the query. width: features a side.
    scales: the norm scales used, `attn`, `q`, `k`, and what they are medians over (`source`; None:
    taken as 1, values compare within this head only). typical: values are at
    the features' mean activations, not at one unit. positive, negative: `query` and `key`
    (features), `value`.
    """

    layer: int
    head: int
    boundary: int
    distance: int
    width: int
    scales: dict[str, Any]
    typical: bool
    positive: list[dict[str, Any]]
    negative: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """A plain object."""
        return dataclasses.asdict(self)


def check_top(top: int) -> None:
    """Raise `InputError` unless so many pairs can be asked for."""
    if not 1 <= top <= MOST:
        raise InputError(f"top should lie in 1..{MOST}, got {top}; give another number")


def check_weight_place(bundle: Bundle, layer: int, head: int, distance: int) -> Dictionary:
    """The SAE of the boundary that a head's block reads.

    Raises:
      InputError: there is none, no such head, or the block does not see that far back.
    """
    config = bundle.config
    check_head(layer, head, config.head_grid)
    dictionary = None if bundle.dictionaries is None else bundle.dictionaries[layer]
    if dictionary is None:
        raise InputError(
            f"block {layer} reads boundary {layer}, which has no SAE; give a layer that has one"
        )
    last = min(config.windows[layer], config.context) - 1
    if not 0 <= distance <= last:
        raise InputError(
            f"distance {distance} should lie in 0..{last}, what block {layer} sees; give another"
        )
    return dictionary


def top_pairs(
    subject: Result | Bundle,
    prompt: Prompt | None = None,
    *,
    layer: int | None = None,
    head: int | None = None,
    top: int = 20,
    features: bool = True,
    labels: Labels | None = None,
    progress: Progress = lambda stage: None,
    **options: Any,
) -> TopPairs:
    """The strongest positive and negative pairs over all heads and all (query, key) of a prompt.

    subject: a result, or a bundle with a prompt and options (see `TraceOptions`). layer, head:
    only these. top: pairs of either sign, overall and of each head. features: only pairs of
    two features are searched; False: of all components.

    Raises:
      InputError: there is no such block or head, or the prompt or an option cannot be used.
    """
    check_top(top)
    if isinstance(subject, Bundle):  # before its weights are read
        check_head(layer, head, subject.config.head_grid)
    session, labels = open_session(subject, prompt, labels=labels, progress=progress, **options)
    config, blocks = session.bundle.config, session.bundle.params.blocks
    check_head(layer, head, config.head_grid)
    kinds = (Kind.FEATURE,) if features else ()
    slots = search.search_slots(blocks, session.components, kinds)
    layers = range(config.n_blocks) if layer is None else [layer]
    found = []
    for b in layers:
        progress(f"block {b} of {config.n_blocks}")
        inputs = jax.tree.map(lambda a, b=b: a[b], (blocks, session.boundaries, session.components))
        of_block = search.top_pairs(
            *inputs, slots[b], top=top, cfg=config.block, precision=session.precision
        )
        found.append(jax.device_get(of_block))
    heads = range(config.n_heads) if head is None else [head]
    both, of_heads = _listed(session, labels, dict(zip(layers, found, strict=True)), heads, top)
    size = np.array([abs(row["value"]) for rows in both for row in rows])
    error = [
        Kind.ERROR.label in (row["query"]["kind"], row["key"]["kind"])
        for rows in both
        for row in rows
    ]
    return TopPairs(
        tokens=session.tokens,
        prompt=session.bundle.text(session.ids),
        layers=list(layers),
        features=features,
        searched=_searched(session, slots, layers) * len(heads),
        positive=both[0],
        negative=both[1],
        heads=of_heads,
        error_share=float(size[np.array(error, bool)].sum() / max(size.sum(), 1e-300)),
    )


def _listed(session: Session, labels: Labels, found, heads: Sequence[int], top: int):
    """`(the lists of both signs over all heads, those of each head)`."""
    signs, of_heads = ("positive", "negative"), {}
    for b, of_block in found.items():
        rows = _Rows(session, labels, b, of_block)
        for head in heads:
            of_heads[f"{b}.{head}"] = {name: rows.of(head, i) for i, name in enumerate(signs)}
    both = []
    for name in signs:
        every = [row for of_head in of_heads.values() for row in of_head[name]]
        both.append(sorted(every, key=lambda row: -abs(row["value"]))[:top])
    return both, of_heads


class _Rows:
    """Pairs of one block in words."""

    def __init__(self, session: Session, labels: Labels, layer: int, found: search.TopPairs):
        parts = session.components
        columns = jax.device_get((parts.kind[layer], parts.index[layer], parts.activation[layer]))
        self.session, self.labels, self.layer, self.found = session, labels, layer, found
        self.kind, self.index = columns[:2]
        self.activation = np.pad(columns[2], ((0, 0), (0, 2)))

    def of(self, head: int, sign: int) -> list[dict[str, Any]]:
        at = self.found
        return [
            dict(
                layer=self.layer,
                head=head,
                query=self.component(at.query[head, sign, i], at.query_slot[head, sign, i]),
                key=self.component(at.key[head, sign, i], at.key_slot[head, sign, i]),
                value=float(value),
                score=float(at.score[head, sign, i]),
                probability=float(at.probability[head, sign, i]),
            )
            for i, value in enumerate(at.value[head, sign])
            if value != 0
        ]

    def component(self, position, slot) -> dict[str, Any]:
        p = int(position)
        label = labeller(self.session, self.labels, self.layer, p)
        columns = (self.kind[p], self.index[p], self.activation[p])
        return describe(*columns, [int(slot)], label)[0] | dict(
            position=p, token=self.session.tokens[p]
        )


def _searched(session: Session, slots: np.ndarray, layers: Sequence[int]) -> int:
    """How many terms of visible places a head of each of the blocks has, in all."""
    config, n = session.bundle.config, len(session.ids)
    total = 0
    for b in layers:
        chosen = slots[b][slots[b] >= 0] // session.components.n_slots
        counts = np.bincount(chosen, minlength=n)
        before = np.concatenate([[0], np.cumsum(counts)])
        first = np.maximum(np.arange(n) - config.windows[b] + 1, 0)
        total += int((counts * (before[1:] - before[first])).sum())
    return total


def weight_pairs(
    bundle: Bundle,
    *,
    layer: int,
    head: int,
    distance: int = 1,
    top: int = 20,
    typical: bool = False,
    norms: NormScales | None = None,
    source: str | None = None,
    precision: str = "highest",
) -> WeightPairs:
    """The strongest feature pairs of one head, over the whole dictionary and without a prompt.

    distance: how far before the query the key is (nothing without rotary). typical: features at
    their mean activation on the text of the bundle's cards, not at one unit. norms: typical norm
    scales, and source, what they are of; None: those of the cards, if there are any.

    Raises:
      InputError: there is no such head, its boundary has no SAE, the distance is outside the
        block's window, or there are no cards for `typical`.
    """
    check_top(top)
    dictionary = check_weight_place(bundle, layer, head, distance)
    config, cards = bundle.config, bundle.cards
    if norms is None and cards is not None:
        norms, source = cards.norms, str(cards.meta.get("text", "the text of the cards"))
    scales = of_weights.HeadScales()
    if norms is not None:
        kv = head // (config.n_heads // config.n_kv_heads)
        values = norms.attn[layer], norms.q[layer, head], norms.k[layer, kv]
        scales = of_weights.HeadScales(*(float(v) for v in values))
    features = f32(dictionary.w_dec_MD)
    if dictionary.factor is not None:
        features = features / f32(dictionary.factor)
    if typical:
        features = features * jnp.asarray(_means(bundle, layer))[:, None]
    found = jax.device_get(
        of_weights.weight_pairs(
            jax.tree.map(lambda a: a[layer], bundle.params.blocks), features, head=head,
            distance=distance, scales=scales, top=top, cfg=config.block, precision=precision,
        )
    )  # fmt: skip
    both = [_weight_rows(bundle, layer, found, sign) for sign in (0, 1)]
    return WeightPairs(
        layer=layer,
        head=head,
        boundary=layer,
        distance=distance,
        width=dictionary.width,
        scales=dict(attn=scales.attn, q=scales.q, k=scales.k, source=source),
        typical=typical,
        positive=both[0],
        negative=both[1],
    )


def _means(bundle: Bundle, boundary: int) -> np.ndarray:
    cards = bundle.cards
    if cards is None or not cards.width(boundary):
        raise InputError(
            f"without cards for boundary {boundary} nothing says the features' mean "
            "activations; leave --typical out, or make cards with `qkattr features`"
        )
    first = cards.row_of(boundary, 0)
    part = slice(first, first + cards.width(boundary))
    return np.asarray(cards.mean_level[part] / 255 * cards.max[part], np.float32)


def _weight_rows(bundle: Bundle, boundary: int, found, sign: int) -> list[dict[str, Any]]:
    at = [(boundary, int(i)) for i in (*found.row[sign], *found.column[sign])]
    labels = {} if bundle.cards is None else bundle.cards.labels(set(at))
    labels = labels | {
        feature: bundle.labels[feature] for feature in at if feature in bundle.labels
    }

    def component(i) -> dict[str, Any]:
        label = labels.get((boundary, int(i)), "")
        return dict(kind=Kind.FEATURE.label, index=int(i), activation=None, label=label)

    return [
        dict(query=component(r), key=component(c), value=float(v))
        for v, r, c in zip(found.value[sign], found.row[sign], found.column[sign], strict=True)
        if v != 0
    ]
