"""Random controls of an edit: would other features of the same size have done the same?

A draw replaces every edited feature by another active feature of its position, matched in |vector|,
on the same side of the same heads; and every ablated head by another head of its block. What the
edit does beyond the range of such draws is due to these features, not to an edit of that size.

There is no control where nothing else could have been drawn: an error, a bias, a token or a sink is
the only one of its kind at its position. Then a sentence says so.
Axes: G groups (edits of one position and side), C slots.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qkattr.errors import quoted
from qkattr.experiments.edits import Head, Placed, describe, vectors_at
from qkattr.kinds import Kind
from qkattr.sharding import bucket
from qkattr.subject import Subject

#: Draws of a control, unless another number is asked for.
DRAWS = 8
#: A feature is drawn from so many that are nearest to the edited one in size.
NEAREST = 3


@dataclasses.dataclass(frozen=True)
class Draw:
    """One random control: what is edited and which heads are ablated in place of the asked ones."""

    placed: list[Placed]
    ablated: tuple[Head, ...]


def matched(
    sizes: Float[np.ndarray, "K"], others: Float[np.ndarray, "N"], rng: np.random.Generator
) -> np.ndarray:
    """For K components as many of N others `[K]`, each drawn from the nearest in size to one of
    them, none twice. sizes, others: |vector|."""
    left, chosen = list(range(len(others))), np.zeros(len(sizes), int)
    for i in rng.permutation(len(sizes)):
        nearest = sorted(left, key=lambda j: abs(np.log(others[j] / sizes[i])))[:NEAREST]
        chosen[i] = nearest[rng.integers(len(nearest))]
        left.remove(int(chosen[i]))
    return chosen


def draw_controls(
    subject: Subject,
    placed: Sequence[Placed],
    ablated: Sequence[Head],
    *,
    draws: int,
    seed: int,
) -> list[Draw] | str:
    """Some draws, the same for the same seed; or a sentence that says why there are none."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, edit in enumerate(placed):
        groups[edit.boundary, edit.position, edit.side].append(i)
    kinds = np.asarray(subject.components.kind)
    n_heads = subject.bundle.config.n_heads
    reason = _no_features(subject, placed, groups, kinds) or _no_heads(ablated, n_heads)
    if reason:
        return reason
    rng, sizes = np.random.default_rng(seed), _sizes(subject, list(groups))
    found = []
    for _ in range(draws):
        drawn = list(placed)
        for (key, members), size in zip(groups.items(), sizes, strict=True):
            slots = np.array([placed[i].slot for i in members])
            others = _others(kinds, key, slots)
            for i, j in zip(members, matched(size[slots], size[others], rng), strict=True):
                drawn[i] = dataclasses.replace(placed[i], slot=int(others[j]))
        found.append(Draw(drawn, _other_heads(ablated, n_heads, rng)))
    return found


def _others(kinds: np.ndarray, key: tuple, slots: np.ndarray) -> np.ndarray:
    """Slots of the active features of a position that are not among the edited ones."""
    boundary, position, _ = key
    return np.setdiff1d(np.flatnonzero(kinds[boundary, position] == Kind.FEATURE), slots)


def _no_features(subject: Subject, placed, groups, kinds: np.ndarray) -> str:
    for (b, t, side), members in groups.items():
        where = f"{quoted(subject.tokens[t])} {t} of boundary {b}"
        for slot in (placed[i].slot for i in members):
            kind = Kind(int(kinds[b, t, slot]))
            if kind != Kind.FEATURE:
                return (
                    f"The {kind.label} at {where} is the only one there, so no other could be "
                    "edited in its place."
                )
        left = len(_others(kinds, (b, t, side), np.array([placed[i].slot for i in members])))
        if left < len(members):
            return (
                f"{len(members)} features are edited at {where} and {left} others are active "
                "there, too few to draw from."
            )
    return ""


def _no_heads(ablated: Sequence[Head], n_heads: int) -> str:
    for layer in sorted({layer for layer, _ in ablated}):
        gone = len({head for block, head in ablated if block == layer})
        if 2 * gone > n_heads:
            return (
                f"{gone} of {n_heads} heads of block {layer} are ablated, and the others are too "
                "few to draw from."
            )
    return ""


def _other_heads(ablated: Sequence[Head], n_heads: int, rng) -> tuple[Head, ...]:
    """As many other heads of the same blocks."""
    found: list[Head] = []
    for layer in sorted({layer for layer, _ in ablated}):
        gone = sorted({head for block, head in ablated if block == layer})
        left = np.setdiff1d(np.arange(n_heads), gone)
        chosen = rng.choice(left, len(gone), replace=False)
        found += [(layer, int(head)) for head in np.sort(chosen)]
    return tuple(found)


def _sizes(subject: Subject, keys: list[tuple]) -> Float[np.ndarray, "G C"]:
    """|vector| of every component of the position of every group."""
    if not keys:
        return np.zeros((0, 0))
    n_slots = subject.components.n_slots
    padded = [keys[min(i, len(keys) - 1)] for i in range(bucket(len(keys), smallest=1))]
    boundary, position = (np.array([key[i] for key in padded])[:, None] for i in range(2))
    slots = np.arange(n_slots)[None]
    at = np.broadcast_arrays(boundary, position, slots)
    vectors: Array = vectors_at(subject.components, *map(jnp.asarray, at))
    return np.linalg.norm(np.asarray(vectors), axis=-1)[: len(keys)]


def summarise(
    subject: Subject,
    draws: list[Draw],
    log_p: Float[np.ndarray, "R B V"],
    clean: Float[np.ndarray, "V"],
    followed: dict[str, int],
    seed: int,
) -> dict[str, Any]:
    """Median and range over R draws at each of B scales, as a plain object. followed: tokens."""
    kl = np.maximum((np.exp(clean) * (clean - log_p)).sum(-1), 0.0)
    return dict(
        draws=len(draws),
        seed=seed,
        tracked={name: _spread(np.exp(log_p[..., i])) for name, i in followed.items()},
        kl=_spread(kl),
        edits=[
            [describe(subject, edit) | dict(label="") for edit in draw.placed] for draw in draws
        ],
        ablated=[[f"{layer}.{head}" for layer, head in draw.ablated] for draw in draws],
    )


def _spread(values: Float[np.ndarray, "R B"]) -> dict[str, list[float]]:
    return dict(
        median=np.median(values, axis=0).tolist(),
        low=values.min(0).tolist(),
        high=values.max(0).tolist(),
    )
