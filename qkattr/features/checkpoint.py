"""The state of an interrupted scan on disk: one file, replaced whole.

The file names what the scan is of; the state of another scan is refused, not overwritten.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qkattr.errors import InputError

STATE = "scan.npz"


def write_checkpoint(folder: Path, made_of: str, done: int, state: Any) -> None:
    """Write after `done` batches; what was there survives a failure."""
    from qkattr.files import write_files

    leaves = jax.tree.leaves(jax.device_get(state))
    packed = [np.packbits(leaf) if leaf.dtype == bool else leaf for leaf in leaves]
    buffer = io.BytesIO()
    columns: dict[str, Any] = {f"leaf_{i}": leaf for i, leaf in enumerate(packed)}
    np.savez(buffer, made_of=np.array(made_of), done=np.array(done), **columns)
    write_files(folder, {STATE: buffer.getvalue()})


def read_checkpoint(folder: Path, made_of: str, like: Any) -> tuple[int, Any] | None:
    """How many batches are done and the state after them; None where there is no state yet.

    Raises:
      InputError: it is the state of another scan, or damaged.
    """
    from qkattr.files import DAMAGED_NPZ

    path = folder / STATE
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            columns = {name: data[name] for name in data.files}
        said, done = str(columns["made_of"]), int(columns["done"])
        leaves, tree = jax.tree.flatten(like)
        found = [_unpacked(columns[f"leaf_{i}"], leaf) for i, leaf in enumerate(leaves)]
    except DAMAGED_NPZ as e:
        raise InputError(f"{path} is damaged; remove it and scan again") from e
    if said != made_of:
        raise InputError(
            f"{path} is of another scan (other model, SAEs, text or settings); remove it, or write "
            f"to another place"
        )
    return done, jax.tree.unflatten(tree, found)


def _unpacked(found: np.ndarray, like: np.ndarray) -> np.ndarray:
    if like.dtype != bool:
        return found
    return np.unpackbits(found, count=like.size).astype(bool).reshape(like.shape)
