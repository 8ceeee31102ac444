"""One pass over a corpus: what every feature of every boundary does on it, in bounded memory.

Per feature: how often it is active (apart for the two splits), the sum and a histogram of its
activations, its strongest contexts, and a uniform sample of all its active places. Sinks are left
out, as SAEs are not trained on them and components do not use them. Rows are held out in four of
eight equal stretches of the corpus: labels are chosen on the others and measured there.
Axes: B rows of a batch, T position, D d_model, M dictionary width, P = B * T, A features active at
a position, S segments, W positions of a window.
Exact: every count, the contexts and the sample (a batch with more active features than there were
slots is done again with more of them). Sums are float32.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qkattr.errors import InputError
from qkattr.features.checkpoint import read_checkpoint, write_checkpoint
from qkattr.features.seen import ScanConfig, Seen, add, nothing_seen
from qkattr.load.bundle import Bundle
from qkattr.model.transformer import residual_stream
from qkattr.sharding import bucket, on_any_mesh
from qkattr.sources.components import sink_positions
from qkattr.sources.dictionary import Dictionary, encode

ScanProgress = Callable[[str, float], None]  # a stage, and how much of it is done

#: Stretches of the corpus that are alternately for choosing labels and held out.
STRETCHES = 8


@dataclasses.dataclass(frozen=True)
class Scan:
    """A finished pass. rows: `[n, T]` token ids. seen: by boundary. sinks: `[n, T]` by boundary,
    the positions left out."""

    rows: np.ndarray
    seen: dict[int, Seen]
    sinks: dict[int, np.ndarray]
    config: ScanConfig

    @property
    def held_out(self) -> np.ndarray:
        return held_out(len(self.rows))


def held_out(n_rows: int) -> np.ndarray:
    """Which rows are held out: every other of eight stretches."""
    return np.arange(n_rows) * STRETCHES // n_rows % 2 == 1


def scan(
    bundle: Bundle,
    rows: np.ndarray,
    *,
    config: ScanConfig = ScanConfig(),  # noqa: B008  (frozen)
    folder: Path | None = None,
    every: int = 32,
    mesh: Mesh | None = None,
    progress: ScanProgress = lambda stage, done: None,
) -> Scan:
    """Scan rows of token ids with every dictionary of a bundle.

    Args:
      bundle: a model with SAEs; its arrays may lie on a mesh.
      rows: `[n, T]`, each with its BOS, if the SAEs want one.
      config: how much to keep.
      folder: where the state goes after `every` batches; a scan that finds its own state there
        carries on from it, and ends the same.
      mesh: rows go over its axis `data`.
      progress: called with "scan" and the share of batches done.

    Raises:
      InputError: the bundle has no SAEs, the rows cannot be used, or `folder` holds the state of
        another scan.
    """
    dictionaries = _dictionaries(bundle)
    rows = check_rows(bundle, rows)
    n_rows, T = rows.shape
    held, batch = held_out(n_rows), config.batch
    state = {b: nothing_seen(d.width, config) for b, d in dictionaries.items()}
    sinks = {b: np.zeros((n_rows, T), bool) for b in dictionaries}
    made_of = _made_of(bundle, rows, config)
    start = 0
    if folder is not None and (found := read_checkpoint(folder, made_of, (state, sinks))):
        start, (state, sinks) = found
    placed = NamedSharding(mesh, PartitionSpec("data")) if mesh else None
    slots = bucket(max(d.config.k or 64 for d in dictionaries.values()))
    n_batches = -(-n_rows // batch)
    for i in range(start, n_batches):
        at = np.arange(i * batch, (i + 1) * batch)
        row = np.where(at < n_rows, at, -1).astype(np.int32)
        tokens, is_held = rows[np.minimum(at, n_rows - 1)], held[np.minimum(at, n_rows - 1)]
        if placed is not None:
            tokens = jax.device_put(tokens, placed)
        how = dict(cfg=bundle.config, precision=config.precision)
        stream = _boundaries(bundle.params, tokens, **how)
        batch_sinks = {}
        for b, dictionary in dictionaries.items():
            before, more = state[b], True
            while more:
                state[b], batch_sinks[b], more = _look(
                    dictionary,
                    stream[b],
                    before,
                    row,
                    is_held,
                    sinks=b > 0,
                    slots=slots,
                    cfg=config,
                )
                more = dictionary.config.activation != "topk" and bool(more)
                slots = bucket(2 * slots) if more else slots
        for b, sink in jax.device_get(batch_sinks).items():
            sinks[b][at[at < n_rows]] = sink[at < n_rows]
        progress("scan", (i + 1) / n_batches)
        if folder is not None and (i + 1) % every == 0:
            write_checkpoint(folder, made_of, i + 1, (state, sinks))
    return Scan(rows, {b: jax.device_get(seen) for b, seen in state.items()}, sinks, config)


def _dictionaries(bundle: Bundle) -> dict[int, Dictionary]:
    if bundle.dictionaries is None:
        raise InputError(f"{bundle.model} was loaded without SAEs; load it with them")
    return {b: d for b, d in enumerate(bundle.dictionaries) if d is not None}


def check_rows(bundle: Bundle, rows: np.ndarray) -> np.ndarray:
    """The rows as int32, or an error that says what is wrong with them."""
    rows = np.asarray(rows)
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer):
        raise InputError(
            f"token rows are an array of {rows.dtype} of shape {list(rows.shape)}; expected "
            f"integers [rows, length]"
        )
    n, length = rows.shape
    if n < STRETCHES or not 2 <= length <= bundle.config.context:
        raise InputError(
            f"the text is {n} rows of {length} tokens; give at least {STRETCHES} rows of 2 to "
            f"{bundle.config.context} tokens (half of them are held out)"
        )
    if not 0 <= rows.min() <= rows.max() < bundle.config.vocab:
        raise InputError(
            f"the rows hold token ids {rows.min()}..{rows.max()}, the model's vocabulary is "
            f"0..{bundle.config.vocab - 1}; tokenize the text with this model"
        )
    return rows.astype(np.int32)


@partial(jax.jit, static_argnames=("cfg", "precision"))
@on_any_mesh
def _boundaries(params, tokens, *, cfg, precision):
    """`[L+1, B, T, D]` residual streams."""

    def one(row):
        _, seen = residual_stream(
            params, row, cfg=cfg, capture=("boundaries",), precision=precision
        )
        return seen.boundaries

    return jax.vmap(one, out_axes=1)(tokens)


@partial(jax.jit, static_argnames=("sinks", "slots", "cfg"))
@on_any_mesh
def _look(dictionary, x, seen, row, is_held, *, sinks, slots, cfg):
    """`seen` with a batch of one boundary added, its sinks, and whether slots were too few.

    x: `[B, T, D]`. row: `[B]` numbers of the rows, -1 for padding. is_held: `[B]`.
    """
    B, T, _ = x.shape
    sink = jax.vmap(lambda r: sink_positions(r, T))(x) & sinks
    keep = (~sink & (row >= 0)[:, None]).reshape(-1, 1)
    with jax.named_scope("encode"):
        found = encode(dictionary, x.reshape(B * T, -1), slots=slots, precision=cfg.precision)
    value, feature = jnp.where(keep, found.activation, 0.0), found.index
    limit = dictionary.config.k or dictionary.width
    more = (value[:, -1] > 0).any() & (value.shape[1] < limit)
    place = (row[:, None] * T + jnp.arange(T)[None]).reshape(-1)
    split = jnp.repeat(is_held.astype(jnp.int32), T)
    with jax.named_scope("keep"):
        return add(seen, value, feature, place, split, (B, T), cfg), sink, more


def _made_of(bundle: Bundle, rows: np.ndarray, config: ScanConfig) -> str:
    """The name of a scan: what all of its state depends on."""
    text = repr((bundle.model_hash, bundle.saes_hash, bundle.dtype, rows.shape, config))
    return hashlib.sha256(text.encode() + rows.tobytes()).hexdigest()
