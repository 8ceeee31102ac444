"""A prompt on the device: its residual stream and components, of which all else is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float

from qkattr.errors import InputError
from qkattr.kinds import Kind
from qkattr.load.bundle import Bundle
from qkattr.model.forward import residual_stream, unembed
from qkattr.options import TraceOptions
from qkattr.sharding import bucket
from qkattr.sources.components import Components
from qkattr.sources.prompt import decompose_prompt

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class MainTarget:
    """What effects are effects on. name: in words. covector: `[L+1, T, D]`, what it reads of every
    boundary, with this linearisation of the MLPs. live: `[L, T, N, H]`, what it reads of every
    head's output in the live model."""

    name: str
    covector: Float[Array, "L+1 T D"]
    live: Float[Array, "L T N H"]
    linearisation: str


@dataclasses.dataclass(frozen=True)
class Session:
    """boundaries: `[L+1, T, D]` of the prompt padded to its bucket. components: of every boundary.
    logits: `[V]` after the last token, on the host. last: `[D]` of the last boundary there. ids,
    tokens: the prompt's, as ids and decoded. precision: of all matmuls. target: of the trace, where
    the prompt was traced."""

    bundle: Bundle
    ids: tuple[int, ...]
    boundaries: Float[Array, "L+1 T D"]
    components: Components
    logits: Float[np.ndarray, "V"]
    last: Float[Array, "D"]
    tokens: list[str]
    precision: str
    target: MainTarget | None = None


def start_session(
    bundle: Bundle,
    ids: Sequence[int],
    opts: TraceOptions,
    progress: Progress = lambda stage: None,
) -> Session:
    """Run the model on a prompt's token ids and decompose every boundary."""
    progress("forward")
    padded = pad_tokens(ids)
    boundaries, last, logits = _boundaries(
        bundle.params,
        padded,
        len(ids) - 1,
        cfg=bundle.config,
        precision=opts.precision,
    )
    logits = np.asarray(logits)
    if not np.isfinite(logits).all():
        raise InputError(
            f"{bundle.model} computes logits on this prompt that are not finite; "
            f"its weights overflow, give an undamaged checkpoint"
        )
    progress("components")
    components = decompose_prompt(
        bundle.params,
        bundle.dictionaries,
        boundaries,
        padded,
        n_real=len(ids),
        sinks=opts.sinks,
        read=opts.read,
        max_slots=opts.max_slots,
        precision=opts.precision,
    )
    return Session(
        bundle=bundle,
        ids=tuple(ids),
        boundaries=boundaries,
        components=components,
        logits=logits,
        last=last,
        tokens=bundle.tokens(ids),
        precision=opts.precision,
    )


@partial(jax.jit, static_argnames=("cfg", "precision"))
def _boundaries(params, tokens, last, *, cfg, precision):
    x, captured = residual_stream(
        params, tokens, cfg=cfg, capture=("boundaries",), precision=precision
    )
    logits = unembed(params, x[last], cfg=cfg, precision=precision)
    return captured.boundaries, x[last], logits


def prompt_labels(session: Session) -> dict[tuple[int, int], str]:
    """What the bundle's labels, or else its cards, call the features active on the prompt."""
    cards, labels = session.bundle.cards, session.bundle.labels
    if cards is None and not labels:
        return {}
    boundary, position, slot = np.nonzero(np.asarray(session.components.kind) == Kind.FEATURE)
    index = np.asarray(session.components.index)[boundary, position, slot]
    active = sorted(set(zip(boundary.tolist(), index.tolist(), strict=True)))
    known = {} if cards is None else cards.labels(active)
    return known | {feature: labels[feature] for feature in active if feature in labels}


def padded_length(n: int) -> int:
    """The least of 16, 32, 64, 96, 128, 192, ... that holds n: every length is compiled once, and
    below 64 tokens padding costs less than compiling."""
    return next((size for size in (16, 32) if n <= size), bucket(n, smallest=64))


def pad_tokens(ids: Sequence[int]) -> np.ndarray:
    """Token ids, right-padded, so that a prompt of about the same length compiles nothing."""
    return np.pad(np.asarray(ids, np.int32), (0, padded_length(len(ids)) - len(ids)))
