"""From a checkpoint's tensors to `Params`: one assembling path for every family, file and tree.

`qkattr.load.models.checkpoint` checks names and shapes first. Blocks are copied a
few tensors at a time into arrays that already have the target type, which JAX takes over where it
computes on the host: the host never holds two models.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qkattr.config import ModelConfig
from qkattr.errors import InputError
from qkattr.load.models.checkpoint import DTYPES, Checkpoint, check_tensors
from qkattr.load.models.families import FAMILIES
from qkattr.load.models.families.tables import Layout, Row, sizes_of
from qkattr.load.tensors.mapped import check_finite
from qkattr.types import BlockWeights, Norm, Params

#: Blocks that are read at a time: checking and copying run without Python's lock.
READERS = 4
_ALIGNMENT = 64  # bytes, of XLA's buffers on the host
#: How the names of gains and biases begin. They stay float32: they are small, and rounding them
#: would buy nothing.
_SMALL = ("norm", "b", "unembed_bias")


def _read(checkpoint: Checkpoint, row: Row, sizes: dict[str, int], out: dict[str, Any]) -> None:
    """Read one tensor into the arrays of its fields, which have our shapes and types."""
    tensor = row.taken(checkpoint.read(row.tensor))
    check_finite(tensor, row.tensor, checkpoint.where)
    for field, piece in row.pieces(tensor, sizes):
        out[field][...] = piece


def _read_block(
    checkpoint: Checkpoint, row: Row, sizes: dict[str, int], stacks: dict[str, Any], block: int
) -> None:
    """`_read` of one block's tensor into its place in the stacks."""
    here = {field: stack[block] for field, stack in stacks.items()}
    _read(checkpoint, row.at(block), sizes, here)


def _allocate(row: Row, sizes: dict[str, int], dtype: Any, *leading: int) -> dict[str, Any]:
    """An array for each field of a row."""
    types = {f: np.dtype(np.float32 if f.startswith(_SMALL) else dtype) for f in row.fields.split()}
    shapes = row.shapes(sizes).items()
    return {field: _aligned((*leading, *shape), types[field]) for field, shape in shapes}


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that JAX need not copy on the host: it begins where XLA's buffers do."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _read_blocks(checkpoint: Checkpoint, rows, config: ModelConfig, dtype: Any) -> dict[str, Array]:
    """Every field of `BlockWeights` that is read, stacked."""
    sizes, fields = sizes_of(config), {}
    for row in rows:
        stacks = _allocate(row, sizes, dtype, config.n_blocks)
        read = partial(_read_block, checkpoint, row, sizes, stacks)
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(read, range(config.n_blocks)))  # raises what one of them raised
        if config.scale_by_depth:
            _divide_by_depth(stacks)
        fields |= jax.device_put(stacks)
    return fields


def _divide_by_depth(stacks: dict[str, np.ndarray]) -> None:
    """Queries of block b divided by b + 1, and with them its scores."""
    for field in {"wq_DNH", "bq_NH"} & set(stacks):
        depth = np.arange(1, len(stacks[field]) + 1, dtype=np.float32)
        depth = depth.reshape(-1, *(1,) * (stacks[field].ndim - 1))
        stacks[field][...] = stacks[field].astype(np.float32) / depth


def _nested(fields: dict[str, Array]) -> dict[str, Any]:
    """`norm_attn.weight` and `norm_attn.bias` as the one `Norm` that they are."""
    nested: dict[str, Any] = {name: a for name, a in fields.items() if "." not in name}
    for name in fields.keys() - nested.keys():
        norm = name.split(".")[0]
        nested[norm] = Norm(weight=fields[f"{norm}.weight"], bias=fields.get(f"{norm}.bias"))
    return nested


def _per_block(config: ModelConfig) -> dict[str, Array]:
    """What blocks have of the config alone, stacked on L."""
    return dict(
        inv_freq=jnp.asarray(config.inv_freq()),
        window=jnp.asarray(np.array(config.windows, np.int32)),
    )


def read_params(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: str = "float32",
    layout: Layout | None = None,
) -> Params:
    """Assemble the model: matrices in `dtype`, "float32" or "bfloat16", the rest in float32.

    layout: None: that of the config's family.

    Raises:
      InputError: the dtype is neither, the tensors do not fit the config, or one holds NaN or
        infinite values.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    layout = layout or FAMILIES[config.family].layout(config, checkpoint.shapes())
    check_tensors(checkpoint, config, layout)
    target, sizes = DTYPES[dtype], sizes_of(config)
    blocks = BlockWeights(
        **_per_block(config),
        **_nested(_read_blocks(checkpoint, layout.block, config, target)),
    )
    rest: dict[str, Any] = {}
    for row in layout.outside:
        arrays = _allocate(row, sizes, target)
        _read(checkpoint, row, sizes, arrays)
        rest |= jax.device_put(arrays)
    # Rounded to the type of the weights, as the family's own code has it.
    scale = jnp.asarray(config.d_model**0.5, target) if layout.scaled_embedding else None
    return Params(blocks=blocks, embed_scale=scale, **_nested(rest))
