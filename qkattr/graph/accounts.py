"""Effects on the host: what each node and each head gives to the targets, and the account.

`graph.effects` computes them for every component and place; here they become columns of the graph's
nodes, one row of the account a target and boundary, and the strongest places of the heads. Rows of
NumPy throughout. Axes: P targets, in the order of their nodes; X rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qkattr.kinds import ACCOUNT_KINDS, Kind

if TYPE_CHECKING:
    from qkattr.graph.effects import Effects, HeadPlaces

#: The columns of the account beside boundary, node and target.
ACCOUNT_COLUMNS = tuple(kind.label for kind in ACCOUNT_KINDS)

#: Places of every block that are listed, at most: all of a prompt of some forty tokens.
PLACES = 8192


@dataclasses.dataclass(frozen=True)
class Account:
    """Columns of the account, each `[X]`: one row a target and boundary, from the last to the
    first.

    boundary: where.
    node: the target's row in the table of nodes.
    target: its value.
    feature, token, position, error, sink, bias, const: what each kind gives; they add up to it.
    """

    boundary: np.ndarray
    node: np.ndarray
    target: np.ndarray
    feature: np.ndarray
    token: np.ndarray
    position: np.ndarray
    error: np.ndarray
    sink: np.ndarray
    bias: np.ndarray
    const: np.ndarray

    def __len__(self) -> int:
        return len(self.boundary)


@dataclasses.dataclass(frozen=True)
class HeadEffects:
    """Columns of the strongest places of all heads, each `[X]`, by falling |masking|.

    block, head, query, key: the place.
    masking: what masking the key there takes from the main target, to first order (`graph.live`).
    effect: on the main target, in its unit.
    derivative: of the main target with respect to the head's score there.
    score: before the softcap.
    probability: the attention.
    """

    block: np.ndarray
    head: np.ndarray
    query: np.ndarray
    key: np.ndarray
    masking: np.ndarray
    effect: np.ndarray
    derivative: np.ndarray
    score: np.ndarray
    probability: np.ndarray

    def __len__(self) -> int:
        return len(self.block)

    @property
    def complete(self) -> bool:
        """Whether every place with any masking or effect is listed."""
        return len(self) == 0 or int(np.bincount(self.block).max()) < PLACES

    def rows(self, at: np.ndarray | slice) -> list[dict]:
        """Some of them as objects: layer, head, query, key, and the rest."""
        columns = {f.name: getattr(self, f.name)[at].tolist() for f in dataclasses.fields(self)}
        columns = {"layer": columns.pop("block"), **columns}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def no_account() -> Account:
    """Of a graph whose targets were not accounted for."""
    return Account(**{f.name: np.zeros(0, int) for f in dataclasses.fields(Account)})


def no_heads() -> HeadEffects:
    """Likewise."""
    return HeadEffects(**{f.name: np.zeros(0, int) for f in dataclasses.fields(HeadEffects)})


def main_weights(kinds: Sequence[int] | np.ndarray) -> np.ndarray:
    """`[P]` what the main target is, as a sum of targets: the first one, and of a score that is
    read on its query and on its key side both (the score's change, to first order).

    kinds: of the targets.
    """
    weights = np.zeros(len(kinds), np.float32)
    weights[: 2 if kinds[0] == Kind.SCORE else 1] = 1.0
    return weights


def account_table(found: Sequence[Effects], target_nodes: np.ndarray, boundary: np.ndarray):
    """The account of P targets.

    Args:
      found: on the host, of one group of targets after the other.
      target_nodes, boundary: `[P]` the targets' rows in the table of nodes, and where they read.
    """
    table = np.concatenate([one.account for one in found], axis=1)[:, : len(boundary)]
    value = np.concatenate([one.value for one in found])[: len(boundary)]
    target, at = np.nonzero(np.arange(len(table))[::-1] <= boundary[:, None])
    at = len(table) - 1 - at
    columns = dict(zip(ACCOUNT_COLUMNS, np.moveaxis(table[at, target], -1, 0), strict=True))
    return Account(boundary=at, node=target_nodes[target], target=value[target], **columns)


def head_table(places: HeadPlaces) -> HeadEffects:
    """The places of all blocks, those without masking and effect left out."""
    blocks = np.broadcast_to(np.arange(len(places.head))[:, None], places.head.shape)
    masking, effect = (np.abs(a).ravel() for a in (places.masking, places.effect))
    order = np.lexsort((-effect, -masking))[: np.count_nonzero((masking > 0) | (effect > 0))]
    names = ("head", "query", "key", "masking", "effect", "derivative", "score", "probability")
    columns = {name: getattr(places, name).ravel()[order] for name in names}
    return HeadEffects(block=blocks.ravel()[order], **columns)


def node_columns(
    found: Sequence[Effects],
    kind: np.ndarray,
    index: np.ndarray,
    *,
    boundary: np.ndarray,
    position: np.ndarray,
    kind_X: np.ndarray,
    index_X: np.ndarray,
) -> np.ndarray:
    """`[X, P]` the effect of X nodes that are components or constants, NaN for others.

    Args:
      found: see `account_table`.
      kind, index: `[L+1, T, C]` of the components.
      boundary, position, kind_X, index_X: of the nodes.
    """
    slots = kind[boundary, position] == kind_X[:, None]
    slots &= (index[boundary, position] == index_X[:, None]) | (kind_X != Kind.FEATURE)[:, None]
    known, slot = slots.any(1), slots.argmax(1)
    columns = []
    for one in found:
        component = one.node[boundary, :, position, slot]
        constant = one.constant[boundary, :, position]
        other = np.where((kind_X == Kind.CONST)[:, None], constant, np.nan)
        columns.append(np.where(known[:, None], component, other))
    return np.concatenate(columns, axis=1)
