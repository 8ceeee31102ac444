"""`steer`: scale components inside the QK circuit of chosen heads, and see what the model says.

    q . k  ->  (q + (scale - 1) dq) . (k + (scale - 1) dk)     per scale, in one batched jitted call

(paper, "Examples"). Values are untouched: only where the heads look changes, and what follows from
it. Other heads' patterns are live, or frozen at the clean run: the difference is what later heads
do to make up for it (the hydra effect). Exact: it is the model's own forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qkattr.errors import InputError
from qkattr.experiments.control import DRAWS, draw_controls, summarise
from qkattr.experiments.edits import (
    Edit,
    Head,
    ablate,
    at_scales,
    build_edits,
    check_heads,
    describe,
    edited_heads,
    fit_edits,
    freeze_others,
    head_mask,
    join_batches,
    parse_edit,
    place_edits,
)
from qkattr.experiments.readings import (
    by_text,
    followed,
    followed_keys,
    likeliest,
    rose,
    rows,
)
from qkattr.experiments.runs import (
    check_finite,
    clean_patterns,
    log_softmax,
    run_edits,
    split_runs,
)
from qkattr.extras import need
from qkattr.model.edits import Edits
from qkattr.subject import HasSubject, Subject, enter

#: The scales of the paper's figures.
SCALES = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
#: The largest number of random controls.
MOST_DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class Steering:
    """What became of the prediction at every scale. Lists run along `scales`.

    top: the likeliest next tokens. tracked: probability of each tracked token, by its text. kl:
    KL(clean || edited) of the next token, in nats. query: the row of `patterns` and `scores`, which
    are those of the edited heads, by "L.H". keys: the positions whose attention is followed: those
    of key-side edits; without them the one that the edited or ablated heads look at most, clean;
    without such heads those of residual edits. rose: unedited heads whose attention to the keys
    changed most, at the scale furthest from 1. edits: what was scaled. share_of_heads: edited or
    ablated ones among all of the model. control: median and range over random controls, see
    `experiments.control`; or only the `reason` why there are none; None: none was asked for.
    """

    tokens: list[str]
    scales: list[float]
    clean: list[dict[str, Any]]
    top: list[list[dict[str, Any]]]
    tracked: dict[str, list[float]]
    kl: list[float]
    query: int
    keys: list[int]
    patterns: list[dict[str, list[float]]]
    scores: list[dict[str, list[float]]]
    rose: list[dict[str, Any]]
    edits: list[dict[str, Any]]
    ablated: list[str]
    n_heads: int
    share_of_heads: float
    freeze_others: bool
    live_scales: bool
    control: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain object."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to_pandas(self):
        """A DataFrame: one row for each scale and tracked token, with its probability and, where
        there is a control, its median and range there.

        Raises:
          InputError: pandas is not installed.
        """
        rows = [
            dict(scale=scale, token=token, probability=probability[i], kl=self.kl[i])
            | self._control(token, i)
            for token, probability in self.tracked.items()
            for i, scale in enumerate(self.scales)
        ]
        return need("pandas", "to_pandas needs").DataFrame(rows)

    def _control(self, token: str, i: int) -> dict[str, float]:
        tracked = (self.control or {}).get("tracked")
        spread = tracked[token] if tracked else {}
        return {f"control_{name}": values[i] for name, values in spread.items()}


def steer(
    subject: HasSubject,
    edits: Sequence[str | Edit],
    *,
    scales: Sequence[float] = SCALES,
    freeze_others: bool = False,
    live_scales: bool = False,
    ablate: Sequence[Head] = (),
    track: Sequence[str | int] = (),
    query: int | str = -1,
    draws: int = DRAWS,
    seed: int = 0,
) -> Steering:
    """Scale components in what chosen heads read, at every scale in one call.

    Args:
      subject: a subject or a result.
      edits: `"23:1441@6:key:23.2,23.7"`, or `Edit` (see `qkattr.experiments.edits`).
      scales: what the components are multiplied by; 1 changes nothing, 0 removes.
      freeze_others: hold the patterns of all unedited heads at the clean run's.
      live_scales: normalise an edited read by its own norm scale, not by the unedited one's.
      ablate: heads whose output is zero at every scale.
      track: tokens (text or ids) to follow; with them go the likeliest at every scale.
      query: the position whose pattern is returned.
      draws: random controls to run beside the edits, each other features matched in size; 0: none.
      seed: of the draws.

    Raises:
      InputError: an edit, a head, a scale or a token cannot be used.
    """
    subject = enter(subject)
    scales, draws = check_scales(scales), check_draws(draws)
    parsed = [parse_edit(edit) if isinstance(edit, str) else edit for edit in edits]
    if not parsed and not ablate:
        raise InputError("nothing to edit; give at least one edit, or a head to ablate")
    followed_ids, row = check_asked(subject, parsed, ablate, track, query)
    subject.begin("edited runs")
    return steer_subject(
        subject,
        parsed,
        scales=scales,
        frozen=freeze_others,
        live_scales=live_scales,
        ablated=tuple(ablate),
        track=followed_ids,
        query=row,
        draws=draws,
        seed=seed,
    )


def check_asked(
    subject: Subject,
    edits: Sequence[Edit],
    ablate: Sequence[Head],
    track: Sequence[str | int],
    query: int | str,
) -> tuple[list[int], int]:
    """Ids of the tracked tokens and the query position, when all that `steer` is asked fits the
    model and the prompt's tokens. Reads no weights.

    Raises:
      InputError: something does not fit.
    """
    fit_edits(subject, edits)
    check_heads(ablate, subject.facts.head_grid)
    return [subject.bundle.token_id(token) for token in track], subject.position(query)


def check_scales(scales: Sequence[float]) -> list[float]:
    """The scales as floats.

    Raises:
      InputError: there are none, or one is not a finite number in float32.
    """
    if not len(scales):
        raise InputError("there are no scales; give at least one, as in -1,0,1,2")
    for scale in scales:
        if not abs(scale) <= float(np.finfo(np.float32).max):
            raise InputError(
                f"scale {scale} is not a finite number in float32; give one, as in -1,0,1,2"
            )
    return [float(scale) for scale in scales]


def check_draws(draws: int) -> int:
    """The number of random controls.

    Raises:
      InputError: it is negative, or more than `MOST_DRAWS`.
    """
    if not 0 <= draws <= MOST_DRAWS:
        raise InputError(f"draws is {draws}, expected 0 to {MOST_DRAWS}; give another number")
    return draws


def make_edits(
    subject: Subject,
    edits: Sequence[Edit],
    *,
    held: Float[Array, "L N T S"] | None = None,
    live_scales: bool = False,
    ablated: Sequence[Head] = (),
) -> tuple[Edits, np.ndarray, list]:
    """The arrays of some edits, which heads `[L, N]` they reach, and where they were placed.

    held: patterns of the heads that they do not reach (None: live).
    """
    check_heads(ablated, subject.bundle.config.head_grid)
    placed = place_edits(subject, edits)
    return *_arrays(subject, placed, held, live_scales, ablated), placed


def _arrays(subject: Subject, placed, held, live_scales: bool, ablated) -> tuple[Edits, np.ndarray]:
    shape = subject.bundle.config.head_grid
    arrays = build_edits(subject, placed, live_scales=live_scales)
    reached = edited_heads(placed, shape)
    if held is not None:
        arrays = freeze_others(arrays, held, reached)
    if ablated:
        arrays = ablate(arrays, head_mask(ablated, shape), subject.boundaries.shape[1])
    return arrays, reached


def patterns_of(subject: Subject) -> Float[Array, "L N T S"]:
    """`[L, N, T, S]` of the clean run, padded."""
    return clean_patterns(
        subject.bundle.params,
        jnp.asarray(subject.padded),
        cfg=subject.bundle.config,
        precision=subject.precision,
    )


def steer_subject(
    subject: Subject,
    edits: Sequence[Edit],
    *,
    scales: list[float],
    frozen: bool,
    live_scales: bool,
    ablated: tuple[Head, ...],
    track: list[int],
    query: int,
    draws: int = 0,
    seed: int = 0,
) -> Steering:
    """`steer` of a subject, everything checked."""
    before = patterns_of(subject)
    held = before if frozen else None
    arrays, reached, placed = make_edits(
        subject, edits, held=held, live_scales=live_scales, ablated=ablated
    )
    found = draw_controls(subject, placed, ablated, draws=draws, seed=seed) if draws else []
    drawn = found if isinstance(found, list) else []
    batch = [arrays]
    for draw in drawn:
        batch.append(_arrays(subject, draw.placed, held, live_scales, draw.ablated)[0])
    together = join_batches([at_scales(each, scales) for each in batch])
    every = split_runs(run_edits(subject, together, queries=[query]), len(batch))
    for each, part in zip(batch, every, strict=True):
        check_finite(part, each, scales)
    runs = every[0]
    attended, shown = runs.patterns[..., 0, :], np.argwhere(reached)
    changed = reached | head_mask(ablated, reached.shape)
    log_p, clean = runs.log_p, log_softmax(subject.logits)
    tokens = followed(log_p, clean, track)
    looked = np.asarray(before[:, :, query])
    keys = followed_keys(placed, looked[changed])
    control = dict(reason=found) if isinstance(found, str) else None
    if drawn:
        beside = np.stack([part.log_p for part in every[1:]])
        names = dict(zip(by_text(subject, tokens, log_p), tokens, strict=True))
        control = summarise(subject, drawn, beside, clean, names, seed)
    return Steering(
        tokens=subject.tokens,
        scales=scales,
        clean=likeliest(subject, clean),
        top=[likeliest(subject, row) for row in log_p],
        tracked=by_text(subject, tokens, np.exp(log_p)),
        kl=np.maximum((np.exp(clean) * (clean - log_p)).sum(-1), 0.0).tolist(),
        query=query,
        keys=keys,
        patterns=[rows(row, shown) for row in attended],
        scores=[rows(row[..., : query + 1], shown) for row in runs.scores[..., 0, :]],
        rose=rose(looked, np.asarray(attended), scales, changed, keys),
        edits=[describe(subject, edit) for edit in placed],
        ablated=[f"{layer}.{head}" for layer, head in ablated],
        n_heads=int(changed.sum()),
        share_of_heads=float(changed.mean()),
        freeze_others=frozen,
        live_scales=live_scales,
        control=control,
    )
