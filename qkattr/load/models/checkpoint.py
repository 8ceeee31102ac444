"""What a checkpoint is, whatever its format, and whether it is the one that its config describes.

A `Checkpoint` gives tensors by name, and a `Layout` says which is which: the tables of the model's
family, for what has Hugging Face's names and shapes, or the table of a tree. All names and shapes
are checked before any data is read, and before JAX is imported.
"""

from __future__ import annotations

import re
from typing import Protocol

import ml_dtypes
import numpy as np

from qkattr.config import ModelConfig
from qkattr.errors import InputError, some
from qkattr.load.models.families import FAMILIES
from qkattr.load.models.families.tables import Layout, sizes_of
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


def check_tensors(
    checkpoint: Checkpoint, config: ModelConfig, layout: Layout | None = None
) -> None:
    """Compare names, types and shapes with what the config calls for; reads no data. Of tensors
    that the layout knows and does not read (causal masks, say) nothing is asked.

    layout: None: that of the config's family.

    Raises:
      InputError: a tensor is missing, is not used, is not of floats, or has another shape.
    """
    found, where, sizes = checkpoint.shapes(), checkpoint.where, sizes_of(config)
    layout = layout or FAMILIES[config.family].layout(config, found)
    rows = layout.rows(config.n_blocks)
    expected = {row.tensor: row.fields for row in rows}
    extra = [n for n in found if n not in expected and not _matches(n, layout.unused)]
    holds = f"holds {some(extra)}, for which {layout.source} has no use" if extra else ""
    if missing := [name for name in expected if name not in found]:
        raise InputError(
            f"{where} lacks {some(missing)}, which {layout.source} calls for "
            f"({expected[missing[0]]}){holds and f', and {holds}'}; {layout.remedy}"
        )
    if extra:
        raise InputError(f"{where} {holds}; {layout.remedy}")
    for row in rows:
        name, shape = row.tensor, tuple(found[row.tensor])
        if checkpoint.type(name) not in FLOATS:
            raise not_floats(where, name, checkpoint.type(name))
        if not row.fits(shape, sizes):
            want = ", ".join("any" if n is None else str(n) for n in row.shape(sizes))
            raise InputError(
                f"{where}: {name} has shape {list(shape)}, its config calls for [{want}] "
                f"({row.fields} as [{row.axes}]); {layout.remedy}"
            )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)
