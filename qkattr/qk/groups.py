"""Terms summed over groups of components, on either side: a group x group table.

    table[g, h] = sum of term[a, c] over a in group g, c in group h

Every component is in exactly one group (those of a kind that nobody grouped stand under the kind's
own name), so that the table sums to the score. Axes: A, C slots, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from qkattr.errors import InputError, quoted
from qkattr.load.groups import Group
from qkattr.types import Kind


def group_of_features(groups: Mapping[str, Group], boundary: int) -> dict[int, str]:
    """The group of each feature of a boundary that is in one.

    Raises:
      InputError: a feature is in two groups.
    """
    found: dict[int, str] = {}
    for name, group in groups.items():
        for feature in group.get(boundary, ()):
            if found.setdefault(feature, name) != name:
                raise InputError(
                    f"feature {boundary}:{feature} is in the groups {quoted(found[feature])} and "
                    f"{quoted(name)}; a table would count it twice, take it out of one"
                )
    return found


def group_names(kind: np.ndarray, index: np.ndarray, groups: Mapping[int, str]) -> list[str]:
    """The group of every slot: a feature's own, else the name of its kind."""
    return [
        groups.get(int(i), "other features") if k == Kind.FEATURE else Kind(k).label
        for k, i in zip(kind, index, strict=True)
    ]


def group_table(
    terms: Float[np.ndarray, "A C"], query: list[str], key: list[str]
) -> tuple[list[str], list[str], Float[np.ndarray, "G G"]]:
    """`(rows, columns, table)`: the sums, groups in the order in which they first appear."""
    rows, columns = list(dict.fromkeys(query)), list(dict.fromkeys(key))
    table = np.zeros((len(rows), len(columns)))
    at = np.ix_([rows.index(name) for name in query], [columns.index(name) for name in key])
    np.add.at(table, at, np.asarray(terms, np.float64))
    return rows, columns, table
