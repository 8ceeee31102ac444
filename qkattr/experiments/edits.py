"""From what a person writes, `23:1441@" Sally":key:23.2,23.7`, to the arrays of `model.edits`.

    edit      B:F@POS:SIDE:HEADS
    B         boundary, which for a QK edit is the block of the heads
    F         feature id; or error, bias, token, position, sink
    POS       as everywhere; or several indices, 5,6; or *, wherever the feature is active
    SIDE      query or key: in that side of the heads' QK circuit only; residual: for all that comes
    HEADS     L.H,L.H or *, all heads of the block; left out for residual

A residual edit adds (scale - 1) times the component to the residual stream itself.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkattr.errors import InputError, quoted, some
from qkattr.kinds import Kind
from qkattr.model.edits import (
    BlockEdits,
    Edits,
    PatternEdits,
    ReadEdits,
    ResidualEdits,
    batched_axes,
)
from qkattr.positions import find_position
from qkattr.sharding import bucket
from qkattr.sources.components import find_slots
from qkattr.subject import Subject

SIDES = ("query", "key", "residual")
#: What F may be besides a feature id.
KINDS = {kind.label: kind for kind in (Kind.ERROR, Kind.BIAS, Kind.TOKEN, Kind.POSITION, Kind.SINK)}
Head = tuple[int, int]

_GRAMMAR = 'B:F@POS:query|key:L.H,L.H or B:F@POS:residual, as in 23:1441@" Sally":key:23.2,23.7'


@dataclasses.dataclass(frozen=True)
class Edit:
    """One component to scale. heads: (block, head) pairs; empty for side "residual"; None: all
    heads of the block."""

    boundary: int
    component: int | str
    position: int | str
    side: str
    heads: tuple[Head, ...] | None = ()


@dataclasses.dataclass(frozen=True, order=True)
class Placed:
    """An edit that was found in a prompt: its component is slot `slot` of `position`."""

    boundary: int
    position: int
    slot: int
    side: str
    heads: tuple[Head, ...]


def parse_edit(text: str) -> Edit:
    """An `Edit` from `B:F@POS:SIDE:HEADS`.

    Raises:
      InputError: it does not read as one.
    """
    wrong = InputError(f"edit {quoted(text, 80)} cannot be read; write {_GRAMMAR}")
    boundary, colon, rest = text.partition(":")
    component, at, rest = rest.partition("@")
    if not (colon and at and _is_index(boundary)):
        raise wrong
    component = component.strip()
    if not _is_index(component) and component not in KINDS:
        raise wrong
    if rest.endswith(":residual"):
        position, side, heads = rest.removesuffix(":residual"), "residual", ()
    else:
        parts = rest.rsplit(":", 2)
        if len(parts) != 3 or parts[1] not in SIDES[:2]:
            raise wrong
        position, side, named = parts
        heads = None if named.strip() == "*" else parse_heads(named)
    feature = int(component) if _is_index(component) else component
    return Edit(int(boundary), feature, position.strip('"'), side, heads)


def parse_heads(text: str) -> tuple[Head, ...]:
    """`L.H,L.H` as pairs.

    Raises:
      InputError: it does not read so, or names no head.
    """
    found = []
    for part in text.split(","):
        if not re.fullmatch(r"\s*[0-9]{1,5}\.[0-9]{1,5}\s*", part):
            raise InputError(
                f"heads {quoted(text)} cannot be read; write block.head, as in 23.2,23.7"
            )
        layer, head = part.split(".")
        found.append((int(layer), int(head)))
    return tuple(found)


def _is_index(text: str) -> bool:
    return bool(re.fullmatch(r"\s*[0-9]{1,9}\s*", text))


def check_heads(heads: Iterable[Head], shape: tuple[int, int]) -> None:
    """Raises InputError for a head that the model does not have."""
    for layer, head in heads:
        if not (0 <= layer < shape[0] and 0 <= head < shape[1]):
            raise InputError(
                f"head {layer}.{head} does not exist: the model has blocks 0..{shape[0] - 1} "
                f"of heads 0..{shape[1] - 1}; give one of these"
            )


def check_edit(edit: Edit, shape: tuple[int, int], widths: Sequence[int | None]) -> Edit:
    """The edit with all its heads named, if it fits the model: n_blocks and n_heads, and the width
    of each boundary's dictionary (None: it has none).

    Raises:
      InputError: it does not fit.
    """
    n_blocks, n_heads = shape
    if edit.side not in SIDES:
        raise InputError(f"side {quoted(str(edit.side))} is not known; give query, key or residual")
    top = n_blocks if edit.side == "residual" else n_blocks - 1
    if not 0 <= edit.boundary <= top:
        raise InputError(
            f"boundary {edit.boundary} is out of range for a {edit.side} edit: the model has "
            f"0..{top}; give one of these"
        )
    if isinstance(edit.component, str):
        if edit.component not in KINDS:
            raise InputError(
                f"component {quoted(edit.component)} is not known; "
                f"give a feature id or one of {', '.join(KINDS)}"
            )
    elif (width := widths[edit.boundary]) is None:
        raise InputError(
            f"boundary {edit.boundary} has no SAE, so no feature {edit.component}; "
            f"give one of {', '.join(KINDS)}"
        )
    elif not 0 <= edit.component < width:
        raise InputError(
            f"feature {edit.component} does not exist: the SAE at boundary {edit.boundary} has "
            f"features 0..{width - 1}; give one of these"
        )
    if edit.side == "residual":
        if edit.heads:
            raise InputError(
                "a residual edit takes no heads, because all heads read it; leave the heads out"
            )
        return dataclasses.replace(edit, heads=())
    heads = edit.heads
    if heads is None:
        heads = tuple((edit.boundary, head) for head in range(n_heads))
    if not heads:
        raise InputError(f"a {edit.side} edit needs at least one head; give L.H, or * for all")
    check_heads(heads, shape)
    for layer, head in heads:
        if layer != edit.boundary:
            raise InputError(
                f"head {layer}.{head} reads boundary {layer}, and the edited component lies at "
                f"boundary {edit.boundary}; give heads of block {edit.boundary}"
            )
    return dataclasses.replace(edit, heads=heads)


def fit_edits(subject: Subject, edits: Sequence[Edit]) -> list[tuple[Edit, list[int]]]:
    """Every edit with all its heads named, and the positions that it names.

    Raises:
      InputError: an edit does not fit the model or the prompt.
    """
    bundle, shape = subject.bundle, subject.facts.head_grid
    widths = [None if d is None else d.width for d in bundle.dictionaries or ()]
    widths = widths or [None] * (bundle.config.n_blocks + 1)
    fitted = [check_edit(edit, shape, widths) for edit in edits]
    return [(edit, edit_positions(subject.tokens, edit.position)) for edit in fitted]


def place_edits(subject: Subject, edits: Sequence[Edit]) -> list[Placed]:
    """Find every edit's component among those active in the prompt; edits of one component merge.

    Raises:
      InputError: an edit does not fit the model, or its component is not active there.
    """
    merged: dict[tuple[int, int, int, str], set[Head]] = {}
    for edit, positions in fit_edits(subject, edits):
        if isinstance(edit.component, str):
            wanted = KINDS[edit.component], None
        else:
            wanted = Kind.FEATURE, edit.component
        slots = find_slots(subject.components, edit.boundary, np.array(positions), *wanted)
        if (slots < 0).all():
            raise InputError(_not_active(subject, edit, positions))
        for position, slot in zip(positions, slots.tolist(), strict=True):
            if slot >= 0:
                key = (edit.boundary, position, slot, edit.side)
                merged.setdefault(key, set()).update(edit.heads or ())
    return [Placed(*key, heads=tuple(sorted(heads))) for key, heads in sorted(merged.items())]


def edit_positions(tokens: list[str], where: int | str) -> list[int]:
    """The positions that an edit names: one, several indices, or `*`: all."""
    text = str(where)
    if text.strip() == "*":
        return list(range(len(tokens)))
    if re.fullmatch(r"\s*-?[0-9]{1,9}(\s*,\s*-?[0-9]{1,9})+\s*", text):
        return [find_position(tokens, part) for part in text.split(",")]
    return [find_position(tokens, where)]


def _not_active(subject: Subject, edit: Edit, positions: list[int]) -> str:
    b = edit.boundary
    name = edit.component if isinstance(edit.component, str) else f"feature {b}:{edit.component}"
    where = [f"{quoted(subject.tokens[t])} {t}" for t in positions]
    if len(positions) > 1:
        return (
            f"{name} is active at none of {len(positions)} positions of boundary {b} "
            f"({some(where, 8)}); give one that is, or another position"
        )
    kind, index = (
        np.asarray(a[b, positions[0]]) for a in (subject.components.kind, subject.components.index)
    )
    active = some([str(i) for i in index[kind == Kind.FEATURE]], 8) or "none"
    sink = (kind == Kind.SINK).any()
    has = "it is a sink, one component" if sink else f"active features there are {active}"
    return f"{name} is not active at {where[0]} of boundary {b}: {has}; give one that is"


def describe(subject: Subject, placed: Placed) -> dict[str, Any]:
    """A placed edit as a plain object."""
    row = subject.table(placed.boundary).row(placed.position, placed.slot)
    return dict(
        boundary=placed.boundary,
        kind=row["kind"],
        index=row["index"],
        activation=row["activation"],
        label=row["label"] if row["kind"] == Kind.FEATURE.label else "",
        position=placed.position,
        token=subject.tokens[placed.position],
        side=placed.side,
        heads=[f"{layer}.{head}" for layer, head in placed.heads],
    )


def head_mask(heads: Iterable[Head], shape: tuple[int, int]) -> np.ndarray:
    """`[L, N]`: which heads are among these."""
    mask = np.zeros(shape, bool)
    for layer, head in heads:
        mask[layer, head] = True
    return mask


def edited_heads(placed: Sequence[Placed], shape: tuple[int, int]) -> np.ndarray:
    """`[L, N]`: which heads have a QK edit."""
    return head_mask((head for edit in placed for head in edit.heads), shape)


def build_edits(subject: Subject, placed: Sequence[Placed], *, live_scales: bool = False) -> Edits:
    """The arrays of `model.edits`, at scale 0 wherever something is edited: see `at_scales`."""
    shape = subject.bundle.config.head_grid
    sides = {side: [edit for edit in placed if edit.side == side] for side in SIDES}
    read = {
        side: _read_edits(subject, edits, shape) if edits else None
        for side, edits in sides.items()
        if side != "residual"
    }
    return Edits(
        residual=_residual_edits(subject, sides["residual"]) if sides["residual"] else None,
        blocks=BlockEdits(query=read["query"], key=read["key"], live_scales=live_scales),
    )


def _read_edits(subject: Subject, edits: list[Placed], shape: tuple[int, int]) -> ReadEdits:
    (n_blocks, n_heads), blocks = shape, [edit.boundary for edit in edits]
    n_rows = bucket(int(np.bincount(blocks).max()), smallest=1)
    position, slot = np.zeros((2, n_blocks, n_rows), np.int32)
    scale = np.ones((n_blocks, n_rows), np.float32)
    heads = np.zeros((n_blocks, n_rows, n_heads), bool)
    used = [0] * n_blocks
    for edit in edits:
        at = edit.boundary, used[edit.boundary]
        used[edit.boundary] += 1
        position[at], slot[at], scale[at] = edit.position, edit.slot, 0.0
        heads[at] = head_mask(edit.heads, shape)[edit.boundary]
    boundary = np.broadcast_to(np.arange(n_blocks)[:, None], position.shape)
    return ReadEdits(
        position_E=jnp.asarray(position),
        vector_ED=vectors_at(subject.components, boundary, position, slot),
        scale_E=jnp.asarray(scale),
        heads_EN=jnp.asarray(heads),
    )


def _residual_edits(subject: Subject, edits: list[Placed]) -> ResidualEdits:
    padding = bucket(len(edits), smallest=1) - len(edits)
    columns = np.array([(e.boundary, e.position, e.slot) for e in edits]).T
    boundary, position, slot = np.pad(columns, ((0, 0), (0, padding)), constant_values=0)
    vectors = vectors_at(subject.components, boundary, position, slot)
    boundary = np.where(np.arange(len(boundary)) < len(edits), boundary, -1)
    return ResidualEdits(jnp.asarray(boundary), jnp.asarray(position), -vectors)


@jax.jit
def vectors_at(components, boundary, position, slot):
    """The vectors of some slots, which may be of any shape."""
    return components.at(position, slot, boundary)


def at_scales(edits: Edits, scales: Sequence[float]) -> Edits:
    """A batch of edits: what was at scale 0 takes each of the scales; ablated heads are at all."""
    factor = jnp.asarray(scales, jnp.float32)

    def scaled(read: ReadEdits | None) -> ReadEdits | None:
        if read is None:
            return None
        at = jnp.where(read.scale_E == 0, factor[:, None, None], 1.0)
        return dataclasses.replace(read, scale_E=at)

    residual = edits.residual
    if residual is not None:
        delta = residual.delta_ED * (1 - factor)[:, None, None]
        residual = dataclasses.replace(residual, delta_ED=delta)
    blocks, ablated = edits.blocks, edits.blocks.head_scale_TN
    if ablated is not None:
        ablated = jnp.broadcast_to(ablated, (len(factor), *ablated.shape))
    blocks = dataclasses.replace(
        blocks, query=scaled(blocks.query), key=scaled(blocks.key), head_scale_TN=ablated
    )
    return Edits(residual=residual, blocks=blocks)


def join_batches(batches: Sequence[Edits]) -> Edits:
    """Several batches of edits as one, one after the other. What is equal in all of them stays
    without a batch axis, so that it is computed once."""
    axes = batched_axes(batches[0])
    sizes = jax.tree.map(lambda leaf, axis: None if axis is None else len(leaf), batches[0], axes)
    size = jax.tree.leaves(sizes)[0]

    def join(leaf, axis, *others):
        leaves = [leaf, *others]
        if axis == 0:
            return jnp.concatenate(leaves)
        if all(other is leaf or bool(jnp.array_equal(other, leaf)) for other in others):
            return leaf
        return jnp.concatenate([jnp.broadcast_to(part, (size, *part.shape)) for part in leaves])

    return jax.tree.map(join, batches[0], axes, *batches[1:])


def freeze_others(edits: Edits, patterns: jax.Array, live: np.ndarray) -> Edits:
    """The same edits with the patterns of all heads but the live ones `[..., L, N]` held at those
    given.

    patterns: `[L, N, T, S]` of the clean run.
    """
    rows = jnp.broadcast_to(~jnp.asarray(live)[..., None], (*live.shape, patterns.shape[2]))
    held = PatternEdits(pattern_NTS=patterns, rows_NT=rows)
    return dataclasses.replace(edits, blocks=dataclasses.replace(edits.blocks, patterns=held))


def ablate(edits: Edits, heads: np.ndarray, n_positions: int) -> Edits:
    """The same edits with the output of heads `[..., L, N]` set to zero at every position."""
    scale = jnp.asarray(~heads, jnp.float32)[..., None, :]
    scale = jnp.broadcast_to(scale, (*scale.shape[:-2], n_positions, scale.shape[-1]))
    return dataclasses.replace(edits, blocks=dataclasses.replace(edits.blocks, head_scale_TN=scale))
