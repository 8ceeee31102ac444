"""Many edited forward passes of one prompt as one jitted call.

Edits are batched where a leaf has a leading axis (`batched_axes`); everything that the batch shares
(weights, the prompt, the projections of unbatched vectors) is computed once. Axes: B edited runs,
L block, N heads, Q query rows captured, S key position, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from qkattr.config import ModelConfig
from qkattr.errors import InputError
from qkattr.model.edits import Edits, batched_axes
from qkattr.model.transformer import residual_stream, unembed
from qkattr.sharding import bucket, on_any_mesh
from qkattr.subject import Subject
from qkattr.types import Params

#: Runs in one call; more are done in several.
MOST = 64


@struct.dataclass
class EditedRuns:
    """logits: `[B, V]` after the prompt's last token. patterns, scores: `[B, L, N, Q, S]` at the
    query rows asked for."""

    logits: Float[Array, "B V"]
    patterns: Float[Array, "B L N Q S"]
    scores: Float[Array, "B L N Q S"]

    @property
    def log_p(self) -> np.ndarray:
        return log_softmax(self.logits)


def log_softmax(logits: Float[Array | np.ndarray, "... V"]) -> np.ndarray:
    """Log probabilities `[..., V]` on the host, in float64: divergences of nearly equal runs are
    differences of these."""
    wide = np.asarray(logits, np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)


def clean_top(subject: Subject) -> tuple[int, float]:
    """The clean run's likeliest next token, and its log probability."""
    log_p = log_softmax(subject.logits)
    top = int(log_p.argmax())
    return top, float(log_p[top])


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
def edited_runs(
    params: Params,
    tokens: Int[Array, "T"],
    last: Int[Array, ""] | int,
    queries: Int[Array, "Q"],
    edits: Edits,
    *,
    cfg: ModelConfig,
    precision: str = "highest",
) -> EditedRuns:
    """Run the model once for every edit of the batch.

    Args:
      tokens: `[T]`, padded.
      last: the position whose next token is predicted.
      queries: the query rows of patterns and scores to return.
      edits: with at least one batched leaf.
    """

    def one(edits: Edits) -> EditedRuns:
        x, trace = residual_stream(
            params,
            tokens,
            cfg=cfg,
            edits=edits,
            capture=("scores", "patterns"),
            queries=queries,
            precision=precision,
        )
        logits = unembed(params, x[last], cfg=cfg, precision=precision)
        assert trace.patterns is not None and trace.scores is not None  # they were asked for
        return EditedRuns(logits=logits, patterns=trace.patterns, scores=trace.scores)

    return jax.vmap(one, in_axes=(batched_axes(edits),))(edits)


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
def clean_patterns(
    params: Params, tokens: Int[Array, "T"], *, cfg: ModelConfig, precision: str = "highest"
) -> Float[Array, "L N T S"] | None:
    """Every pattern of the unedited run."""
    capture = ("patterns",)
    _, trace = residual_stream(params, tokens, cfg=cfg, capture=capture, precision=precision)
    return trace.patterns


def run_edits(subject: Subject, edits: Edits, *, queries: Sequence[int]) -> EditedRuns:
    """`edited_runs` of a subject's prompt, on the host: `MOST` at a time, cropped to the prompt."""
    axes = batched_axes(edits)
    sizes = jax.tree.map(lambda leaf, axis: None if axis is None else leaf.shape[0], edits, axes)
    size = jax.tree.leaves(sizes)[0]
    tokens, rows = jnp.asarray(subject.padded), jnp.asarray(queries)
    done = []
    for start in range(0, size, MOST):
        n = min(size - start, MOST)
        chosen = np.minimum(np.arange(start, start + bucket(n, smallest=1)), size - 1)

        def part(leaf, axis, chosen=chosen):
            return leaf if axis is None else leaf[chosen]

        runs = edited_runs(
            subject.bundle.params,
            tokens,
            len(subject.ids) - 1,
            rows,
            jax.tree.map(part, edits, axes),
            cfg=subject.bundle.config,
            precision=subject.precision,
        )
        done.append(jax.tree.map(lambda a, n=n: np.asarray(a[:n]), runs))
    runs = jax.tree.map(lambda *parts: np.concatenate(parts), *done)
    return dataclasses.replace(
        runs,
        patterns=runs.patterns[..., : len(subject.ids)],
        scores=runs.scores[..., : len(subject.ids)],
    )


def split_runs(runs: EditedRuns, n: int) -> list[EditedRuns]:
    """Runs of a batch that was joined from n of one size, apart again."""
    size = len(runs.logits) // n
    return [jax.tree.map(lambda a, i=i: a[i * size : (i + 1) * size], runs) for i in range(n)]


def check_finite(runs: EditedRuns, edits: Edits, scales: list[float]) -> None:
    """
    Raises:
      InputError: logits are not finite; or they may be finite and wrong, because a score
        overflowed, or the square of what a norm reads, of which the norm makes zeros.
    """
    reads = (edits.blocks.query, edits.blocks.key) if edits.blocks.live_scales else ()
    vectors = [read.vector_ED for read in reads if read is not None]
    vectors += [] if edits.residual is None else [edits.residual.delta_ED]
    size = sum(float(np.linalg.norm(vector, axis=-1).sum()) for vector in vectors)
    most = float(np.sqrt(np.finfo(np.float32).max)) / 2
    for scale, logits, scores in zip(scales, runs.logits, runs.scores, strict=True):
        if not np.isfinite(logits).all():
            raise InputError(
                f"at scale {scale:g} the model's logits are not finite; give scales nearer to 1"
            )
        if not np.isfinite(scores).all() or abs(scale - 1) * size > most:
            raise InputError(
                f"at scale {scale:g} an edited read or its scores overflow float32, and what "
                f"follows would be wrong; give scales nearer to 1"
            )
