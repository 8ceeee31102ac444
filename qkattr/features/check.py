"""How well the SAEs fit the model on a text: a wrong SAE, hook or normalisation shows here first.

Per boundary, over positions that are not sinks: L0 (features active at a position), unexplained
variance |x - x^|^2 / |x - mean|^2, median relative error |x - x^| / |x|, features that never
fire on the text, and

    loss recovered = (L_mean - L_sae) / (L_mean - L_clean)

with L the next-token loss in nats, clean, with the reconstruction in place of the residual stream,
and with its mean. Where the mean raises the loss by less than `HURTS`, there is nothing to recover:
the ratio is undefined there (None) and says nothing about the SAE.

All of this holds for the text that was read, not for the SAE in general: a set that recovers 0.9 of
the loss on prose may recover 0.6 on source code. An SAE that recovers less than `fits` is said not
to fit this text.

Neighbouring boundaries are alike and SAEs are robust, so that with a wrong hook or scale these
figures can look well. Therefore an SAE is also tried at the boundaries beside its own, with its
input doubled and halved, and with `b_dec` subtracted or not, the other way round: nothing of this
may fit better. Its L0 is compared with the one that its makers name.
Axes: B rows of the text, T position, D d_model, M dictionary width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkattr.errors import InputError
from qkattr.load.bundle import Bundle
from qkattr.model.transformer import forward, run_from, unembed
from qkattr.sources.components import sink_positions
from qkattr.sources.dictionary import Dictionary, reconstruct

#: Tokens of one row of the text.
ROW = 128

#: Rows in memory at a time.
AT_ONCE = 8

#: An SAE that recovers less of the loss than this does not fit the text; what a graph says there
#: rests on error nodes.
FITS = 0.8

#: Below this, another text is no longer the likeliest reason.
POOR = 0.5

#: Nats by which the mean in place of the stream must raise the loss for a share of it to mean
#: anything.
HURTS = 0.05

#: An SAE that leaves less than this share of what it leaves, when it is used otherwise, is flagged.
#: Of the 30 SAEs for SmolLM2 none leaves less than 0.90; of 13 put one boundary off, and of those
#: with a doubled input or b_dec left in, none more than 0.81.
OTHERWISE = 0.85

#: A measured L0 this many times the makers' own, or less than one part in so many, is flagged.
L0_OFF = 2.0


@dataclasses.dataclass(frozen=True)
class BoundaryCheck:
    """One boundary's figures. dead: features that never fired on this text, of `width`.
    l0_release: what its makers say (None: nothing). otherwise: unexplained variance on the text's
    first rows as it is used, and in other ways. loss, loss_mean: with the reconstruction and with
    the mean in place of the stream. loss_recovered: None where the mean does not hurt. verdict:
    "ok", "does not fit this text: ...", or "used wrongly? ..."."""

    boundary: int
    l0: float
    l0_release: float | None
    otherwise: dict[str, float]
    unexplained_variance: float
    median_relative_error: float
    dead: int
    width: int
    loss: float
    loss_mean: float
    loss_recovered: float | None
    verdict: str


def check_saes(
    bundle: Bundle,
    rows: Sequence[Sequence[int]] | np.ndarray,
    *,
    text: str = "the rows given",
    fits: float = FITS,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Check every boundary's SAE on rows of token ids (BOS included), all of one length.

    A few rows are in memory at a time; the model runs twice over them, once for the means.

    Args:
      text: what the report calls the text.
      fits: an SAE that recovers less of the loss than this does not fit the text.

    Raises:
      InputError: the bundle has no SAEs, the text is too short to say anything, or `fits` is not
        between 0 and 1.
    """
    if not 0 <= fits <= 1:
        raise InputError(f"fits is {fits:g}, expected a share of the loss from 0 to 1; give 0.8")
    if bundle.dictionaries is None:
        raise InputError("nothing to check: the bundle was loaded without SAEs")
    tokens = np.array(rows, np.int32)
    if tokens.ndim != 2 or tokens.shape[1] < 16:
        raise InputError(
            f"the text has rows of {tokens.shape[-1]} tokens; give at least 16 tokens of text"
        )
    pieces = [jnp.asarray(tokens[i : i + AT_ONCE]) for i in range(0, len(tokens), AT_ONCE)]
    progress("clean run")
    survey = [_survey(bundle.params, piece, cfg=bundle.config) for piece in pieces]
    clean, total, count = (sum(part) for part in zip(*jax.device_get(survey), strict=True))
    mean = total / np.maximum(count, 1)[:, None]
    sums: dict[int, list[dict[str, np.ndarray]]] = {}
    for i, piece in enumerate(pieces):
        stream, _ = _clean(bundle.params, piece, cfg=bundle.config)
        for b, dictionary in enumerate(bundle.dictionaries):
            if dictionary is None:
                continue
            progress(f"rows {i * AT_ONCE + 1}..{i * AT_ONCE + len(piece)}, boundary {b}")
            fit = _fit(
                bundle.params, dictionary, stream[:, b], piece, b, mean[b], cfg=bundle.config
            )
            if i == 0:
                fit |= dict(otherwise=_otherwise(dictionary, stream, mean, b))
            sums.setdefault(b, []).append(jax.device_get(fit))
    checks = [
        _summarise(b, bundle.dictionaries[b], parts, len(tokens), float(clean) / len(tokens), fits)
        for b, parts in sorted(sums.items())
    ]
    return dict(
        text=text,
        rows=len(tokens),
        tokens=int(tokens.size),
        fits=fits,
        clean_loss=float(clean) / len(tokens),
        boundaries=[dataclasses.asdict(c) for c in checks],
    )


def _summarise(b: int, dictionary: Dictionary | None, parts, rows: int, clean: float, fits: float):
    """A boundary's figures from the sums over all pieces of the text."""
    assert dictionary is not None  # boundaries without one have no sums
    summed = {k: sum(np.asarray(part[k], np.float64) for part in parts) for k in _SUMS}
    relative = np.concatenate([part["relative"] for part in parts])
    kept = np.maximum(summed["kept"], 1)
    figures: dict[str, Any] = dict(
        l0=float(summed["l0"] / kept),
        unexplained_variance=float(summed["error"] / np.maximum(summed["variance"], 1e-30)),
        median_relative_error=float(np.nanmedian(relative)),
        dead=int(np.sum(summed["fired"] == 0)),
        l0_release=_release_l0(dictionary),
        otherwise=parts[0]["otherwise"],
        loss=float(summed["loss_sae"] / rows),
        loss_mean=float(summed["loss_mean"] / rows),
    )
    figures["loss_recovered"] = recovered(clean, figures["loss"], figures["loss_mean"])
    verdict = _verdict(dictionary, figures, fits)
    return BoundaryCheck(boundary=b, width=dictionary.width, verdict=verdict, **figures)


def recovered(clean: float, with_sae: float, with_mean: float) -> float | None:
    """The share of the loss that an SAE recovers; None where the mean costs less than `HURTS`."""
    if not with_mean - clean >= HURTS:
        return None
    return (with_mean - with_sae) / (with_mean - clean)


def _release_l0(dictionary: Dictionary) -> float | None:
    said = dictionary.config.k if dictionary.l0 is None else dictionary.l0
    return None if said is None else float(said)


def _otherwise(dictionary: Dictionary, stream, mean, b: int) -> dict[str, float]:
    """Unexplained variance as the SAE is used ("") and in other ways, by what they are."""
    config, factor = dictionary.config, 1.0 if dictionary.factor is None else dictionary.factor
    subtracts = dataclasses.replace(config, subtract_b_dec=not config.subtract_b_dec)
    ways = {
        "": (b, factor, config),
        **{f"at boundary {n}": (n, factor, config) for n in (b - 1, b + 1) if 0 <= n < len(mean)},
        "with its input doubled": (b, 2 * factor, config),
        "with its input halved": (b, factor / 2, config),
        f"with b_dec {'not ' * config.subtract_b_dec}subtracted": (b, factor, subtracts),
    }
    return {
        way: float(
            _unexplained(
                dataclasses.replace(dictionary, factor=np.float32(scale), config=how),
                stream[:, n],
                mean[n],
            )
        )
        for way, (n, scale, how) in ways.items()
    }


def _verdict(dictionary: Dictionary, figures: dict[str, Any], fits: float) -> str:
    """ "ok", or what is wrong and what it may come from."""
    l0, said = figures["l0"], figures["l0_release"]
    wrong = [text for text in [_misfit(dictionary, figures, fits)] if text]
    used, *others = figures["otherwise"].items()
    way, least = min(others, key=lambda item: item[1])
    if least < OTHERWISE * used[1]:
        wrong.append(
            f"used wrongly? unexplained variance is {least:.2f} {way}, and {used[1]:.2f} as "
            "configured: wrong hook or wrong normalisation?"
        )
    if said is not None and not said / L0_OFF <= l0 <= said * L0_OFF:
        wrong.append(
            f"used wrongly? {l0:.1f} features fire at a position, and its makers say {said:.0f}: "
            "wrong normalisation or threshold?"
        )
    return "; ".join(wrong) or "ok"


def _misfit(dictionary: Dictionary, figures: dict[str, Any], fits: float) -> str:
    """Why the SAE does not fit the text; "" where it does. A loss recovered that is undefined has
    no say in it."""
    unexplained, share = figures["unexplained_variance"], figures["loss_recovered"]
    said = []
    if share is not None and not share >= fits:
        said.append(f"loss recovered {share:.2f}")
    if not unexplained < 1:
        said.append(f"unexplained variance {unexplained:.2f}")
    if not said:
        return ""
    if figures["l0"] > dictionary.width / 10:
        said.append(f"{figures['l0']:.0f} features fire at a position")
    poor = not unexplained < 1 or (share is not None and not share >= POOR)
    asked = ": wrong SAE, wrong hook or wrong normalisation?" if poor else ""
    return f"does not fit this text: {', '.join(said)}{asked}"


@partial(jax.jit, static_argnames=("cfg",))
def _clean(params, tokens, *, cfg):
    """The stream at every boundary, `[R, L+1, T, D]`, and the sum of the rows' losses."""

    def one(row):
        logits, trace = forward(params, row, cfg=cfg, capture=("boundaries",))
        return trace.boundaries, _next_token_loss(logits, row)

    stream, losses = jax.vmap(one)(tokens)
    return stream, losses.sum()


@partial(jax.jit, static_argnames=("cfg",))
def _survey(params, tokens, *, cfg):
    """The sum of the rows' losses, and each boundary's sum and number of kept positions."""
    stream, loss = _clean(params, tokens, cfg=cfg)

    def boundary(x):
        keep = ~_sinks(x)
        return jnp.where(keep[..., None], x, 0).sum((0, 1)), keep.sum()

    return loss, *jax.lax.map(boundary, stream.swapaxes(0, 1))


def _sinks(x):
    return jax.vmap(lambda row: sink_positions(row, row.shape[0]))(x)


#: What adds up over pieces of the text.
_SUMS = ("kept", "l0", "error", "variance", "fired", "loss_sae", "loss_mean")


@partial(jax.jit, static_argnames=("cfg",))
def _fit(params, dictionary, x, tokens, boundary, mean, *, cfg):
    """How a dictionary fits some rows at a boundary. relative: `[R * T]`, nan at sinks."""
    sink = _sinks(x)
    flat, keep = x.reshape(-1, x.shape[-1]), ~sink.reshape(-1)
    a, rebuilt = reconstruct(dictionary, flat)
    square = jnp.square(flat - rebuilt).sum(-1)
    relative = jnp.sqrt(square) / jnp.linalg.norm(flat, axis=-1)

    def loss_with(replaced):
        put = jnp.where(sink[..., None], x, replaced.reshape(x.shape))
        return _loss_from(params, tokens, boundary, put, cfg=cfg)

    return dict(
        kept=keep.sum(),
        l0=jnp.where(keep, (a > 0).sum(-1), 0).sum(),
        error=jnp.where(keep, square, 0).sum(),
        variance=jnp.where(keep, jnp.square(flat - mean[None]).sum(-1), 0).sum(),
        fired=((a > 0) & keep[:, None]).any(0),
        relative=jnp.where(keep, relative, jnp.nan),
        loss_sae=loss_with(rebuilt),
        loss_mean=loss_with(jnp.broadcast_to(mean, flat.shape)),
    )


@jax.jit
def _unexplained(dictionary, x, mean):
    """Unexplained variance of a stream where it is no sink."""
    keep = ~_sinks(x).reshape(-1)
    flat = x.reshape(-1, x.shape[-1])
    _, rebuilt = reconstruct(dictionary, flat)
    error, variance = (jnp.square(flat - other).sum(-1) for other in (rebuilt, mean[None]))
    sums = [jnp.where(keep, square, 0).sum() for square in (error, variance)]
    return sums[0] / jnp.maximum(sums[1], 1e-30)


def _loss_from(params, tokens, boundary, x, *, cfg):
    """Sum of the rows' losses when a boundary's stream is `x`: only the blocks after it run."""
    x = run_from(params, x, boundary, cfg=cfg)
    return jax.vmap(_next_token_loss)(unembed(params, x, cfg=cfg), tokens).sum()


def _next_token_loss(logits, tokens):
    log_p = jax.nn.log_softmax(logits[:-1])
    return -jnp.take_along_axis(log_p, tokens[1:, None], axis=1).mean()
