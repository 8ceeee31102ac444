"""Frozen dataclasses of arrays that are pytrees.

`jax.tree_util.register_dataclass` does the work; `flax.struct`, which does the same, imports all of
Flax with it, 0.3 s that every command would wait for.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def field(*, pytree_node: bool = True, **options: Any) -> Any:
    """A field as `dataclasses.field` makes it. pytree_node: whether it holds arrays; one that does
    not is part of the tree's structure, and so compared where compiled code is looked up."""
    return dataclasses.field(metadata={"static": not pytree_node}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def dataclass(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass and a pytree; `replace` is a method of it."""
    made = dataclasses.dataclass(frozen=True)(cls)
    setattr(made, "replace", dataclasses.replace)  # noqa: B010 (pyright knows no such attribute)
    return jax.tree_util.register_dataclass(made)
