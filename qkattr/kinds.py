"""What a component or a node is, and other names that results and configs are written in.

Nothing here needs JAX, so that a saved result can be read without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

#: (block, head, query position, key position)
Place = tuple[int, int, int, int]

#: What features are called, by (boundary, index).
Labels = Mapping[tuple[int, int], str]

#: Named features by boundary: {boundary: [index, ...]}.
Group = dict[int, list[int]]


class Kind(IntEnum):
    """What a component, or a node of the graph, is."""

    NONE = 0  # an empty slot: its vector is exactly zero
    FEATURE = 1
    BIAS = 2
    ERROR = 3
    TOKEN = 4
    POSITION = 5
    SINK = 6
    CONST = 7
    LOGIT = 8
    SCORE = 9

    @property
    def label(self) -> str:
        return self.name.lower()


#: Kinds that change with the prompt: edges are normalised over these, and only these receive
#: influence.
PROMPT_KINDS = (Kind.FEATURE, Kind.ERROR, Kind.TOKEN, Kind.POSITION, Kind.SINK)

#: `BlockWeights.window` of a block that attends to everything before it.
NO_WINDOW = 2**30

#: Kinds that explain nothing of an attention score; tables fold their rows into one line.
FOLDED_KINDS = (Kind.BIAS, Kind.ERROR, Kind.SINK)

#: The columns of an account, in order.
ACCOUNT_KINDS = (
    Kind.FEATURE, Kind.TOKEN, Kind.POSITION, Kind.ERROR, Kind.SINK, Kind.BIAS, Kind.CONST,
)  # fmt: skip
