"""Feature cards as JSON files that graph viewers read, `features/{scan}/{feature}.json`.

Folder and number are `metadata.scan` and the node's `feature` of `graph.json` (see
`export.viewers`). Keys are those of the common format, `qkattr` beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qkattr.cards.card import Card
from qkattr.cards.columns import Cards
from qkattr.export.viewers import node_layer, node_number, scan_of, source_of
from qkattr.files import encoded, write_files
from qkattr.kinds import Kind


def feature_json(card: Card) -> dict[str, Any]:
    """The feature file of a card as an object."""
    quantiles: dict[str, list[dict[str, Any]]] = {}
    for example in card.examples:
        quantiles.setdefault(example.quantile, []).append(
            dict(
                tokens=example.tokens,
                tokens_acts_list=example.activations,
                train_token_ind=example.at,
                is_repeated_datapoint=False,
                row=example.row,
                position=example.position,
            )
        )
    weakest = min((e.activation for e in card.examples), default=0.0)
    return dict(
        index=card.index,
        examples_quantiles=[
            dict(quantile_name=name, examples=examples) for name, examples in quantiles.items()
        ],
        top_logits=[token for token, _ in card.top_logits],
        bottom_logits=[token for token, _ in card.bottom_logits],
        act_min=weakest,
        act_max=card.max,
        quantile_values=[e.activation for e in card.examples if e.quantile != "Top"],
        histogram=[n for _, _, n in card.histogram],
        activation_frequency=card.density,
        qkattr=dict(
            boundary=card.boundary,
            label=card.label,
            label_given=card.given,
            auc=card.auc,
            auc_positions=card.n,
            strong_auc=card.strong_auc,
            strong_auc_positions=card.strong_n,
            count=card.count,
            mean=card.mean,
            histogram_edges=[[low, high] for low, high, _ in card.histogram],
            top_logit_values=[value for _, value in card.top_logits],
            bottom_logit_values=[value for _, value in card.bottom_logits],
        ),
    )


def feature_number(boundary: int, index: int, *, pre: bool = False) -> int:
    """The number of a feature's file. pre: layer L is boundary L, and not boundary L + 1."""
    layer = node_layer(Kind.FEATURE, boundary, n_blocks=0, pre=pre)
    return node_number(Kind.FEATURE, layer, index, 0)


def export_features(
    cards: Cards,
    folder: Path,
    boundaries: Iterable[int],
    progress: Callable[[str, float], None] = lambda stage, done: None,
) -> Path:
    """Write the files of some boundaries; those of one boundary all or none.

    Raises:
      InputError: the folder cannot be written; what was there is unchanged.
    """
    into, boundaries = folder / "features" / scan_of(cards.meta), list(boundaries)
    pre = source_of(cards.meta).get("pre", False)
    for done, b in enumerate(boundaries):
        progress("writing", done / len(boundaries))
        files = {
            f"{feature_number(b, i, pre=pre)}.json": encoded(feature_json(cards.card(b, i)))
            for i in range(cards.width(b))
        }
        write_files(into, files)
    return into
