"""Norm scales that are typical of a text, as cards keep them for analyses of weights alone.

`features.norms` measures them. Axes: L block, N query heads, K key/value heads.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class NormScales:
    """Medians: attn of each block's input norm, q and k of its QK-norms, final of the last norm."""

    attn: Float[np.ndarray, "L"]
    q: Float[np.ndarray, "L N"]
    k: Float[np.ndarray, "L K"]
    final: float
