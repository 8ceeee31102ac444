"""Targets with their effects, and the frozen model in float64 to hold them against."""

from __future__ import annotations

import dataclasses
import functools

import frozen
import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import tiny

from qkattr.config import LINEARISATIONS
from qkattr.graph.effects import Effects, target_effects
from qkattr.graph.targets import logit_covectors, score_covectors

ACCOUNT = 1e-4  # of the target: what the method asks for
EFFECT = 1e-5  # of the largest effect of its kind: three blocks of float32 matmuls
PAIR = 5e-5  # of the largest: products of a term and a derivative, both rounded
SAME = 2e-5  # of the largest: the same sums in another order
FINITE = 1e-6  # of the largest: a central difference in float64


@dataclasses.dataclass
class Targets:
    boundary: np.ndarray
    position: np.ndarray
    covector: np.ndarray
    constant: np.ndarray

    def arguments(self):
        return self.boundary, self.position, self.covector, self.constant


def targets_of(case) -> Targets:
    """A logit, a difference of logits, and two scores on their query and on their key side."""
    T, L = len(case.tokens), case.cfg.n_blocks
    best = jnp.argsort(-case.logits[-1])[:2]
    logits = logit_covectors(
        case.params, case.trace.boundaries[-1, -1], best, jnp.array([-1, best[0]]), cfg=case.cfg
    )
    places = np.array([[L - 1, 0, T - 1, T - 2], [1, 1, 4, 4]])
    scores = score_covectors(
        case.params.blocks, case.trace.boundaries, jnp.asarray(places), cfg=case.cfg.block
    )
    covector, constant = (
        np.concatenate([a, np.reshape(b, (4, *np.shape(a)[1:]))])
        for a, b in zip(logits, scores, strict=True)
    )
    boundary = np.concatenate([[L, L], places[:, 0].repeat(2)])
    return Targets(
        boundary, np.concatenate([[T - 1, T - 1], places[:, 2:].ravel()]), covector, constant
    )


def run(case, targets: Targets, linearisation="jacobian", **more) -> Effects:
    inputs = case.params.blocks, case.trace.boundaries, case.components, *targets.arguments()
    return target_effects(*inputs, cfg=case.cfg.block, linearisation=linearisation, **more)


@functools.cache
def seen_of(house: str) -> list[naive.Seen]:
    case = tiny.case(house)
    return [naive.run_block(*case.block(b)[:2], case.cfg.block) for b in range(tiny.L)]


@dataclasses.dataclass
class Tried:
    """A case with its targets, their effects, and the frozen model to hold them against."""

    case: tiny.Case
    targets: Targets
    linearisation: str
    found: Effects
    seen: list[naive.Seen]

    @functools.cached_property
    def blocks(self):
        """First asked for with x64 on."""
        return [
            frozen.frozen_block(
                self.case.block(b)[0], self.x(b), self.case.cfg.block, self.linearisation, seen=seen
            )
            for b, seen in enumerate(self.seen)
        ]

    def x(self, b: int):
        return jnp.asarray(np.asarray(self.case.trace.boundaries[b], np.float64))

    def derivative(self, b: int, what: str, at) -> np.ndarray:
        """`[R, ...]` of all targets with respect to one argument of block b; "x" of boundary b."""
        blocks, t = self.blocks, self.targets

        def values(argument):
            x = argument if what == "x" else self.x(b)
            more = {} if what == "x" else {what: argument}
            read = {b: x}
            for above in range(b, self.case.cfg.n_blocks):
                x = blocks[above](x, **(more if above == b else {}))
                read[above + 1] = x
            live = [
                read[at][p] @ g if at >= b + (what != "x") else 0.0 * x.sum()
                for at, p, g in zip(t.boundary, t.position, t.covector, strict=True)
            ]
            return jnp.stack(live)

        return np.asarray(jax.jacrev(values)(at))

    def only(self, b: int, mask) -> np.ndarray:
        """`[R, T, D]` with respect to boundary b through the masked places of its heads alone."""
        above = self.derivative(b + 1, "x", self.x(b + 1))
        _, vjp = jax.vjp(lambda x: self.blocks[b](x, only=mask), self.x(b))
        return pulled(vjp, above)


#: Every house with the default, two with the other linearisations.
TRIED = [(house, LINEARISATIONS[0]) for house in tiny.HOUSES] + [
    (house, other) for house in ("everything", "neox") for other in LINEARISATIONS[1:]
]


@pytest.fixture(scope="module", params=TRIED, ids="-".join)
def tried(request) -> Tried:
    house, linearisation = request.param
    case = tiny.case(house)
    targets = targets_of(case)
    found = jax.device_get(run(case, targets, linearisation))
    return Tried(case, targets, linearisation, found, seen_of(house))


def pulled(vjp, g) -> np.ndarray:
    """A row of covectors through a vjp of one argument."""
    return np.array(jax.vmap(lambda one: vjp(one)[0])(jnp.asarray(g)))


def largest(a: np.ndarray) -> np.ndarray:
    """Of every row, to hold errors against; 1 where there is nothing."""
    size = np.abs(a).max(tuple(range(1, a.ndim)), keepdims=True)
    return np.where(size > 0, size, 1.0)
