"""Head loadings against the model: do the heads that they name matter more than others?

The n heads with the largest loadings between two positions are ablated (output zero everywhere),
against the n heads that attend most there, and against n random heads (draws; their median).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qkattr.experiments.edits import Head, ablate, head_mask
from qkattr.experiments.runs import clean_top, run_edits
from qkattr.model.edits import Edits
from qkattr.session import Session

#: How many heads are ablated together.
COUNTS = (1, 2, 4, 8, 16, 32)


def measure_heads(
    session: Session,
    by_loading: list[Head],
    by_attention: list[Head],
    *,
    draws: int,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Per n: what the clean top token's log probability loses, in nats, and what is left of it."""
    shape = session.bundle.config.head_grid
    every = [(b, n) for b in range(shape[0]) for n in range(shape[1])]
    counts = [n for n in COUNTS if n <= min(len(every), len(by_loading))]
    orders = [by_loading, by_attention]
    orders += [[every[i] for i in rng.permutation(len(every))] for _ in range(draws)]
    masks = np.stack([head_mask(order[:n], shape) for order in orders for n in counts])
    edits = ablate(Edits(), masks, session.boundaries.shape[1])
    top, clean = clean_top(session)
    log_p = run_edits(session, edits, queries=[0]).log_p[:, top]
    lost = clean - log_p.reshape(len(orders), len(counts))
    return [
        dict(
            n=n,
            loading=float(lost[0, i]),
            attention=float(lost[1, i]),
            random=float(np.median(lost[2:, i])),
            p_loading=float(np.exp(clean - lost[0, i])),
            p_attention=float(np.exp(clean - lost[1, i])),
            p_random=float(np.exp(clean - np.median(lost[2:, i]))),
        )
        for i, n in enumerate(counts)
    ]
