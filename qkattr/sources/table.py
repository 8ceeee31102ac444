"""The components of a boundary on the host: what each slot is, and what it is called.

A slot is named by its position and its number there. Rows are objects as JSON has them. Axes: T
position, C slots.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import TypedDict

import numpy as np

from qkattr.kinds import Kind, Labels

#: Positions and slots come from arrays too.
Number = int | np.integer


class ComponentRow(TypedDict):
    """A component. index: feature id, vocabulary id of a token, position; else None. activation: of
    a feature, in its SAE's units."""

    kind: str
    index: int | None
    activation: float | None
    label: str


@dataclasses.dataclass(frozen=True)
class ComponentTable:
    """boundary: of which it is.
    kind, index, activation: `[T, C]`; index -1 where there is none, activation 0 of what is no
      feature.
    tokens: `[T]` as text, without padding.
    labels: of features, by (boundary, index).
    """

    boundary: int
    kind: np.ndarray
    index: np.ndarray
    activation: np.ndarray
    tokens: list[str]
    labels: Labels

    def row(self, position: Number, slot: Number) -> ComponentRow:
        """One component."""
        kind, index = Kind(self.kind[position, slot]), int(self.index[position, slot])
        feature = kind == Kind.FEATURE
        if feature:
            label = self.labels.get((self.boundary, index), "")
        else:
            label = self.tokens[position] if kind == Kind.TOKEN else ""
        return ComponentRow(
            kind=kind.label,
            index=index if index >= 0 else None,
            activation=float(self.activation[position, slot]) if feature else None,
            label=label,
        )

    def rows(self, position: Number, slots: Iterable[Number] | np.ndarray) -> list[ComponentRow]:
        """Some components of a position."""
        return [self.row(position, slot) for slot in slots]

    def names(
        self, position: Number, slots: Iterable[Number] | np.ndarray
    ) -> list[tuple[int, int]]:
        """Kind and index of some components of a position: what is the same at all positions."""
        at = self.kind[position], self.index[position]
        return [(int(at[0][slot]), int(at[1][slot])) for slot in slots]

    @functools.cached_property
    def identities(self) -> tuple[np.ndarray, np.ndarray]:
        """`[T, C]` a number for every kind and index; `[I, 2]` where each is found first."""
        names = np.stack([self.kind.ravel(), self.index.ravel()], axis=1)
        _, first, found = np.unique(names, axis=0, return_index=True, return_inverse=True)
        first = np.stack(np.unravel_index(first, self.kind.shape), axis=1)
        return found.reshape(self.kind.shape).astype(np.int32), first
