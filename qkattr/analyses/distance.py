"""How far a score depends on distance: the score and its strongest pairs at every distance.

    distance(subject, layer=, head=, query=, key=, distances=)

See `qk.distance`: everything but the rotation is held as it is on the prompt.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkattr.analyses.places import terms_at
from qkattr.errors import InputError
from qkattr.kinds import Kind
from qkattr.qk.distance import distance_profile
from qkattr.subject import HasSubject, enter

#: Distances that are computed unless asked otherwise; fewer where the block's window is shorter.
DISTANCES = 256
MOST = 2**17


@dataclasses.dataclass(frozen=True)
class Distance:
    """Attributes are the keys of the JSON.

    score: at the true distance; invariant: its mean over all distances; positional: the rest.
    score_profile: the score at distance 0, 1, ... pairs: the strongest by |value| at the true
    distance, each with `value`, `mean`, `positional` and `profile`. position: the signed sum of the
    terms with a position embedding on either side (0 where there is none), which a rotation does
    not show. rotary: whether the block has one; without it profiles are flat.
    """

    tokens: list[str]
    layer: int
    head: int
    query: int
    key: int
    score: float
    invariant: float
    positional: float
    score_profile: list[float]
    pairs: list[dict[str, Any]]
    position: float
    rotary: bool

    def to_json(self) -> dict[str, Any]:
        """A plain object."""
        return dataclasses.asdict(self)


def distance(
    subject: HasSubject,
    *,
    layer: int,
    head: int,
    query: int | str,
    key: int | str,
    distances: int | None = None,
    top: int = 12,
) -> Distance:
    """The profile of one score. query, key: positions or token texts. distances: how many, from
    0 on; None: 256, or the block's window, and in any case past the true one.

    Raises:
      InputError: the place or the number cannot be used.
    """
    if distances is not None and not 1 <= distances <= MOST:
        raise InputError(f"distances should lie in 1..{MOST}, got {distances}; give another number")
    subject = enter(subject)
    place = subject.place(layer, head, query, key)
    layer, head, t, s = place
    subject.begin("distance")
    window = subject.bundle.config.windows[layer]
    wanted = max(distances or min(DISTANCES, window), t - s + 1)
    qk = terms_at(subject, [place])
    terms = np.where(np.outer(qk.query_used[0], qk.key_used[0]), qk.terms[0], 0.0)
    order = np.argsort(-np.abs(terms), axis=None, kind="stable")[:top]
    pairs = np.stack(np.unravel_index(order, terms.shape), axis=1)
    weights, x, parts = jax.tree.map(
        lambda a: a[layer], (subject.bundle.params.blocks, subject.boundaries, subject.components)
    )
    profile = jax.device_get(
        distance_profile(
            weights, x, parts, jnp.asarray(pairs), head=head, query=t, key=s, distances=wanted,
            cfg=subject.bundle.config.block, precision=subject.precision,
        )
    )  # fmt: skip
    table = subject.table(layer)
    queries, keys = table.rows(t, pairs[:, 0]), table.rows(s, pairs[:, 1])
    mean = profile.values_DP.mean(0)
    here = profile.values_DP[t - s]
    on_position = np.logical_or.outer(
        qk.query_kind[0] == Kind.POSITION, qk.key_kind[0] == Kind.POSITION
    )
    average = float(profile.score_D.mean())
    return Distance(
        tokens=subject.tokens,
        layer=layer,
        head=head,
        query=t,
        key=s,
        score=float(qk.score[0]),
        invariant=average,
        positional=float(qk.score[0]) - average,
        score_profile=profile.score_D.astype(float).tolist(),
        pairs=[
            dict(
                query=q,
                key=k,
                value=float(here[i]),
                mean=float(mean[i]),
                positional=float(here[i] - mean[i]),
                profile=profile.values_DP[:, i].astype(float).tolist(),
            )
            for i, (q, k) in enumerate(zip(queries, keys, strict=True))
        ],
        position=float(terms[on_position].sum()),
        rotary=weights.inv_freq.shape[-1] > 0,
    )
