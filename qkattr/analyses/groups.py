"""A score summed over groups of features, named in a file or found by their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qkattr.errors import InputError
from qkattr.kinds import Group
from qkattr.labels.groups import search_labels
from qkattr.qk.groups import group_name, group_of_features, group_table
from qkattr.qk.table import QKAttribution


def grouped(
    table: QKAttribution, groups: Mapping[str, Group], texts: Sequence[str] = ()
) -> dict[str, Any]:
    """The group x group table of a score: names of the groups on the `query` and `key` side, the
    `table` of sums, and the `sum` of them all, which is the score.

    groups: by name. texts: each makes a group of the features whose label contains it.

    Raises:
      InputError: a feature is in two groups, no label contains a text, or pairs are missing.
    """
    if table.n_pairs != len(table.pairs):
        raise InputError(
            f"{len(table.pairs)} of {table.n_pairs} pairs are at hand; open the result with its "
            "model for the rest"
        )
    sides = [(pair["query"], pair["key"]) for pair in table.pairs]
    labels = {
        (table.layer, c["index"]): c["label"]
        for pair in sides
        for c in pair
        if c["kind"] == "feature" and c["label"]
    }
    found = dict(groups) | {text: search_labels(labels, text) for text in texts}
    of_feature = group_of_features(found, table.layer)
    named = [[group_name(c["kind"], c["index"], of_feature) for c in pair] for pair in sides]
    rows, columns, sums = group_table(
        np.array([pair["value"] for pair in table.pairs]),
        [q for q, _ in named],
        [k for _, k in named],
    )
    return dict(query=rows, key=columns, table=sums.tolist(), sum=float(sums.sum()))
