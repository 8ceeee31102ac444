"""The strongest pairs among all: the largest and the most negative products of two sets of vectors.

    value[r, c] = rows[r] . columns[c]          seen where 0 <= position[r] - position[c] < window

The R x C values are never held.

1. Among the longest rows and columns, `top` values of either sign reach some level. No pair below
   it is among the strongest, so a vector whose length times the longest of the other side stays
   below is left out, and so is a tile by its longest vectors.
2. Tiles of one matmul each are reduced to the best value of every row of the tile. A pair outside
   the `top` best of these has `top` better ones: only those rows of tiles are computed again, and
   sorted.

A row of a tile is a run of the values in row-major order, and at both stages the lower index wins a
tie: the result is that of `top_k` over all values, ties included. A zero is no pair, so rows and
columns may be padded with zero vectors.

`top_pairs` searches all heads of a block over all positions of a prompt: rows and columns are the
slots that hold a component, and tiles whose keys all come after their queries are skipped.
Axes: N heads, R query-side components of all positions, C key-side ones, P pairs kept, H head_dim.
Exact given the frozen scales; a value may differ in its last bit from that of a single place.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from qkattr.config import BlockConfig
from qkattr.kinds import NO_WINDOW, Kind
from qkattr.model.transformer import block
from qkattr.qk.terms import every_query_component, key_components, used_slots
from qkattr.shapes import checked
from qkattr.sharding import on_any_mesh
from qkattr.sources.components import Components, ComponentStack
from qkattr.types import BlockStack, BlockWeights

#: Rows and columns of a tile, at most: its products stay in a core's cache.
TILE = 1024
#: Sizes of tiles, and of what is searched in a prompt, are multiples of this.
STEP = 128
#: How many of the longest rows and columns the level is read from.
SAMPLE = 256
#: Lengths are taken as so much longer: far more than rounding.
SLACK = 1.0001


@struct.dataclass
class Strongest:
    """The P largest values and the P most negative ones (first axis: 0 positive, 1 negative).

    value: `[2, P]` falling and rising; 0 where there are fewer pairs.
    row, column: `[2, P]` where they are.
    """

    value: Float[Array, "2 P"]
    row: Int[Array, "2 P"]
    column: Int[Array, "2 P"]


@struct.dataclass
class TopPairs:
    """The strongest terms of each head of a block, as `Strongest` orders them.

    value: `[N, 2, P]` the terms.
    query, key: `[N, 2, P]` positions.
    query_slot, key_slot: `[N, 2, P]` slots of `Components`.
    probability, score: `[N, 2, P]` the head's attention and score at (query, key).
    """

    value: Float[Array, "N 2 P"]
    query: Int[Array, "N 2 P"]
    query_slot: Int[Array, "N 2 P"]
    key: Int[Array, "N 2 P"]
    key_slot: Int[Array, "N 2 P"]
    probability: Float[Array, "N 2 P"]
    score: Float[Array, "N 2 P"]


@checked
def strongest(
    rows: Float[Array, "R H"],
    columns: Float[Array, "C H"],
    *,
    row_position: Int[Array, "R"] | None = None,
    column_position: Int[Array, "C"] | None = None,
    window: Int[Array, ""] | int = NO_WINDOW,
    top: int,
    tile: int | None = None,
    precision: str = "highest",
) -> Strongest:
    """The strongest products; for use inside jitted functions.

    row_position, column_position: rising; None: every row sees every column. tile: rows and columns
    of a tile; None: by size.
    """
    (R, _), (C, _) = rows.shape, columns.shape
    height, width = (_tile(n) if tile is None else tile for n in (R, C))
    at_R = jnp.zeros(R, jnp.int32) if row_position is None else row_position
    at_C = jnp.zeros(C, jnp.int32) if column_position is None else column_position

    def seen(r: Array, c: Array) -> Array:
        return (r >= c) & (r - c < window)

    with jax.named_scope("level"):
        level = _level((rows, at_R), (columns, at_C), seen, top, precision)
        longest = [_length(v).max() for v in (columns, rows)]
        rows, at_R, from_R = _long((rows, at_R), level / longest[0], height)
        columns, at_C, from_C = _long((columns, at_C), level / longest[1], width)
        length_R, length_C = (
            _length(v).reshape(-1, size).max(1) for v, size in ((rows, height), (columns, width))
        )
    n_across = columns.shape[0] // width

    def best_of_tile(i: Array, j: Array) -> tuple[Array, Array]:
        """The best of every row of a tile, `[rows]`: positive ones, and negative ones negated."""
        (rows_, r), (columns_, c) = _cut((rows, at_R), i, height), _cut((columns, at_C), j, width)

        def products():  # columns first: the reduction over them is then the fast one
            return jnp.einsum("CH,RH->CR", columns_, rows_, precision=precision)

        def best(values):
            return values.max(0), -values.min(0)

        none = jnp.zeros(height)
        some = (r[-1] >= c[0]) & (r[0] - c[-1] < window)
        some &= length_R[i] * length_C[j] >= level
        every = seen(r[0], c[-1]) & seen(r[-1], c[0])
        ways = (
            lambda: (none, none),
            lambda: best(jnp.where(seen(r[None], c[:, None]), products(), 0.0)),
            lambda: best(products()),
        )
        return jax.lax.switch(some * (1 + every.astype(jnp.int32)), ways)

    with jax.named_scope("tiles"):
        across = partial(jax.lax.map, xs=jnp.arange(n_across))
        down = jnp.arange(rows.shape[0] // height)
        tiles = jax.lax.map(lambda i: across(lambda j: best_of_tile(i, j)), down)

    def refine(best: Float[Array, "I J R"], sign: float) -> tuple[Array, Array, Array]:
        flat = best.swapaxes(1, 2).ravel()
        # In row-major order, so that ties go to the lower pair.
        at = jnp.sort(jax.lax.top_k(flat, min(top, flat.size))[1])
        r, j = at // n_across, at % n_across

        values = jnp.einsum("UH,CH->UC", rows[r], columns, precision=precision)
        own = (jnp.arange(columns.shape[0]) // width)[None] == j[:, None]
        values = jnp.where(own & seen(at_R[r][:, None], at_C[None]), sign * values, 0.0)
        value, flat = jax.lax.top_k(values.ravel(), min(top, values.size))
        tile_at, column = flat // columns.shape[0], flat % columns.shape[0]
        return sign * jnp.maximum(value, 0.0), r[tile_at], column

    with jax.named_scope("refine"):
        both = [refine(best, sign) for best, sign in zip(tiles, (1.0, -1.0), strict=True)]
    value, row, column = (jnp.stack(parts) for parts in zip(*both, strict=True))
    return Strongest(value, from_R[row], from_C[column])


def _length(vectors: Float[Array, "R H"]) -> Float[Array, "R"]:
    return SLACK * jnp.linalg.norm(vectors, axis=-1)


def _level(rows, columns, seen, top: int, precision: str) -> Float[Array, ""]:
    """A value that `top` pairs of either sign reach; 0 where no such is found."""
    (rows, r), (columns, c) = (
        (v[some], at[some])
        for v, at in (rows, columns)
        for some in [jax.lax.top_k(_length(v), min(SAMPLE, len(v)))[1]]
    )
    values = jnp.einsum("RH,CH->RC", rows, columns, precision=precision)
    if len(rows) < top:
        return jnp.zeros(())
    values = jnp.where(seen(r[:, None], c[None]), values, 0.0)
    best = [jnp.sort(of_row)[-top] for of_row in (values.max(1), -values.min(1))]
    return jnp.maximum(jnp.minimum(*best), 0.0)


def _long(vectors: tuple[Array, Array], least: Array, tile: int) -> tuple[Array, Array, Array]:
    """Those of some vectors that are no shorter, in order, then zeros up to whole tiles; their
    positions, and where each was."""
    rows, position = vectors
    n = len(rows)
    size = n + -n % tile
    long = _length(rows) >= least
    at = jnp.nonzero(long, size=size, fill_value=n - 1)[0]
    kept = jnp.arange(size) < long.sum()
    return jnp.where(kept[:, None], rows[at], 0.0), jnp.where(kept, position[at], position[-1]), at


def _tile(n: int) -> int:
    """Tiles of equal size; at least three of them, since of a prompt's the half above the diagonal
    is skipped."""
    tiles = max(3, -(-n // TILE))
    return -(-n // (tiles * STEP)) * STEP


def _cut(arrays: tuple[Array, ...], i: Array, size: int) -> tuple[Array, ...]:
    return tuple(jax.lax.dynamic_slice_in_dim(a, i * size, size) for a in arrays)


@partial(jax.jit, static_argnames=("top", "cfg", "precision"))
@on_any_mesh
@checked
def top_pairs(
    weights: BlockWeights,
    x: Float[Array, "T D"],
    components: Components,
    slots: Int[Array, "R"],
    *,
    top: int,
    cfg: BlockConfig,
    precision: str = "highest",
) -> TopPairs:
    """The strongest terms of all heads of a block over all (t, s) of a prompt.

    Args:
      weights: the block's. x: the residual stream it reads. components: of it.
      slots: which of the T x C slots to search, rising, padded by -1 (see `search_slots`).
      top: pairs of either sign of each head (static).
    """
    _, seen = block(weights, x, cfg=cfg, precision=precision)
    n_slots, n_heads, n_kv = components.n_slots, weights.wq_DNH.shape[1], weights.wk_DKH.shape[1]
    group = n_heads // n_kv
    how: dict[str, Any] = dict(cfg=cfg, precision=precision)
    at = jnp.where(slots < 0, slots.max(), slots)
    position = at // n_slots

    def chosen(parts: Float[Array, "T C H"]) -> Float[Array, "R H"]:
        return jnp.where((slots < 0)[:, None], 0.0, parts.reshape(-1, parts.shape[-1])[at])

    def of_kv_head(kv: Array) -> Strongest:
        keys = chosen(key_components(weights, components, seen, kv * group, **how)) * cfg.scale

        def of_head(head: Array) -> Strongest:
            queries = chosen(every_query_component(weights, components, seen, head, **how))
            return strongest(
                queries,
                keys,
                row_position=position,
                column_position=position,
                window=weights.window,
                top=top,
                precision=precision,
            )

        return jax.lax.map(of_head, kv * group + jnp.arange(group))

    found = jax.lax.map(of_kv_head, jnp.arange(n_kv))
    found = jax.tree.map(lambda a: a.reshape(n_heads, *a.shape[2:]), found)
    query, key = position[found.row], position[found.column]
    head = jnp.arange(n_heads)[:, None, None]
    return TopPairs(
        value=found.value,
        query=query,
        query_slot=at[found.row] % n_slots,
        key=key,
        key_slot=at[found.column] % n_slots,
        probability=seen.pattern_NTS[head, query, key],
        score=seen.scores_NTS[head, query, key],
    )


@jax.jit
@on_any_mesh
def _used(blocks: BlockWeights, components: Components) -> Bool[Array, "L T C"]:
    def one(inputs):
        weights, parts = inputs
        each = jnp.arange(parts.kind.shape[0])
        sides = [
            jax.vmap(lambda t, bias=bias: used_slots(parts, t, bias, weights.norm_attn))(each)
            for bias in (weights.bq_NH, weights.bk_KH)
        ]
        return sides[0] | sides[1]

    read = jax.tree.map(lambda a: a[:-1], components)
    return jax.lax.map(one, (blocks, read))


@checked
def search_slots(
    blocks: BlockStack, components: ComponentStack, kinds: tuple[Kind, ...] = ()
) -> Int[np.ndarray, "L R"]:
    """The slots that hold a component on either side, of every block, as `top_pairs` takes them; on
    the host. R is rounded up, so that other prompts meet compiled code. kinds: only these; (): all.
    """
    used, kind = jax.device_get((_used(blocks, components), components.kind[:-1]))
    if kinds:
        used = used & np.isin(kind, [int(k) for k in kinds])
    found = [np.flatnonzero(of_block) for of_block in used.reshape(len(used), -1)]
    most = max(1, *(len(f) for f in found))
    step = max(STEP, 2 ** (most.bit_length() - 4))
    size = -(-most // step) * step
    return np.stack([np.pad(f, (0, size - len(f)), constant_values=-1) for f in found])
