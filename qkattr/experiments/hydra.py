"""The hydra effect: how many heads it takes, with the others frozen and with them live.

For heads in a given order and the edits that go with them, the first n heads are edited for every n
at once (nested masks, one batched call). The prediction flips at the least n whose top token is not
the clean run's. With the other heads live, later ones look where the edited ones no longer do;
which ones, and by how much, is the compensation. Axes: B numbers of heads, L block, N heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qkattr.errors import InputError
from qkattr.experiments.edits import Edit, Head, at_scales, freeze_others, head_mask
from qkattr.experiments.runs import clean_top, run_edits
from qkattr.experiments.steer import make_edits, patterns_of
from qkattr.model.edits import Edits
from qkattr.result import ranked_heads
from qkattr.subject import Subject


@dataclasses.dataclass(frozen=True)
class Hydra:
    """One edit, ever more heads. counts: how many of `heads` were edited.

    live, frozen: per count, `p` (probability of the clean run's top token), `token` (the top one),
    and `flip`, the least count at which the top token changed (None: at none). compensation: with
    the others live and all heads edited, the unedited heads whose attention to the key rose most.
    """

    token: str
    scale: float
    heads: list[str]
    counts: list[int]
    live: dict[str, Any]
    frozen: dict[str, Any]
    compensation: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """A plain object."""
        return dataclasses.asdict(self)


def hydra(
    subject: Subject,
    heads: Sequence[Head],
    edits: Sequence[Edit],
    *,
    query: int,
    key: int,
    scale: float = 0.0,
    counts: Sequence[int] | None = None,
    live_scales: bool = False,
    ablated: Sequence[Head] = (),
) -> Hydra:
    """Make the edits in the first n heads, for n = 0 to all, with the others live and frozen.

    live_scales, ablated: as in `steer`; heads are ablated at every count, 0 included.

    Raises:
      InputError: an edit cannot be made, or goes through no head.
    """
    if any(edit.side == "residual" for edit in edits):
        raise InputError(
            "hydra counts the heads that an edit goes through, and "
            "a residual edit goes through none; leave it out"
        )
    shape = subject.bundle.config.head_grid
    counts = list(range(len(heads) + 1)) if counts is None else list(counts)
    masks = np.stack([head_mask(heads[:n], shape) for n in counts])
    arrays, _, _ = make_edits(subject, edits, live_scales=live_scales, ablated=ablated)
    nested = with_heads(at_scales(arrays, [scale]), masks)
    clean = patterns_of(subject)
    top, _ = clean_top(subject)
    live = run_edits(subject, nested, queries=[query])
    held = freeze_others(nested, clean, masks)
    frozen = run_edits(subject, held, queries=[query])
    before = np.asarray(clean[:, :, query, key])
    rise = live.patterns[-1, :, :, 0, key] - before
    rise[masks[-1] | head_mask(ablated, shape)] = 0
    return Hydra(
        token=subject.bundle.token(top),
        scale=float(scale),
        heads=[f"{layer}.{head}" for layer, head in heads],
        counts=counts,
        live=_fate(subject, live, top, counts),
        frozen=_fate(subject, frozen, top, counts),
        compensation=[
            dict(
                head=f"{layer}.{head}",
                before=float(before[layer, head]),
                rise=float(rise[layer, head]),
            )
            for layer, head in ranked_heads(np.asarray(rise), 10)
            if rise[layer, head] > 1e-4
        ],
    )


def with_heads(edits: Edits, masks: np.ndarray) -> Edits:
    """A batch of the same edits, each in those of their heads that its mask `[B, L, N]` has.

    edits: a batch of one scale. Heads that are ablated stay so.
    """
    allowed = jnp.asarray(masks)[:, :, None]
    read = {
        side: value
        if value is None
        else dataclasses.replace(
            value, scale_E=value.scale_E[0], heads_EN=value.heads_EN[None] & allowed
        )
        for side, value in (("query", edits.blocks.query), ("key", edits.blocks.key))
    }
    ablated = edits.blocks.head_scale_TN
    ablated = None if ablated is None else ablated[0]
    blocks = dataclasses.replace(edits.blocks, head_scale_TN=ablated, **read)
    return dataclasses.replace(edits, blocks=blocks)


def _fate(subject: Subject, runs, top: int, counts: list[int]) -> dict[str, Any]:
    log_p = runs.log_p
    best = log_p.argmax(-1)
    flipped = [n for n, token in zip(counts, best, strict=True) if token != top]
    return dict(
        p=np.exp(log_p[:, top]).tolist(),
        token=[subject.bundle.token(int(token)) for token in best],
        flip=min(flipped, default=None),
    )


def greedy_heads(
    subject: Subject,
    candidates: Sequence[Head],
    edits: Sequence[Edit],
    *,
    n: int,
    scale: float = 0.0,
    frozen: bool = False,
) -> list[Head]:
    """The heads whose edits lower the clean top token's log probability most, added one by one.

    edits: of all candidates; each is made in the chosen heads only. Every step tries all candidates
    that are left, in one batched call.
    """
    shape = subject.bundle.config.head_grid
    arrays, _, _ = make_edits(subject, edits)
    top, _ = clean_top(subject)
    clean = patterns_of(subject) if frozen else None
    at_one = at_scales(arrays, [scale])
    chosen: list[Head] = []
    left = list(candidates)
    while left and len(chosen) < n:
        # Padded with what is chosen already, so that every step runs the same compiled program.
        tried = [head_mask([*chosen, head], shape) for head in left]
        tried += [head_mask(chosen, shape)] * (len(candidates) - len(left))
        masks = np.stack(tried)
        batch = with_heads(at_one, masks)
        if clean is not None:
            batch = freeze_others(batch, clean, masks)
        log_p = run_edits(subject, batch, queries=[0]).log_p[: len(left), top]
        chosen.append(left.pop(int(log_p.argmin())))
    return chosen
