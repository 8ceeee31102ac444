"""What a checkpoint is, whatever its format, and whether it is the one that its config describes.

A `Checkpoint` gives tensors under Hugging Face names and in Hugging Face layout; the tables of the
family say which is which (`load.models.families.tables`). All names and shapes are checked before
any data is read, and before JAX is imported.
"""

from __future__ import annotations

from typing import Protocol

import ml_dtypes
import numpy as np

from qkattr.config import ModelConfig
from qkattr.errors import InputError, some
from qkattr.load.models.families import FAMILIES
from qkattr.load.models.families.tables import sizes_of
from qkattr.load.tensors.mapped import FLOATS, not_floats

#: The types that weights may be read as.
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Checkpoint(Protocol):
    """Named tensors, read one by one. `where` is how errors call it."""

    @property
    def where(self) -> str: ...

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def type(self, name: str) -> str: ...

    def read(self, name: str) -> np.ndarray: ...


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Compare names, types and shapes with what the config calls for; reads no data. Of tensors
    that the family knows and does not read (causal masks, say) nothing is asked.

    Raises:
      InputError: a tensor is missing, is not used, is not of floats, or has another shape.
    """
    family, sizes = FAMILIES[config.family], sizes_of(config)
    found = checkpoint.shapes()
    inside, outside = family.rows(config, found)
    expected = {row.tensor: row.shape(sizes) for row in outside}
    for row in inside:
        shape = row.shape(sizes)
        expected |= {row.tensor.format(block): shape for block in range(config.n_blocks)}
    remedy = "the weights and the config must belong to one checkpoint"
    if missing := [name for name in expected if name not in found]:
        raise InputError(
            f"{checkpoint.where} lacks {some(missing)}, which its config calls for; {remedy}"
        )
    if extra := [
        name for name in found if name not in expected and not family.is_unused(name, config)
    ]:
        raise InputError(
            f"{checkpoint.where} holds {some(extra)}, for which its config has no use; {remedy}"
        )
    for name, shape in expected.items():
        if checkpoint.type(name) not in FLOATS:
            raise not_floats(checkpoint.where, name, checkpoint.type(name))
        if tuple(found[name]) != shape:
            got, want = list(found[name]), list(shape)
            raise InputError(
                f"{checkpoint.where}: {name} has shape {got}, its config calls for {want}; {remedy}"
            )
