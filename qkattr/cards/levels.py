"""Numbers as a byte each: AUCs on a linear scale, counts on a logarithmic one."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

#: The level of an AUC that was not measured.
NOT_MEASURED = 255


def auc_level(auc: Float[np.ndarray, ...]) -> Int[np.ndarray, ...]:
    """AUCs as levels of 1/254; NaN has one of its own."""
    return np.where(np.isnan(auc), NOT_MEASURED, np.round(np.nan_to_num(auc) * 254)).astype(
        np.uint8
    )


def auc_of(level: int) -> float | None:
    """The AUC of a level, to 0.002; None: not measured."""
    return None if level == NOT_MEASURED else round(int(level) / 254, 3)


def level_of(count: Int[np.ndarray, ...]) -> Int[np.ndarray, ...]:
    """Counts as levels of a logarithmic scale, 12 an octave."""
    return np.minimum(np.round(12 * np.log2(1.0 + count)), 255).astype(np.uint8)


def count_of(level: Int[np.ndarray, ...]) -> Int[np.ndarray, ...]:
    """Counts from their levels, to 3 % (2.5 million at most)."""
    return np.round(2.0 ** (level / 12) - 1).astype(int)
