"""What a run leaves behind to go on from: kept by orbax, each written whole or not at all.

A checkpoint holds the training state (parameters, optimiser, silence, thresholds), the scale of
every boundary, and the step. Text position, order and the buffer of activations follow from the
seed and the step, and are made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from qkattr.errors import InputError
from qkattr.train.config import TrainConfig

#: What may differ when a run goes on: it changes nothing that was computed.
_FREE = ("checkpoint_every", "keep", "start")


class Checkpoints:
    """The checkpoints of one run, in a folder. `header` says what was trained on what."""

    def __init__(self, folder: str | Path, cfg: TrainConfig, header: dict[str, Any]):
        self._folder = Path(folder).resolve()
        self._cfg, self._header = cfg, header
        for name in ("orbax", "absl"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is raised
        options = ocp.CheckpointManagerOptions(max_to_keep=cfg.keep, create=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        """Steps done by the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, scale: jax.Array) -> None:
        """Write a checkpoint after `step` steps; it is there, whole, when this returns.

        Raises:
          OSError: it cannot be written; those before it stay.
        """
        if step == self.latest():
            return
        described = ocp.args.JsonSave(self._description())
        tree = ocp.args.StandardSave(dict(state=state, scale=scale))
        with _plain_errors(self._folder):
            _check_room(self._folder, sum(leaf.nbytes for leaf in jax.tree.leaves((state, scale))))
            self._manager.save(step, args=ocp.args.Composite(tree=tree, run=described))
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def check(self) -> None:
        """Compare the newest checkpoint's run with this one.

        Raises:
          InputError: it is another run.
        """
        found = self._manager.restore(
            self.latest(), args=ocp.args.Composite(run=ocp.args.JsonRestore())
        )["run"]
        here = json.loads(json.dumps(self._description()))
        for name in sorted(set(found) | set(here)):
            if found.get(name) != here.get(name):
                raise InputError(
                    f"{self._folder.parent} holds a run with {name}={found.get(name)!r:.60}, this "
                    f"one has {here.get(name)!r:.60}; give its own settings, or another --out"
                )

    def restore(self, state: Any, scale: jax.Array) -> tuple[Any, jax.Array]:
        """The newest checkpoint, in the shapes and placement of these."""
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(state=state, scale=scale))
        tree = self._manager.restore(
            self.latest(), args=ocp.args.Composite(tree=ocp.args.StandardRestore(like))
        )["tree"]
        return tree["state"], tree["scale"]

    def close(self) -> None:
        self._manager.close()

    def _description(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self._cfg)
        return self._header | {k: v for k, v in settings.items() if k not in _FREE}


def _check_room(folder: Path, size: int) -> None:
    """Take the bytes of a checkpoint once and give them back, so that a full disk is one error
    before the writing and not one in each of its threads.

    Raises:
      OSError: there is no room.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        elif shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """A failed write as an OSError that names the folder, whatever library it went through."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror or os.strerror(e.errno or 0), str(folder)) from e
    except Exception as e:
        said = str(e).lower()
        number = next((n for n in (errno.ENOSPC, errno.EFBIG) if os.strerror(n).lower() in said), 0)
        if not number:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from e
