"""Parallel mechanisms: the singular value decomposition of a head's term matrix.

    terms = sum_i sigma_i u_i v_i^T        score = sum_i sigma_i (sum_a u_i[a]) (sum_c v_i[c])

A head that looks at a key for several reasons at once (paper, the example of Mary Sue: features of
one name meet features of the same name, and names do not mix) has several large singular values,
whose pairs (u_i, v_i) each name one reason. Effective rank is the participation ratio
(sum sigma^2)^2 / sum sigma^4. Components are assigned to the mechanism in which they are largest;
`cross` is the share of sum |terms| between components of different mechanisms: near 0 where the
reasons are parallel. Exact: the parts sum to the matrix.
Axes: A query-side components, C key-side components, I singular pairs. On the host, in float64: the
matrix is at most some hundred components a side.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int, Real

from qkattr.shapes import checked


@dataclasses.dataclass(frozen=True)
class Mechanisms:
    """A term matrix as a sum of singular pairs.

    sigma_I: `[I]` singular values, falling.
    query_IA, key_IC: unit vectors, turned so that the largest entry of `query_IA` is positive.
    carried_I: `[I]` what each pair adds to the sum of the terms.
    rank: effective rank.
    of_query_A, of_key_C: the mechanism, among the first `round(rank)`, a component belongs to.
    cross: the share of sum |terms| between different mechanisms.
    """

    sigma_I: Float[np.ndarray, "I"]
    query_IA: Float[np.ndarray, "I A"]
    key_IC: Float[np.ndarray, "I C"]
    carried_I: Float[np.ndarray, "I"]
    rank: float
    of_query_A: Int[np.ndarray, "A"]
    of_key_C: Int[np.ndarray, "C"]
    cross: float

    def part(self, i: int) -> Float[np.ndarray, "A C"]:
        """What mechanism i adds to the term matrix."""
        return self.sigma_I[i] * np.outer(self.query_IA[i], self.key_IC[i])


@checked
def decompose_terms(terms: Real[np.ndarray, "A C"]) -> Mechanisms:
    """Decompose a term matrix (`QKTerms.terms`, or one summed over prompts)."""
    terms = np.asarray(terms, np.float64)
    u, sigma, v = np.linalg.svd(terms, full_matrices=False)
    u = u.T
    largest = np.abs(u).argmax(1)
    sign = np.sign(u[np.arange(len(u)), largest])
    sign[sign == 0] = 1
    u, v = u * sign[:, None], v * sign[:, None]
    rank = _participation(sigma)
    few = max(1, round(rank))
    of_query = (sigma[:few, None] * np.abs(u[:few])).argmax(0)
    of_key = (sigma[:few, None] * np.abs(v[:few])).argmax(0)
    size = np.abs(terms)
    cross = size[of_query[:, None] != of_key[None, :]].sum() / max(size.sum(), 1e-300)
    return Mechanisms(
        sigma_I=sigma,
        query_IA=u,
        key_IC=v,
        carried_I=sigma * u.sum(1) * v.sum(1),
        rank=rank,
        of_query_A=of_query,
        of_key_C=of_key,
        cross=float(cross),
    )


def _participation(sigma: Float[np.ndarray, "I"]) -> float:
    square = (sigma / max(sigma.max(initial=0.0), 1e-300)) ** 2
    return float(square.sum() ** 2 / max((square**2).sum(), 1e-300))
