"""The type checker of the tests: what annotations say of arrays holds in every call."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import beartype
import numpy as np
from jaxtyping import AbstractArray, Array

#: The rooms of the method, whose functions take arrays.
ROOMS = tuple(f"qkattr.{room}" for room in ("model", "sources", "qk", "graph"))


def functions(function: Callable) -> Callable:
    """Check a function, and no struct: JAX fills those with whatever it maps over (None, axes,
    shardings, shapes)."""
    if function.__name__ == "__init__":
        return function
    hints = function.__annotations__
    function.__annotations__ = {name: _named(hint) for name, hint in hints.items()}
    return beartype.beartype(function)


def _named(hint: Any) -> Any:
    """An annotation with axes such as `L+1` under a name of their own, since `jaxtyping` computes
    them only after `L`; that they go together is what `qkattr.shapes` checks. An array may be
    NumPy's."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = [_named(option) for option in typing.get_args(hint)]
        return typing.Union[tuple(options)]  # noqa: UP007
    if typing.get_origin(hint) is tuple:
        return tuple[tuple(_named(part) for part in typing.get_args(hint))]  # pyright: ignore
    if hint is Array:
        return Array | np.ndarray | np.generic
    if not (inspect.isclass(hint) and issubclass(hint, AbstractArray)):
        return hint
    axes = re.sub(r"(\w)([+-])(\d)", r"\1_and_\3", hint.dim_str)
    named = hint.dtype[Array, axes] | hint.dtype[np.ndarray, axes]
    return named if axes else named | np.generic
