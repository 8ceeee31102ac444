"""Terms summed over groups of components, on either side: a group x group table.

    table[g, h] = sum of term[a, c] over a in group g, c in group h

Every component is in exactly one group (those of a kind that nobody grouped stand under the kind's
own name), so that the table sums to the score. Axes: P terms, G groups of the query side, I of the
key side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from qkattr.errors import InputError, quoted
from qkattr.kinds import Group, Kind

#: Features that are in no group.
OTHERS = "other features"


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


def group_name(kind: str, index: int | None, groups: Mapping[int, str]) -> str:
    """The group of a component: a feature's own, else the name of its kind."""
    if kind != Kind.FEATURE.label or index is None:
        return kind
    return groups.get(index, OTHERS)


def group_table(
    values: Float[np.ndarray, "P"], query: Sequence[str], key: Sequence[str]
) -> tuple[list[str], list[str], Float[np.ndarray, "G I"]]:
    """`(rows, columns, table)`: P terms summed by the groups of their two sides, groups in the
    order in which they first appear."""
    rows, columns = list(dict.fromkeys(query)), list(dict.fromkeys(key))
    table = np.zeros((len(rows), len(columns)))
    at = [rows.index(name) for name in query], [columns.index(name) for name in key]
    np.add.at(table, at, np.asarray(values, np.float64))
    return rows, columns, table
