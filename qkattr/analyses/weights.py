"""The strongest feature pairs of one head's weights, without a prompt (`qk.weights`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkattr.analyses.pairs import check_top
from qkattr.cards.norms import NormScales
from qkattr.errors import InputError
from qkattr.kinds import Kind
from qkattr.load.bundle import Bundle
from qkattr.model.layers import f32
from qkattr.positions import check_head
from qkattr.qk import weights as of_weights
from qkattr.sources.dictionary import Dictionary


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
        kv = head // bundle.params.blocks.group
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
