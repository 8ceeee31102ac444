"""What public functions require of the arrays that a program hands them.

    @checked
    def qk_terms(weights: BlockWeights, x: Float[Array, "T D"], components: Components, ...):

reads ranks, types and sizes off the annotations, of arguments and of the fields of structs among
them. A letter has one size in a call: where arrays disagree, the one that fits least is named.
`Annotated[BlockWeights, "L"]` is a struct with a leading axis L on every array. Arrays in structs
may be of any floating-point type; those that are arguments themselves are float32.

Only shapes and types are looked at, with `chex`: under `jax.jit` that happens while a function is
traced, and compiled calls pay nothing. `chex.disable_asserts()` turns it off.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
import operator
import re
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, TypeVar, Union

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import AbstractArray

from qkattr.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])

#: S and T are both the positions of one prompt.
SAME = {"S": "T"}
#: Axes that every struct counts for itself: the numbers of edits of different kinds.
OWN = {"E"}
#: What a row is where its axis has a name, as in `Int[Array, "P place=4"]`.
ROWS = {"place": "block, head, query, key", "pair": "query slot, key slot"}
#: Types by what an annotation calls them; None: any number.
KINDS = {"Float": jnp.floating, "Int": jnp.integer, "Bool": bool, "Real": None}


def checked(function: F) -> F:
    """Let a function refuse arrays that do not have the ranks, types and sizes of its annotations.

    Raises (the function that is made):
      InputError: one sentence that names the argument, what is expected, and what it has.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        wanted = _hints(function)
        _check([a for name in given for a in _arrays(wanted.get(name), given[name], name)])
        return function(*args, **kwargs)

    return typing.cast(F, run)


@functools.cache
def _hints(thing: Any) -> dict[str, Any]:
    return typing.get_type_hints(thing, include_extras=True)


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of an annotation.

    name: `D`, `L+1`, `place` of `place=4`, or `...`.
    letter: whose size it has; "": a size of its own, or any.
    plus: what is added to the letter's size; without a letter, the size.
    """

    name: str
    letter: str
    plus: int

    def size(self, sizes: dict[str, int]) -> int | None:
        """None where it is not known."""
        if not self.letter:
            return None if self.name == "..." else self.plus
        return sizes[self.letter] + self.plus if self.letter in sizes else None

    def show(self, sizes: dict[str, int]) -> str:
        size = self.size(sizes)
        if size is None:
            return self.name
        return f"{self.name}={size}" if self.letter else str(size)


@dataclasses.dataclass(frozen=True)
class Stack:
    """A struct that is stacked.

    name: of the argument, with its fields.
    axes: the leading ones of its arrays.
    """

    name: str
    axes: tuple[str, ...]

    @property
    def remedy(self) -> str:
        return f"; stack a list of them: jax.tree.map(lambda *a: jnp.stack(a), *{self.name})"


NO_STACK = Stack("", ())


@dataclasses.dataclass(frozen=True)
class Given:
    """An array that was handed in, and what is required of it.

    name: of the argument, with its fields: `weights.wq_DNH`.
    array: its shape, and its type as JAX reads it.
    axes: that it must have.
    stack: the struct that is stacked, and its axes, which come first.
    kind: the type that it must have.
    """

    name: str
    array: jax.ShapeDtypeStruct
    axes: tuple[Axis, ...]
    stack: Stack
    kind: Any

    def has_rank(self) -> bool:
        fixed = [axis for axis in self.axes if axis.name != "..."]
        if len(fixed) < len(self.axes):
            return len(self.array.shape) >= len(fixed)
        return _holds(chex.assert_rank, self.array, len(fixed))

    def has_type(self) -> bool:
        return self.kind is None or _holds(chex.assert_type, self.array, self.kind)

    def has_shape(self, sizes: dict[str, int]) -> bool:
        matcher = [... if axis.name == "..." else axis.size(sizes) for axis in self.axes]
        return _holds(chex.assert_shape, self.array, tuple(matcher))

    def sized(self) -> Iterator[tuple[Axis, int]]:
        """Its axes with their sizes, but for what `...` stands for."""
        shape, names = self.array.shape, [axis.name for axis in self.axes]
        gap = names.index("...") if "..." in names else len(names)
        behind = len(names) - gap - 1
        yield from zip(self.axes[:gap], shape[:gap], strict=True)
        if behind > 0:
            yield from zip(self.axes[-behind:], shape[-behind:], strict=True)

    def differs(self, sizes: dict[str, int]) -> list[Axis]:
        return [axis for axis, n in self.sized() if axis.size(sizes) not in (n, None)]

    def shows(self, sizes: dict[str, int]) -> str:
        """`wq has shape [4, 8], expected [D=32, N=4]`"""
        rows = [f" ({ROWS[axis.name]})" for axis in self.axes if axis.name in ROWS]
        expected = ", ".join(axis.show(sizes) for axis in self.axes)
        return (
            f"{self.name} has shape {list(self.array.shape)}, expected [{expected}]{''.join(rows)}"
        )


def _holds(assertion: Callable[..., None], *arguments: Any) -> bool:
    try:
        assertion(*arguments)
    except AssertionError:
        return False
    return True


# What an annotation asks for ----------------------------------------------------------------------


def _arrays(hint: Any, value: Any, name: str, stack: Stack = NO_STACK) -> Iterator[Given]:
    """The arrays of an argument, or of a field; nothing for what is neither array nor struct."""
    if typing.get_origin(hint) is Annotated:
        hint, *axes = typing.get_args(hint)
        stack = Stack(name, (*stack.axes, *axes))
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    options = typing.get_args(hint) if is_union else (hint,)
    arrays = [o for o in options if inspect.isclass(o) and issubclass(o, AbstractArray)]
    structs = [o for o in options if inspect.isclass(o) and dataclasses.is_dataclass(o)]
    if value is None and type(None) in options or not (arrays or structs):
        return
    if arrays:
        if not isinstance(value, (bool, int, float)):
            yield _seen(arrays, value, name, stack)
    elif isinstance(value, tuple(structs)):
        for field, inner in _hints(type(value)).items():
            yield from _arrays(inner, getattr(value, field), f"{name}.{field}", stack)
    else:
        what = f"a {structs[0].__name__}"
        if stack.axes:
            what += f" stacked on a leading axis {stack.axes[0]}{stack.remedy}"
        raise InputError(f"{name} is {_a(value)}, expected {what}")


def _seen(options: list[Any], value: Any, name: str, stack: Stack) -> Given:
    prefix = name.rpartition(".")[0]
    every = [
        tuple(_axis(text, prefix) for text in (*stack.axes, *o.dim_str.split())) for o in options
    ]
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        wanted = ", ".join(axis.name for axis in every[0])
        raise InputError(f"{name} is {_a(value)}, expected an array [{wanted}]")
    array = jax.ShapeDtypeStruct(value.shape, jax.dtypes.canonicalize_dtype(value.dtype))
    at = next((i for i, axes in enumerate(every) if len(axes) == len(array.shape)), 0)
    kind = KINDS[options[at].dtype.__name__]
    if not prefix and kind is jnp.floating and options[at].array_type is jax.Array:
        kind = jnp.float32
    return Given(name, array, every[at], stack, kind)


@functools.cache
def _axis(text: str, prefix: str) -> Axis:
    name, _, fixed = text.rpartition("=")
    if fixed.isdigit():
        return Axis(name, "", int(fixed))
    found = re.fullmatch(r"(\w+?)([+-]\d+)?", text)
    if found is None:
        return Axis(text, "", 0)
    letter = SAME.get(found[1], found[1])
    return Axis(text, f"{prefix}.{letter}" if letter in OWN else letter, int(found[2] or 0))


# What the arrays are ------------------------------------------------------------------------------


def _check(arrays: list[Given]) -> None:
    fits = [seen for seen in arrays if seen.has_rank()]
    if len(fits) < len(arrays):
        wrong = next(seen for seen in arrays if not seen.has_rank())
        sizes = _agreed(fits)
        raise InputError(wrong.shows(sizes) + _about_rank(wrong, sizes))
    for seen in arrays:
        if not seen.has_type():
            raise InputError(_about_type(seen))
    sizes = _agreed(arrays)
    wrong = [seen for seen in arrays if not seen.has_shape(sizes)]
    if wrong:
        worst = max(wrong, key=lambda seen: len(seen.differs(sizes)))
        others = [seen for seen in arrays if seen is not worst]
        sizes = _agreed(others)
        raise InputError(worst.shows(sizes) + _about_sizes(worst, others, sizes))
    _check_groups(arrays, sizes)


def _agreed(arrays: Iterable[Given]) -> dict[str, int]:
    """The size of every letter that most arrays have, or of those the first. The letters of most
    arrays come first, and an array that is wrong in one has no voice in the others."""
    voters, sizes = list(arrays), {}
    counts = Counter(axis.letter for seen in voters for axis, _ in seen.sized() if axis.letter)
    for letter, _ in counts.most_common():
        votes = Counter(
            n - axis.plus for seen in voters for axis, n in seen.sized() if axis.letter == letter
        )
        if votes:
            sizes[letter] = votes.most_common(1)[0][0]
            voters = [seen for seen in voters if not seen.differs({letter: sizes[letter]})]
    return sizes


def _check_groups(arrays: list[Given], sizes: dict[str, int]) -> None:
    """Query heads come in groups, one a key head."""
    n_query, n_key = sizes.get("N", 0), sizes.get("K", 1)
    if n_query % max(n_key, 1):
        query, key = (_witness(arrays, letter) for letter in "NK")
        raise InputError(
            f"{key} has K={n_key} key heads, which do not divide the N={n_query} query heads of "
            f"{query}; query head n reads key head n // (N // K)"
        )


def _witness(arrays: Iterable[Given], letter: str, size: int | None = None) -> str:
    """The first array that has a letter, of some size."""
    return next(
        seen.name
        for seen in arrays
        for axis, n in seen.sized()
        if axis.letter == letter and size in (None, n - axis.plus)
    )


def _about_rank(seen: Given, sizes: dict[str, int]) -> str:
    shape, axes = seen.array.shape, seen.axes
    known = [axis.size(sizes) for axis in axes]
    if len(shape) == len(axes) + 1:
        return "; take one of its first axis, or map over it with jax.vmap"
    sized = [size for size in known if size is not None]
    if len(shape) < len(axes) == len(sized):
        orders = {"": shape, ".T": shape[::-1]}
        ways = [
            f"{seen.name}{turned}.reshape{tuple(sized)}"
            for turned, order in orders.items()
            if _merges(sized, order)
        ]
        if ways:
            return f"; give {' or, of [out, in], '.join(ways)}"
    without = _left_out(axes, known, shape)
    if without and without.name in seen.stack.axes:
        return seen.stack.remedy
    return f"; the axis {without.name} is missing" if without else ""


def _left_out(axes: tuple[Axis, ...], known: list[int | None], shape: tuple) -> Axis | None:
    """The one axis whose absence explains a shape, as far as sizes are known."""
    agree = {
        i: [k == n for k, n in zip(known[:i] + known[i + 1 :], shape, strict=True) if k is not None]
        for i in range(len(axes))
        if len(shape) == len(axes) - 1
    }
    fits = sorted((sum(same), i) for i, same in agree.items() if all(same))
    if not fits or len(fits) > 1 and fits[-1][0] == fits[-2][0]:
        return None
    return axes[fits[-1][1]]


def _merges(sizes: list[int], shape: tuple[int, ...]) -> bool:
    """Whether a shape is that of some sizes with neighbours multiplied."""
    running = list(itertools.accumulate(sizes, operator.mul))
    at = [running.index(n) for n in itertools.accumulate(shape, operator.mul) if n in running]
    return len(at) == len(shape) and at == sorted(set(at)) and running[-1] == math.prod(shape)


def _about_type(seen: Given) -> str:
    dtype = seen.array.dtype
    names = {jnp.floating: "floating-point", jnp.integer: "integer", bool: "bool"}
    cast = {jnp.floating: "float32", jnp.integer: "int32", bool: "bool"}
    wanted = names.get(seen.kind, "float32")
    reason = {
        np.dtype("float64"): "; attribution is computed in float32 (jax_enable_x64 is on)",
        jnp.dtype("bfloat16"): "; attribution is computed in float32",
    }.get(dtype, "")
    return (
        f"{seen.name} is {dtype}, expected {wanted}{reason}; "
        f"give {seen.name}.astype({cast.get(seen.kind, 'float32')!r})"
    )


def _about_sizes(seen: Given, others: list[Given], sizes: dict[str, int]) -> str:
    """Whose sizes they are, and how to turn the axes where that is all."""
    known, shape = [axis.size(sizes) for axis in seen.axes], seen.array.shape
    orders = itertools.permutations(range(len(shape))) if None not in known else ()
    turned = [order for order in orders if [shape[i] for i in order] == known]
    if turned:
        return f"; its axes are in another order, give jnp.transpose({seen.name}, {turned[0]})"
    differs = seen.differs(sizes)
    axis = next((axis for axis in differs if axis.letter), None)
    if axis is None:
        return ""
    letter, n = axis.letter.rpartition(".")[2], sizes[axis.letter]
    return f"; {letter} is {n} in {_witness(others, axis.letter, n)}"


def _a(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
