"""What the next token truly loses when a head, or one place of a head, is taken away.

    zero      the head's output (before W_O) is 0 at every position
    mean      at positions >= 1 its output is its mean over the prompt's positions >= 1;
              position 0, where there is nothing but the first token, keeps its own
    pattern   at every query the strongest key that is no sink is masked, and the pattern is
              renormalised over the other keys; the values stay. It is the change that the softmax
              itself makes when that score falls to -inf, and it leaves a head that rests on a sink
              nearly as it was, where a uniform pattern would make it say what it never says
    place     the same for one query and one key

An ablation happens inside one block; the blocks after it are run on from there, with the patterns
of all heads held at the clean run ("frozen") or computed anew ("live"). Blocks before it, and other
heads of its own block, are as they were. Norm scales and MLPs are always computed anew.
Axes: B ablations run together, P places, L blocks, N heads, T/S positions, D d_model, H head_dim.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from qkattr.experiments.runs import MOST
from qkattr.kinds import Kind
from qkattr.model.attention import attend, project_v
from qkattr.model.edits import BlockEdits, PatternEdits
from qkattr.model.layers import apply_norm, norm_linear, softcap
from qkattr.model.transformer import block, run_from, unembed
from qkattr.sharding import on_any_mesh
from qkattr.subject import Subject
from qkattr.types import BlockWeights

ABLATIONS = ("zero", "mean", "pattern")
#: Whether the patterns of the other heads are held at the clean run.
OTHERS = ("frozen", "live")
#: What is read: the logit less the mean logit (before a softcap), and the log probability.
READS = ("logit", "log_p")


@struct.dataclass
class CleanHeads:
    """All heads in the clean run: patterns, values (without the constants that biases add), outputs
    before W_O, and what each ablation of `ABLATIONS` makes of the outputs, `[X, L, T, N, H]`."""

    patterns: Float[Array, "L N T S"]
    values: Float[Array, "L S K H"]
    outputs: Float[Array, "L T N H"]
    ablated: Float[Array, "X L T N H"]


def sink_positions(subject: Subject) -> Bool[np.ndarray, "T"]:
    """Positions that are a sink at any boundary."""
    return np.asarray((subject.components.kind == Kind.SINK).any((0, -1)))


def later_positions(subject: Subject) -> Bool[np.ndarray, "T"]:
    """The prompt's positions >= 1, padding left out."""
    at = np.arange(subject.boundaries.shape[1])
    return (at >= 1) & (at < len(subject.ids))


def clean_heads(subject: Subject) -> CleanHeads:
    """The heads of a subject's prompt."""
    return _clean_heads(
        subject.bundle.params.blocks,
        subject.boundaries,
        jnp.asarray(later_positions(subject)),
        jnp.asarray(sink_positions(subject)),
        cfg=subject.bundle.config.block,
        precision=subject.precision,
    )


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
def _clean_heads(blocks: BlockWeights, boundaries, later, sinks, *, cfg, precision) -> CleanHeads:
    def one(inputs):
        weights, x = inputs
        _, seen = block(weights, x, cfg=cfg, precision=precision)
        v_SKH = project_v(weights, apply_norm(weights.norm_attn, x, cfg=cfg), precision=precision)
        y = norm_linear(weights.norm_attn, x, seen.scale_attn_T, cfg=cfg)
        alone = project_v(dataclasses.replace(weights, bv_KH=None), y, precision=precision)
        outputs = attend(seen.pattern_NTS, v_SKH, precision=precision)
        own = later[:, None, None]
        mean = (own * outputs).sum(0) / jnp.maximum(later.sum(), 1)
        masked = attend(without_strongest(seen.pattern_NTS, sinks), v_SKH, precision=precision)
        ablated = jnp.stack([0 * outputs, jnp.where(own, mean, outputs), masked])
        return CleanHeads(seen.pattern_NTS, alone, outputs, ablated)

    found = jax.lax.map(one, (blocks, boundaries[:-1]))
    return dataclasses.replace(found, ablated=found.ablated.swapaxes(0, 1))


def without_key(pattern: Float[Array, "... S"], key: Int[Array, "..."]) -> Float[Array, "... S"]:
    """The pattern with a key masked at every query; a query that sees no other key keeps its own.
    key: -1 masks none."""
    rest = jnp.where(jnp.arange(pattern.shape[-1]) == key[..., None], 0.0, pattern)
    total = rest.sum(-1, keepdims=True)
    return jnp.where((total > 0) & (key[..., None] >= 0), rest / total, pattern)


def without_strongest(
    pattern: Float[Array, "N T S"], sinks: Bool[Array, "S"]
) -> Float[Array, "N T S"]:
    """The pattern with the strongest key that is no sink masked at every query."""
    seen = jnp.where(sinks, 0.0, pattern)
    return without_key(pattern, jnp.where(seen.max(-1) > 0, seen.argmax(-1), -1))


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
def _ablated_streams(
    blocks: BlockWeights,
    boundaries: Float[Array, "L+1 T D"],
    ablated: Float[Array, "X L T N H"],
    b: Int[Array, ""],
    *,
    cfg,
    precision: str,
) -> Float[Array, "B T D"]:
    """Boundary b + 1 under every ablation of every head of block b, ablation by ablation."""
    weights, n_heads = jax.tree.map(lambda a: a[b], blocks), ablated.shape[3]

    def one(output, head):
        others = jnp.broadcast_to(1 - head, output.shape[:2])
        edits = BlockEdits(head_scale_TN=others, head_add_TNH=head[:, None] * output)
        return block(weights, boundaries[b], cfg=cfg, edits=edits, precision=precision)[0]

    every = jnp.eye(n_heads)
    over_heads = jax.vmap(one, in_axes=(None, 0))
    streams = jax.lax.map(lambda output: over_heads(output, every), ablated[:, b])
    return streams.reshape(-1, *streams.shape[2:])


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
def _masked_streams(
    blocks: BlockWeights,
    boundaries: Float[Array, "L+1 T D"],
    patterns: Float[Array, "L N T S"],
    places: Int[Array, "P 4"],
    *,
    cfg,
    precision: str,
) -> Float[Array, "P T D"]:
    """The boundary after each place's block, with the place's key masked for its head and query."""

    def one(place):
        b, head, query, key = place
        weights, pattern = jax.tree.map(lambda a: a[b], (blocks, patterns))
        N, T, _ = pattern.shape
        row = (jnp.arange(N)[:, None] == head) & (jnp.arange(T) == query)
        edits = BlockEdits(patterns=PatternEdits(without_key(pattern, jnp.full((N, T), key)), row))
        return block(weights, boundaries[b], cfg=cfg, edits=edits, precision=precision)[0]

    return jax.lax.map(one, places)


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
def read_token(
    params, x: Float[Array, "B D"], token, *, cfg, precision: str
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """What the last boundary says of a token: `READS`."""
    uncapped = dataclasses.replace(cfg, final_softcap=None)
    logits = unembed(params, x, cfg=uncapped, precision=precision)
    log_p = jax.nn.log_softmax(softcap(logits, cfg.final_softcap))
    return logits[:, token] - logits.mean(-1), log_p[:, token]


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
def _run_on(params, x, boundary, last, token, patterns, *, cfg, precision):
    x = run_from(params, x, boundary, cfg=cfg, patterns=patterns, precision=precision)
    return read_token(params, x[:, last], token, cfg=cfg, precision=precision)


@dataclasses.dataclass(frozen=True)
class Ablations:
    """A prompt's ablations, of its likeliest next token."""

    subject: Subject
    heads: CleanHeads
    token: int

    def of_heads(self) -> dict[str, np.ndarray]:
        """What the token loses without each head: `[X, L, N]` by "frozen logit", "live log_p", ...

        X: `ABLATIONS`.
        """
        lost = []
        for b in range(self.subject.bundle.config.n_blocks):
            streams = _ablated_streams(
                self.subject.bundle.params.blocks,
                self.subject.boundaries,
                self.heads.ablated,
                b,
                cfg=self.subject.bundle.config.block,
                precision=self.subject.precision,
            )
            lost.append(self._lost(streams, np.full(len(streams), b + 1)))
        shape = len(lost), len(ABLATIONS), -1
        return {
            name: np.stack([one[name] for one in lost]).reshape(shape).swapaxes(0, 1)
            for name in lost[0]
        }

    def of_places(self, places: np.ndarray) -> dict[str, np.ndarray]:
        """What the token loses when each place's key is masked: `[P]`, named as by `of_heads`."""
        streams = _masked_streams(
            self.subject.bundle.params.blocks,
            self.subject.boundaries,
            self.heads.patterns,
            jnp.asarray(places),
            cfg=self.subject.bundle.config.block,
            precision=self.subject.precision,
        )
        return self._lost(streams, places[:, 0] + 1)

    def _lost(self, streams: Float[Array, "B T D"], starts: np.ndarray) -> dict[str, np.ndarray]:
        """Run on, `MOST` at a time, and compare with the clean run."""
        subject, last = self.subject, len(self.subject.ids) - 1
        params, token = subject.bundle.params, self.token
        how = dict(cfg=subject.bundle.config, precision=subject.precision)
        clean = read_token(params, subject.boundaries[-1, last][None], token, **how)
        lost = {}
        for others, patterns in zip(OTHERS, (self.heads.patterns, None), strict=True):
            found = []
            for at in np.array_split(np.arange(len(streams)), -(-len(streams) // MOST)):
                after = _run_on(params, streams[at], starts[at], last, token, patterns, **how)
                found.append([np.asarray(a, np.float64) for a in after])
            for i, (name, was) in enumerate(zip(READS, clean, strict=True)):
                after = np.concatenate([one[i] for one in found])
                lost[f"{others} {name}"] = np.float64(was[0]) - after
        return lost
