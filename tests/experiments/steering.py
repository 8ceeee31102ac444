"""What the tests of steering share: the prompt, tolerances, and readings of a result."""

from __future__ import annotations

import dataclasses

import folders
import jax.numpy as jnp
import numpy as np

from qkattr.kinds import Kind

SAME = 2e-6  # probabilities: the same float32 arithmetic in another program
SCORE = 2e-5  # of scores of order 1 to 10: float32 sums in another order
CLEAN = 1e-7  # KL of a float32 distribution from itself, computed by another program

PROMPT = "hi hi 12hi hi hi 12"
BLOCKS = 3
KEY, QUERY = 3, 9  # a key that features of blocks 1 and 2 speak for, and the last position
HEADS = [(b, n) for b in (1, 2) for n in range(folders.HEADS)]
SALLY = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"


def top_token(result) -> int:
    return result.predictions[0]["id"]


def p_top(result, steering) -> list[float]:
    """The probability of the clean run's likeliest token at every scale."""
    return steering.tracked[result.predictions[0]["token"]]


def only(edits, heads):
    """The edits, in these heads only."""
    left = [
        dataclasses.replace(edit, heads=tuple(head for head in edit.heads if head in heads))
        for edit in edits
    ]
    return [edit for edit in left if edit.heads]


def features_at(result, b: int, t: int) -> list[int]:
    parts = result.subject.components
    kind, index = np.asarray(parts.kind[b, t]), np.asarray(parts.index[b, t])
    return index[kind == Kind.FEATURE].tolist()


def vector_of(result, b: int, t: int, wanted: Kind):
    """A component, as the clean run has it."""
    parts = result.subject.components
    slot = int(np.flatnonzero(np.asarray(parts.kind[b, t]) == wanted)[0])
    return np.asarray(parts.at(jnp.array(t), jnp.array(slot), jnp.array(b)))
