"""Orders of heads against the model: do the heads that they name first matter more than others?

The n first heads of an order are ablated (output zero everywhere). Orders: by influence, by
|loading| and by effect between two positions, by attention there, by influence and by effect summed
over all places ("anywhere"), and by chance (draws; their median). By effect, the heads that help
most come first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qkattr.analyses.places import attention_at
from qkattr.experiments.edits import Head, ablate, head_mask
from qkattr.experiments.rankings import logit_effects
from qkattr.experiments.runs import clean_top, run_edits
from qkattr.model.edits import Edits
from qkattr.result import Traced, ranked_heads
from qkattr.subject import Subject

#: How many heads are ablated together.
COUNTS = (1, 2, 4, 8, 16, 32)


def head_orders(
    result: Traced, subject: Subject, *, source: int, target: int
) -> dict[str, list[Head]]:
    """All heads, by every measure, from the source to the target (the query) or anywhere."""
    between = result.head_loadings(source=source, target=target)
    positions = range(len(subject.ids))
    every = result.head_loadings(source=positions, target=positions)
    found = logit_effects(subject, clean_top(subject)[0], heads=True).head
    effect = np.asarray(found)[:, 0]
    values = dict(
        influence=between.influence,
        loading=np.abs(between.loadings),
        effect=effect[:, :, target, source],
        attention=attention_at(subject, target, source)[1],
        influence_anywhere=every.influence,
        effect_anywhere=effect.sum((-2, -1)),
    )
    return {name: ranked_heads(value) for name, value in values.items()}


def measure_heads(
    result: Traced,
    subject: Subject,
    *,
    source: int,
    target: int,
    draws: int,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Per n: what the clean top token's log probability loses, in nats, and what is left of it."""
    shape = subject.bundle.config.head_grid
    orders = head_orders(result, subject, source=source, target=target)
    every = next(iter(orders.values()))
    drawn = [[every[i] for i in rng.permutation(len(every))] for _ in range(draws)]
    counts = [n for n in COUNTS if n <= len(every)]
    masks = [head_mask(o[:n], shape) for o in (*orders.values(), *drawn) for n in counts]
    edits = ablate(Edits(), np.stack(masks), subject.boundaries.shape[1])
    top, clean = clean_top(subject)
    log_p = run_edits(subject, edits, queries=[0]).log_p[:, top]
    lost = clean - log_p.reshape(-1, len(counts))
    by_order = dict(zip(orders, lost, strict=False))
    by_order["random"] = np.median(lost[len(orders) :], axis=0)
    return [
        dict(n=n)
        | {name: float(values[i]) for name, values in by_order.items()}
        | {f"p_{name}": float(np.exp(clean - values[i])) for name, values in by_order.items()}
        for i, n in enumerate(counts)
    ]
