"""Places of a case at which the QK analyses are tested."""

from __future__ import annotations

import numpy as np

#: Houses that between them have LayerNorm, softcap, windows, QK-norm, biases and learned positions.
FOUR = ("llama", "gpt2", "gemma2", "everything")


def places(weights, n: int) -> list[tuple[int, int, int]]:
    """Some (head, query, key): the first and the last query, keys near and far, every head."""
    window, heads = int(weights.window), weights.wq_DNH.shape[1]
    pairs = [(t, s) for t in (1, n // 2, n - 1) for s in {max(0, t - window + 1), t // 2, t}]
    return [(i % heads, t, s) for i, (t, s) in enumerate(pairs) if t - s < window]


def log_sum_exp(x: np.ndarray) -> float:
    """In float64."""
    x = np.asarray(x, np.float64)
    return float(x.max() + np.log(np.exp(x - x.max()).sum()))
