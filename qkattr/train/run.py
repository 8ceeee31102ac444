"""The training loop: one forward of the model feeds every boundary, with progress, metrics,
checkpoints, and resuming.

    OUT/checkpoints      by orbax, to go on from
    OUT/metrics.jsonl    a line every LOG steps
    OUT/saes             the trained set, SAELens folders; with `bits` also OUT/saes.gguf
    OUT/metrics.json     how good it is on the held-out rows
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from qkattr.errors import InputError
from qkattr.features.check import check_saes
from qkattr.files import dumps, write_files
from qkattr.load.bundle import Bundle
from qkattr.sharding import on_host, shard
from qkattr.sources.dictionary import Dictionary
from qkattr.train.checkpoints import Checkpoints
from qkattr.train.config import TrainConfig
from qkattr.train.output import dictionaries, open_start, start_from, write_packed, write_saes
from qkattr.train.parts import Parts
from qkattr.train.rounding import fit_grid
from qkattr.train.sae import SAE, init_sae
from qkattr.train.step import TrainState, init_state
from qkattr.train.stream import Stream

#: Steps between two lines of metrics.
LOG = 10


@dataclasses.dataclass(frozen=True)
class TrainProgress:
    """Where a run stands. Lists have an entry a boundary, the first of them 1.

    loss, unexplained (|x - x^|^2 over |x - mean|^2), l0: means since the last report; dead:
    features that count as dead; rate: positions a second, of this process.
    """

    step: int
    steps: int
    tokens: int
    rate: float
    loss: list[float]
    unexplained: list[float]
    l0: list[float]
    dead: list[int]


def train(
    bundle: Bundle,
    rows: np.ndarray,
    cfg: TrainConfig,
    *,
    out: str | Path,
    mesh: Mesh | None = None,
    progress: Callable[[TrainProgress], None] = lambda progress: None,
) -> tuple[Dictionary, ...]:
    """Train a dictionary after every block, or go on where the run in `out` stopped.

    rows: `int[n, cfg.row]` token ids; the last `cfg.held_out` are not trained on. mesh: with axes
    `data` and `model`; None: one device.

    Raises:
      InputError: the text is too short, `out` holds another run, or a loss or weight is not finite
        (the last checkpoint stays).
    """
    _check(bundle, rows, cfg)
    used = rows[: len(rows) - cfg.held_out]
    out = Path(out)
    header = dict(model=bundle.model_hash, rows=len(rows), text=_digest(rows))
    stream = Stream(shard(bundle.params, mesh), used, bundle.config, cfg, mesh)
    checkpoints = Checkpoints(out / "checkpoints", cfg, header)
    try:
        done, state = _begin(stream, checkpoints, mesh)
        _cut_log(out / "metrics.jsonl", done)
        at_once = jax.default_backend() != "cpu" or mesh is not None
        parts = Parts(state, cfg=cfg, at_once=at_once)
        del state
        state = _loop(stream, checkpoints, parts, done, out / "metrics.jsonl", progress)
    finally:
        checkpoints.close()
    state = on_host(state)
    assert stream.scale is not None  # measured before the first step
    trained = dictionaries(state, stream.scale, cfg=cfg)
    if jax.process_index():
        return trained
    write_saes(out / "saes", trained, model_name=bundle.model, context=cfg.row)
    if cfg.bits:
        write_packed(out / "saes", out / "saes.gguf", state, cfg=cfg)
    return trained


def _check(bundle: Bundle, rows: np.ndarray, cfg: TrainConfig) -> None:
    """Fail before the work, not after it."""
    if rows.shape[1] != cfg.row or len(rows) <= cfg.held_out:
        raise InputError(
            f"the text has {rows.shape[0]} rows of {rows.shape[1]} tokens, expected more than the "
            f"{cfg.held_out} held out, of {cfg.row} each; give more text, or change row"
        )
    if cfg.row > bundle.config.context:
        raise InputError(
            f"row is {cfg.row} tokens, the model's context is {bundle.config.context}; lower row"
        )
    if max(cfg.wide, default=0) > bundle.config.n_blocks:
        raise InputError(
            f"wide has boundary {max(cfg.wide)}, the model has 1..{bundle.config.n_blocks}; take "
            "it out"
        )


def measure(
    bundle: Bundle,
    trained: tuple[Dictionary, ...],
    rows: np.ndarray,
    cfg: TrainConfig,
    *,
    out: str | Path,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """How good a trained set is on the held-out rows (the last row where none is held out), see
    `qkattr.features.check`; also written to `out/metrics.json`."""
    whole = dataclasses.replace(bundle, dictionaries=(None, *trained))
    held_out = rows[-max(1, cfg.held_out) :]
    report = check_saes(whole, held_out, text="the held-out rows", progress=progress)
    if jax.process_index() == 0:
        write_files(Path(out), {"metrics.json": dumps(report).encode()})
    return report


def _begin(stream: Stream, checkpoints: Checkpoints, mesh: Mesh | None) -> tuple[int, TrainState]:
    """Steps that are done, and the state after them."""
    cfg, model = stream.cfg, stream.model
    done = checkpoints.latest()
    if done is not None:
        checkpoints.check()
        shapes = jax.eval_shape(lambda: init_state(_fresh(model, cfg), cfg=cfg))
        state = shard(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes), mesh)
        state, stream.scale = checkpoints.restore(state, jnp.zeros(model.n_blocks))
        return done, state
    start = open_start(cfg.start, model=model, cfg=cfg) if cfg.start else None
    mean, scale = stream.measure()
    saes = _fresh(model, cfg, mean) if start is None else start_from(start, scale)
    return 0, shard(init_state(saes, cfg=cfg), mesh)


def _fresh(model: Any, cfg: TrainConfig, mean: Any = None) -> SAE:
    """Random SAEs for every boundary."""
    keys = jax.random.split(jax.random.key(cfg.seed), model.n_blocks)
    mean = jnp.zeros((model.n_blocks, model.d_model)) if mean is None else mean
    return jax.vmap(lambda key, mean_D: init_sae(key, mean_D, cfg=cfg))(keys, mean)


def _loop(
    stream: Stream,
    checkpoints: Checkpoints,
    parts: Parts,
    done: int,
    log: Path,
    progress: Callable[[TrainProgress], None],
) -> TrainState:
    cfg = stream.cfg
    began, first, window = time.perf_counter(), done, []
    for step in range(done, cfg.steps):
        if cfg.bits and step == cfg.round_at:
            parts.fit(lambda sae: shard(fit_grid(on_host(sae), cfg=cfg), stream.mesh))
        x, weight = stream.batch(step)
        seen = parts.step(x, weight)
        loss, error, variance, l0 = jax.device_get((seen.loss, seen.error, seen.variance, seen.l0))
        _refuse_unless(np.isfinite(loss), "the loss", step, checkpoints)
        window.append((loss, error, variance, l0))
        last = step + 1 == cfg.steps
        if (step + 1) % LOG == 0 or last:
            rate = (step + 1 - first) * cfg.batch / (time.perf_counter() - began)
            _report(parts, window, step + 1, rate, cfg, log, progress)
            window = []
        if (step + 1) % cfg.checkpoint_every == 0 or last:
            state = parts.state()
            _refuse_unless(_finite(state.sae), "a weight", step, checkpoints)
            assert stream.scale is not None  # measured before the first step
            checkpoints.save(step + 1, state, stream.scale)
            del state
    return parts.state()


@jax.jit
def _finite(saes: SAE) -> Bool[Array, "L"]:
    """Whether all that a boundary's SAE holds is finite. A finite loss does not say so: the weights
    that it was computed from have changed since."""
    leaves = jax.tree.leaves(saes)
    return jnp.stack([jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(1) for leaf in leaves]).all(
        0
    )


def _refuse_unless(good: Any, what: str, step: int, checkpoints: Checkpoints) -> None:
    """
    Raises:
      InputError: a boundary is not good.
    """
    good = np.asarray(good)
    if not good.all():
        raise InputError(
            f"{what} of boundary {int(np.argmin(good)) + 1} is not finite at step {step + 1}; "
            f"the last good checkpoint, after step {checkpoints.latest() or 0}, is kept; lower lr, "
            "or mend the text"
        )


def _report(parts, window, step, rate, cfg, log: Path, progress) -> None:
    """One line of metrics, on disk and to whoever watches."""
    loss, error, variance, l0 = (np.stack(column) for column in zip(*window, strict=True))
    dead = np.asarray((parts.silent() >= cfg.dead_after).sum(1))
    said = TrainProgress(
        step=step,
        steps=cfg.steps,
        tokens=step * cfg.batch,
        rate=round(rate, 1),
        loss=np.round(loss.mean(0), 6).tolist(),
        unexplained=np.round(error.sum(0) / np.maximum(variance.sum(0), 1e-30), 6).tolist(),
        l0=np.round(l0.mean(0), 3).tolist(),
        dead=dead.tolist(),
    )
    if jax.process_index() == 0:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(dataclasses.asdict(said)) + "\n")
    progress(said)


def _cut_log(log: Path, done: int) -> None:
    """Leave the lines of steps that are done: those after the checkpoint are made again."""
    if jax.process_index() or not log.is_file():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= done:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # cut short
    write_files(log.parent, {log.name: "".join(kept).encode()})


def _digest(rows: np.ndarray) -> str:
    """What identifies a text: a hash of up to a thousand of its rows, spread evenly."""
    import hashlib

    some = np.unique(np.linspace(0, len(rows) - 1, 1000).astype(int))
    return hashlib.sha256(np.ascontiguousarray(rows[some], np.int64).tobytes()).hexdigest()[:16]
