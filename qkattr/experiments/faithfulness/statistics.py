"""Agreement of two sets of numbers, and the interval of a mean.

An interval is a percentile bootstrap (2,000 resamples) over what was sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

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
