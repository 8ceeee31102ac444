"""One feature's card, as results and pages have it: data that needs no JAX to be read."""

from __future__ import annotations

import dataclasses
from typing import Any

#: Labels of features that no rule describes, and of those with too few activations for one.
UNCLEAR, RARE = "unclear", "rare"
FOR_EXAMPLE = "; e.g. "


@dataclasses.dataclass(frozen=True)
class Example:
    """A context. tokens: as text; activations: of the feature at each. at: the index of the token
    it was found for. row, position: where it lies in the text. quantile: its name."""

    quantile: str
    tokens: list[str]
    activations: list[float]
    at: int
    row: int
    position: int

    @property
    def activation(self) -> float:
        return self.activations[self.at]


@dataclasses.dataclass(frozen=True)
class Card:
    """One feature.

    label: what it seems to be. auc: how well its rule separates activating from other held-out
    positions, None: not measured; n: how many activating ones that was measured on. strong_auc,
    strong_n: the same for the strongest fifth of its activations. given: the label was imported and
    has no rule.
    density: share of positions at which it is active; count: how many. histogram: (from, to, count)
    of activations. examples: the strongest contexts, then one of each fifth of its activations.
    top_logits, bottom_logits: (token, change of its logit by one unit of activation).
    """

    boundary: int
    index: int
    label: str
    auc: float | None
    n: int
    strong_auc: float | None
    strong_n: int
    given: bool
    count: int
    density: float
    max: float
    mean: float
    histogram: list[tuple[float, float, int]]
    examples: list[Example]
    top_logits: list[tuple[str, float]]
    bottom_logits: list[tuple[str, float]]

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Card:
        """A card from `dataclasses.asdict` that has been JSON.

        Raises:
          TypeError, KeyError: it is no such thing.
        """
        rows = ("histogram", "top_logits", "bottom_logits")
        lists: dict[str, Any] = {name: [tuple(row) for row in raw[name]] for name in rows}
        lists["examples"] = [Example(**e) for e in raw["examples"]]
        return cls(**(raw | lists))


def strongest_tokens(label: str) -> str:
    """Of a label without a rule, the tokens on which the feature is strongest; "" of others."""
    what, _, tokens = label.partition(FOR_EXAMPLE)
    return tokens if what in (UNCLEAR, RARE) else ""
