"""Meshes, where arrays go on them, and buckets of sizes.

Weights carry their axes in their names (`wq_DNH`), so where they go follows from one table: heads,
MLP hidden, dictionary width and vocabulary over the mesh axis `model`; prompts and target rows over
`data`. Library code never names a mesh: inputs get a NamedSharding once, and the compiler does the
rest. `on_any_mesh` lets the same functions run on meshes with Explicit axes, whose types would
otherwise ask for an output sharding at every contraction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

#: Logical axis (a letter of `types.py`) to mesh axis; every other axis is replicated.
MESH_AXES = {
    "N": "model",
    "K": "model",
    "F": "model",
    "M": "model",
    "V": "model",
    "B": "data",
    "R": "data",
}


def make_mesh(data: int, model: int, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `data` x `model` devices with Auto axes."""
    return jax.make_mesh(
        (data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where an array goes, from the axis letters that end its name (`wq_DNH`;
    leading axes are replicated).

    An axis that the mesh axis does not divide is replicated, as is the second of two that want the
    same mesh axis.
    """
    letters = name.rsplit("_", 1)[-1] if "_" in name else ""
    if not letters.isupper() or len(letters) > len(shape):
        return PartitionSpec()
    spec: list[str | None] = [None] * (len(shape) - len(letters))
    for letter, size in zip(letters, shape[len(spec) :], strict=True):
        axis = MESH_AXES.get(letter)
        fits = axis in mesh.shape and size % mesh.shape[axis] == 0 and axis not in spec
        spec.append(axis if fits else None)
    return PartitionSpec(*spec)


def shard(tree: T, mesh: Mesh | None) -> T:
    """The same structs (`Params`, `BlockWeights`, `Dictionary`, ...)
    with every array placed on the mesh; as they are without one.
    """
    if mesh is None:
        return tree

    def place(path, leaf):
        name = getattr(path[-1], "name", "") if path else ""
        return jax.device_put(leaf, NamedSharding(mesh, spec_of(name, leaf.shape, mesh)))

    return jax.tree_util.tree_map_with_path(place, tree)


def on_host(tree: T) -> T:
    """The same structs with whole arrays on this host, also where other processes hold parts of
    them; then every process has to ask."""
    from jax.experimental.multihost_utils import process_allgather

    def fetch(leaf):
        split = isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        )
        return process_allgather(leaf, tiled=True) if split else jax.device_get(leaf)

    return jax.tree.map(fetch, tree)


def on_any_mesh(function: Callable[..., T]) -> Callable[..., T]:
    """Let a function run where an argument's type carries Explicit mesh axes: they become Auto
    inside, and results are replicated. Otherwise it does nothing. To be put under `jax.jit`.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        leaves = [leaf for leaf in jax.tree.leaves((args, kwargs)) if hasattr(leaf, "dtype")]
        meshes = [jax.typeof(leaf).sharding.mesh for leaf in leaves]
        explicit = next((mesh for mesh in meshes if mesh.explicit_axes), None)
        if explicit is None:
            return function(*args, **kwargs)
        # Whatever holds arrays must go in as an argument: what is closed over keeps its type.
        arrays = {
            name: value
            for name, value in kwargs.items()
            if all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(value))
        }
        static = {name: value for name, value in kwargs.items() if name not in arrays}

        def inner(args, arrays):
            return function(*args, **arrays, **static)

        with jax.sharding.use_abstract_mesh(explicit):
            on_auto = jax.sharding.auto_axes(inner, out_sharding=PartitionSpec())
            return cast(Any, on_auto)(args, arrays)

    return cast(Callable[..., T], run)


def bucket(n: int, *, smallest: int = 8) -> int:
    """The least of 8, 12, 16, 24, 32, 48, 64, ... (doublings of 8 and of 12) that holds n."""
    size = smallest
    while size < n:
        if n <= size * 3 // 2:
            return size * 3 // 2
        size *= 2
    return size


def pad_tokens(ids: Sequence[int]) -> np.ndarray:
    """Token ids, right-padded to the least of 16, 32, 64, 96, 128, 192, ... that holds them: every
    length is compiled once, and below 64 tokens padding costs less than compiling."""
    n = len(ids)
    length = next((size for size in (16, 32) if n <= size), bucket(n, smallest=64))
    return np.pad(np.asarray(ids, np.int32), (0, length - n))
