"""Agreement of two sets of numbers, the interval of a mean, and tables of such means.

An interval is a percentile bootstrap (2,000 resamples) over what was sampled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 where one side does not vary."""
    if not len(a):
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size > 0 else 0.0


def slope(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Of the actual change on the predicted one, through the origin: 1 is right in size too."""
    size = predicted @ predicted
    return float(predicted @ actual / size) if size > 0 else 0.0


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, with tied values given their mean rank."""
    return correlation(_ranks(a), _ranks(b))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Mean, and the 95 % interval of the mean."""
    array = np.asarray(values, float)
    drawn = np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.percentile(array[drawn].mean(1), (2.5, 97.5))
    return dict(mean=float(array.mean()), low=float(low), high=float(high), n=len(array))


class Table:
    """Values by row and column, one a prompt."""

    def __init__(self):
        self.values: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, row: tuple, **columns: float | None) -> None:
        """One prompt's values; None says that there was nothing to measure."""
        for name, value in columns.items():
            if value is not None:
                self.values[row][name].append(float(value))

    def rows(self, *keys: str) -> list[dict[str, Any]]:
        return [
            dict(zip(keys, row, strict=True)) | {name: interval(v) for name, v in columns.items()}
            for row, columns in self.values.items()
        ]
