"""How well the SAEs fit the model on a text: a wrong SAE, hook or normalisation shows here first.

Per boundary, over positions that are not sinks: L0 (features active at a position), unexplained
variance |x - x^|^2 / |x - mean|^2, median relative error |x - x^| / |x|, features that never
fire on the text, and

    loss recovered = (L_mean - L_sae) / (L_mean - L_clean)

with L the next-token loss in nats, clean, with the reconstruction in place of the residual stream,
and with its mean. Axes: B rows of the text, T position, D d_model, M dictionary width.
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
from qkattr.model.forward import block, forward, unembed
from qkattr.sources.components import sink_positions
from qkattr.sources.dictionary import reconstruct

#: Tokens of one row of the text.
ROW = 128

#: A boundary whose reconstruction loses more than this of the loss is flagged.
POOR = 0.5


@dataclasses.dataclass(frozen=True)
class BoundaryCheck:
    """One boundary's figures. dead: features that never fired on this text, of `width`."""

    boundary: int
    l0: float
    unexplained_variance: float
    median_relative_error: float
    dead: int
    width: int
    loss: float
    loss_recovered: float
    verdict: str


def check_saes(
    bundle: Bundle,
    rows: Sequence[Sequence[int]],
    *,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Check every boundary's SAE on rows of token ids (BOS included), all of one length.

    Raises:
      InputError: the bundle has no SAEs, or the text is too short to say anything.
    """
    if bundle.dictionaries is None:
        raise InputError("nothing to check: the bundle was loaded without SAEs")
    tokens = jnp.asarray(np.array(rows, np.int32))
    if tokens.ndim != 2 or tokens.shape[1] < 16:
        raise InputError(
            f"the text has rows of {tokens.shape[-1]} tokens; give at least 16 tokens of text"
        )
    progress("clean run")
    stream, clean = _clean(bundle.params, tokens, cfg=bundle.config)
    checks = []
    for b, dictionary in enumerate(bundle.dictionaries):
        if dictionary is None:
            continue
        progress(f"boundary {b}")
        x, sink = stream[:, b], _sinks(stream[:, b])
        rebuilt, mean, figures = jax.device_get(_fit(dictionary, x, sink))
        losses = [
            float(_loss_from(bundle.params, tokens, b, put, cfg=bundle.config))
            for put in (_where(sink, x, rebuilt), _where(sink, x, jnp.broadcast_to(mean, x.shape)))
        ]
        recovered = (losses[1] - losses[0]) / max(losses[1] - float(clean), 1e-6)
        checks.append(
            BoundaryCheck(
                boundary=b,
                width=dictionary.width,
                loss=losses[0],
                loss_recovered=recovered,
                verdict=_verdict(dictionary, figures, recovered),
                **{k: v.item() for k, v in figures.items()},
            )
        )
    return dict(
        clean_loss=float(clean), rows=len(rows), boundaries=[dataclasses.asdict(c) for c in checks]
    )


def _verdict(dictionary, figures, recovered: float) -> str:
    unexplained = figures["unexplained_variance"].item()
    if recovered >= POOR and unexplained < 1:
        return "ok"
    l0 = figures["l0"].item()
    many = f"; {l0:.0f} features fire at a position" if l0 > dictionary.width / 10 else ""
    return (
        f"POOR: unexplained variance {unexplained:.2f}, loss recovered {recovered:.2f}{many}: "
        f"wrong SAE, wrong hook or wrong normalisation?"
    )


@partial(jax.jit, static_argnames=("cfg",))
def _clean(params, tokens, *, cfg):
    def one(row):
        logits, trace = forward(params, row, cfg=cfg, capture=("boundaries",))
        return trace.boundaries, _next_token_loss(logits, row)

    stream, losses = jax.vmap(one)(tokens)
    return stream, losses.mean()


def _where(sink, x, replaced):
    """The replacement, with sinks left as they are."""
    return jnp.where(sink[..., None], x, replaced)


@jax.jit
def _sinks(x):
    return jax.vmap(lambda row: sink_positions(row, row.shape[0]))(x)


@jax.jit
def _fit(dictionary, x, sink):
    flat, keep = x.reshape(-1, x.shape[-1]), ~sink.reshape(-1)
    a, rebuilt = reconstruct(dictionary, flat)
    n = keep.sum()
    mean = jnp.where(keep[:, None], flat, 0).sum(0) / n
    error = jnp.where(keep, jnp.square(flat - rebuilt).sum(-1), 0)
    variance = jnp.where(keep, jnp.square(flat - mean).sum(-1), 0)
    relative = jnp.sqrt(error) / jnp.linalg.norm(flat, axis=-1)
    fired = ((a > 0) & keep[:, None]).any(0)
    figures = dict(
        l0=jnp.where(keep, (a > 0).sum(-1), 0).sum() / n,
        unexplained_variance=error.sum() / variance.sum(),
        median_relative_error=jnp.nanmedian(jnp.where(keep, relative, jnp.nan)),
        dead=(~fired).sum(),
    )
    return rebuilt.reshape(x.shape), mean, figures


@partial(jax.jit, static_argnames=("cfg",))
def _loss_from(params, tokens, boundary, x, *, cfg):
    """Next-token loss when the stream at a boundary is `x`: only the blocks after it are run."""

    def step(b, x):
        weights = jax.tree.map(lambda a: a[b], params.blocks)
        return jax.vmap(lambda row: block(weights, row, cfg=cfg.block)[0])(x)

    x = jax.lax.fori_loop(boundary, cfg.n_blocks, step, x)
    return jax.vmap(_next_token_loss)(unembed(params, x, cfg=cfg), tokens).mean()


def _next_token_loss(logits, tokens):
    log_p = jax.nn.log_softmax(logits[:-1])
    return -jnp.take_along_axis(log_p, tokens[1:, None], axis=1).mean()
