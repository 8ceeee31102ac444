"""The components of a whole prompt: every boundary encoded, and the directions in use gathered.

    dictionaries, boundaries -> an encoding each -> slots and directions -> `Components`, stacked

Every dictionary is visited once, and only the decoder rows of active features are kept. Numbers of
slots and of directions are bucketed, so that another prompt meets compiled code. Axes as in
`components`; exact to float32 rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qkattr.kinds import Kind
from qkattr.shapes import checked
from qkattr.sharding import bucket
from qkattr.sources.components import Components, assemble, sink_positions
from qkattr.sources.dictionary import Dictionary, Encoding, encode, encoder_rows
from qkattr.types import Params


@checked
def decompose_prompt(
    params: Params,
    dictionaries: tuple[Dictionary | None, ...] | None,
    boundaries: Float[Array, "boundaries T D"],
    tokens: Int[Array | np.ndarray, "T"],
    *,
    n_real: int,
    sinks: bool = True,
    read: str = "decoder",
    max_slots: int = 256,
    precision: str = "highest",
) -> Components:
    """The components of every boundary of a prompt, stacked on a leading axis L + 1.

    Dictionaries are visited one at a time, and only the decoder rows of active features are kept.
    The number of slots and of directions is bucketed, so that another prompt meets compiled code.

    Args:
      params: the model, for its embeddings.
      dictionaries: one a boundary, None where there is none; None: no dictionary anywhere.
      boundaries: the residual stream of the padded prompt.
      tokens: `[T]`, padded.
      n_real: how many positions are real.
      sinks: see `sink_positions`; they apply from boundary 1 on.
      read: "decoder" or "encoder", how features are read as targets.
      max_slots: at most so many features a position.
    """
    n_boundaries = boundaries.shape[0]
    dictionaries = dictionaries or (None,) * n_boundaries
    real = np.arange(tokens.shape[0]) < n_real
    sink = sink_table(boundaries, n_real) if sinks else np.zeros(boundaries.shape[:2], bool)
    encoded = [
        d and (d, encode(d, x, slots=_most(d, max_slots), precision=precision))
        for d, x in zip(dictionaries, boundaries, strict=True)
    ]
    needed = map(_needed, encoded, real & ~np.asarray(sink))
    slots = min(bucket(max(2, *needed)), max_slots)
    sources = []
    for b, found in enumerate(encoded):
        if found is not None:
            sources.append(_from_dictionary(*found, slots, read))
        elif b == 0:
            sources.append(_from_embeddings(params, tokens, slots))
        else:
            sources.append(_from_nothing(boundaries[b], slots))
    rows, row, read_rows = _compact(sources, real, read)
    rows = jax.device_put(rows)
    parts = _assemble_all(
        boundaries,
        tuple(source.encoding for source in sources),
        rows,
        row,
        sink,
        n_real=n_real,
        kinds=np.stack([source.kinds for source in sources]),
        error_kind=np.array([source.error_kind for source in sources]),
    )
    read_rows = None if read == "decoder" else jax.device_put(read_rows)
    return dataclasses.replace(parts, rows=rows, read=read_rows)


@jax.jit
def sink_table(boundaries: Float[Array, "L+1 T D"], n_real: Int[Array, ""]) -> Bool[Array, "L+1 T"]:
    """`sink_positions` of every boundary; at the embedding there are none."""
    return jax.vmap(lambda x: sink_positions(x, n_real))(boundaries).at[0].set(False)


@jax.jit
def _assemble_all(boundaries, encodings, rows, row, sink, *, n_real, kinds, error_kind):
    """`assemble` of every boundary, one after the other; the directions stay with the caller.

    encodings: one a boundary, each with the slots of `row` or fewer, or with more, of which the
    first are taken.
    """
    real = jnp.arange(boundaries.shape[1]) < n_real
    fitted = [_fitted(encoding, row.shape[-1]) for encoding in encodings]
    encoding = jax.tree.map(lambda *leaves: jnp.stack(leaves), *fitted)

    def one(inputs):
        x, encoding, rows, row, sink, kinds, error_kind = inputs
        parts = assemble(
            x, encoding, rows, row, sink=sink, real=real, slot_kind=kinds, error_kind=error_kind
        )
        return dataclasses.replace(parts, rows=None)

    return jax.lax.map(one, (boundaries, encoding, rows, row, sink, kinds, error_kind))


def _fitted(encoding: Encoding, slots: int) -> Encoding:
    """With so many slots."""
    return dataclasses.replace(
        encoding,
        index=_cut_or_padded(jnp, encoding.index, slots),
        activation=_cut_or_padded(jnp, encoding.activation, slots),
        coefficient=_cut_or_padded(jnp, encoding.coefficient, slots),
    )


def _cut_or_padded(xp: Any, array: Any, slots: int) -> Any:
    """`[T, slots]` of what has fewer or more, by NumPy or by JAX."""
    there = min(slots, array.shape[1])
    return xp.pad(array[:, :there], ((0, 0), (0, slots - there)))


def _most(dictionary: Dictionary, max_slots: int) -> int:
    """How many features of a position are looked at."""
    return min(dictionary.config.k or max_slots, max_slots)


def _needed(encoded: tuple[Dictionary, Encoding] | None, kept: np.ndarray) -> int:
    """How many features are active at once: k, or the most at a position that is kept.

    kept: `[T]` real positions that are no sinks. At a sink, for which SAEs were not trained,
    thousands of features may fire.
    """
    if encoded is None:
        return 0
    dictionary, encoding = encoded
    if dictionary.config.k:
        return dictionary.config.k
    return int(np.asarray(encoding.activation > 0).sum(-1)[kept].max(initial=0))


@dataclasses.dataclass(frozen=True)
class _Source:
    """One boundary on its way to components.

    encoding: what is active.
    direction_ids: `[T, A]` names of the directions.
    directions: turns names into rows, and into encoder rows.
    kinds: `[A]` of the slots, of `Kind`.
    error_kind: of the last slot.
    """

    encoding: Encoding
    direction_ids: np.ndarray
    directions: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    kinds: np.ndarray
    error_kind: int = int(Kind.ERROR)


def _from_dictionary(dictionary: Dictionary, encoding: Encoding, slots: int, read: str) -> _Source:
    """An encoding, the largest activations first."""

    def directions(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        decoder = np.asarray(dictionary.w_dec_MD[features], np.float32)
        encoder = decoder if read == "decoder" else encoder_rows(dictionary, features)
        return decoder, encoder

    return _Source(
        encoding,
        _cut_or_padded(np, np.asarray(encoding.index), slots),
        directions,
        np.full(slots, int(Kind.FEATURE)),
    )


def _constant_encoding(index: np.ndarray, coefficient: np.ndarray, d_model: int) -> Encoding:
    n_positions = index.shape[0]
    return Encoding(
        index=index.astype(np.int32),
        activation=coefficient.astype(np.float32),
        coefficient=coefficient.astype(np.float32),
        bias=np.zeros((n_positions, d_model), np.float32),
        left_out=np.zeros(n_positions, np.float32),
    )


def _from_embeddings(params: Params, tokens: Array | np.ndarray, slots: int) -> _Source:
    """Boundary 0 without a dictionary: the token's embedding in slot 0,
    the position's in slot 1.
    """
    tokens = np.asarray(tokens)
    vocab, d_model = params.embed_VD.shape
    index, coefficient = np.zeros((2, tokens.shape[0], slots))
    kinds = np.full(slots, int(Kind.TOKEN))
    index[:, 0], coefficient[:, 0] = tokens, 1.0
    ids = index.copy()
    if params.position_PD is not None:
        index[:, 1], coefficient[:, 1], kinds[1] = np.arange(tokens.shape[0]), 1.0, Kind.POSITION
        ids[:, 1] = vocab + index[:, 1]

    def directions(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        is_token = ids < vocab
        rows = [_rows_of(params.embed_VD, ids[is_token])]
        if params.embed_scale is not None:
            rows[0] = rows[0] * np.asarray(params.embed_scale, np.float32)
        if params.position_PD is not None:
            rows.append(_rows_of(params.position_PD, ids[~is_token] - vocab))
        rows = np.concatenate(rows)
        return rows, rows

    encoding = _constant_encoding(index, coefficient, d_model)
    return _Source(encoding, ids.astype(np.int64), directions, kinds, error_kind=int(Kind.NONE))


def _rows_of(table: Array, ids: np.ndarray) -> np.ndarray:
    """Some rows of a table on the device, in float32 on the host."""
    padded = np.resize(ids, bucket(len(ids)))
    return np.asarray(_taken(table, padded), np.float32)[: len(ids)]


@jax.jit
def _taken(table, ids):
    return table[ids]


def _from_nothing(x: Array, slots: int) -> _Source:
    """A boundary without a dictionary: everything is in the error slot."""
    zeros = np.zeros((x.shape[0], slots))
    empty = np.zeros((1, x.shape[1]), np.float32)
    return _Source(
        encoding=_constant_encoding(zeros, zeros, x.shape[1]),
        direction_ids=zeros.astype(np.int64),
        directions=lambda ids: (empty[ids], empty[ids]),
        kinds=np.full(slots, int(Kind.NONE)),
    )


def _compact(sources: list[_Source], real: np.ndarray, read: str):
    """The directions in use at each boundary, padded to a common bucket,
    and where each slot finds its own.
    """
    used = []
    for source in sources:
        coefficient = _cut_or_padded(np, np.asarray(source.encoding.coefficient), len(source.kinds))
        active = (coefficient != 0) & real[:, None]
        used.append(np.unique(source.direction_ids[active]))
    n_rows = bucket(max(len(ids) for ids in used), smallest=64)
    d_model = sources[0].encoding.bias.shape[1]
    rows = np.zeros((len(sources), n_rows, d_model), np.float32)
    read_rows = rows if read == "decoder" else np.zeros_like(rows)
    row = np.zeros((len(sources), *sources[0].direction_ids.shape), np.int32)
    for b, (source, ids) in enumerate(zip(sources, used, strict=True)):
        if len(ids):
            rows[b, : len(ids)], read_rows[b, : len(ids)] = source.directions(ids)
            row[b] = np.minimum(np.searchsorted(ids, source.direction_ids), len(ids) - 1)
    return rows, row, read_rows
