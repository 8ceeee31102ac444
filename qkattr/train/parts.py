"""The state of a run in parts, whose steps are made side by side.

XLA's CPU backend runs the loops of one program on one core. So on a CPU the boundaries are split
into as many parts as there are cores; each part visits its boundaries one by one, in a program and
a thread of its own. A boundary's numbers do not depend on the part it is in. On an accelerator, and
on a mesh, there is one part, with all boundaries in one batched program.
Axes: L boundary, B positions, D d_model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qkattr.train.config import TrainConfig
from qkattr.train.rounding import Grid
from qkattr.train.sae import SAE, BatchSeen
from qkattr.train.step import TrainState, train_step


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Parts:
    """A `TrainState` between steps. The state given is used up.

    at_once: one part, see the module.
    """

    def __init__(self, state: TrainState, *, cfg: TrainConfig, at_once: bool):
        self._cfg, self._at_once = cfg, at_once
        n_boundaries = state.threshold.shape[0]
        n = 1 if at_once else min(cores(), n_boundaries)
        self._ends = [n_boundaries * i // n for i in range(n + 1)]
        self._states: list[TrainState] = list(self._cut(state))
        self._threads = ThreadPoolExecutor(n)

    def step(self, x: Float[Array, "L B D"], weight: Float[Array, "L B"]) -> BatchSeen:
        """Every boundary's step."""

        def one(state: TrainState, x: Array, weight: Array) -> tuple[TrainState, BatchSeen]:
            made = train_step(state, x, weight, cfg=self._cfg, at_once=self._at_once)
            return jax.block_until_ready(made)

        made = list(self._threads.map(one, self._states, self._cut(x), self._cut(weight)))
        self._states = [state for state, _ in made]
        return _joined([seen for _, seen in made])

    def fit(self, grid: Callable[[SAE], Grid]) -> None:
        """Put the grid of all boundaries' weights in the place of the one there was."""
        grids = self._cut(grid(_joined([state.sae for state in self._states])))
        self._states = [
            dataclasses.replace(state, grid=found)
            for state, found in zip(self._states, grids, strict=True)
        ]

    def state(self) -> TrainState:
        """All boundaries; a copy where there are several parts."""
        return _joined(self._states)

    def silent(self):
        """`[L, M]` positions since each feature last fired."""
        return _joined([state.silent_M for state in self._states])

    def _cut(self, tree) -> Iterator:
        if len(self._ends) == 2:
            yield tree
            return
        for first, last in zip(self._ends, self._ends[1:], strict=False):
            yield jax.tree.map(lambda a, i=first, j=last: a[i:j], tree)


def _joined(parts: list):
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
