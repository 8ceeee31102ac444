"""All heads between two positions of a traced prompt, whether the trace kept their places or not.

A trace keeps the `graph.accounts.PLACES` strongest places of every block; on a longer prompt those
between two positions are computed when they are asked for.
"""

from __future__ import annotations

import numpy as np

from qkattr.analyses.places import attention_at, effects_at, masking_at
from qkattr.result import PlaceRow, Traced
from qkattr.subject import HasSubject, enter


def heads_at(traced: Traced, asked: HasSubject, *, query: int, key: int) -> list[PlaceRow]:
    """All heads at one (query, key), by falling |masking|; see `Traced.head_effects`.

    asked: the prompt that was traced, of which nothing is asked where the trace has all places.

    Raises:
      InputError: they must be computed, and the result was opened without its model.
    """
    if traced.graph.heads.complete:
        return traced.head_effects(source=key, target=query)
    subject = enter(asked)
    target = subject.target
    assert target is not None  # it was traced
    score, probability = attention_at(subject, query, key)
    heads = list(np.ndindex(score.shape))
    found = effects_at(subject, target, [(*head, query, key) for head in heads])
    effect, derivative = found.head[:, 0].sum(-1), found.derivative[:, 0, key]
    masked = masking_at(subject, target, query, key)
    block, head = np.array(heads).T
    flow = traced.graph.influence_at(block, np.full(len(block), query), np.full(len(block), key))
    rows = [
        PlaceRow(
            layer=b,
            head=n,
            query=query,
            key=key,
            masking=float(masked[b, n]),
            effect=float(effect[i]),
            derivative=float(derivative[i]),
            score=float(score[b, n]),
            probability=float(probability[b, n]),
            influence=float(flow[i, n]),
        )
        for i, (b, n) in enumerate(heads)
        if effect[i] or masked[b, n]
    ]
    return sorted(rows, key=lambda row: -abs(row["masking"]))
