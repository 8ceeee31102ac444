"""A PyTorch `.pt` file as arrays, read without PyTorch and without running anything in it.

The file is a zip: `data.pkl`, a pickle that describes containers and tensors, and the bytes of each
storage. A pickle is a program; here `pickletools` splits it into instructions and the few that
build plain containers and tensors are carried out on plain values. A name that it would import is
looked up in a small table, never imported, and anything else is refused before it means
anything. Storages stay in the mapped file. (Python's own unpickler would not do, however few
classes it may find: `}` and the tuples that every tensor has suffice for a key that takes for ever
to hash, or that crashes the interpreter.)
"""

from __future__ import annotations

import collections
import dataclasses
import pickletools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qkattr.errors import InputError, clipped
from qkattr.load.tensors.archive import Archive, Lazy, Member, damaged, open_members

_PICKLE = 2**20  # bytes: a state dict of an SAE has a thousand
_VALUES = 10_000  # in all dicts
_PATH = 1000  # characters of a tensor's name, with those of the dicts that it lies in
_AXES = 32  # of a tensor
_STORAGES = {
    "FloatStorage": ("F32", np.dtype("<f4")),
    "HalfStorage": ("F16", np.dtype("<f2")),
    "BFloat16Storage": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "DoubleStorage": ("F64", np.dtype("<f8")),
    "LongStorage": ("I64", np.dtype("<i8")),
    "IntStorage": ("I32", np.dtype("<i4")),
    "ShortStorage": ("I16", np.dtype("<i2")),
    "CharStorage": ("I8", np.dtype("i1")),
    "ByteStorage": ("U8", np.dtype("u1")),
    "BoolStorage": ("BOOL", np.dtype("?")),
}
_ADMITTED = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *(f"torch.{name}" for name in _STORAGES),
}
_MARK = object()


def open_torch(path: Path, where: str) -> Archive:
    """Map the tensors of a file that `torch.save` wrote: a dict of tensors, at any depth, whose
    keys are joined by dots. Whatever else the dict holds is left out.

    Raises:
      InputError: the file is cut short, older than PyTorch 1.6, holds anything but containers and
        tensors, or a tensor does not fit its storage.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise InputError(
                f"{where} is not a zip: an old PyTorch file or none; load and save it again with "
                "PyTorch 1.6 or later, or as safetensors"
            )
    members = open_members(path, where)
    found = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
        raise damaged(where, "no data.pkl, or more than one")
    root = found[0].removesuffix("data.pkl")
    order = members.get(f"{root}byteorder")
    if any(m.deflated for m in members.values()) or members[found[0]].size > _PICKLE:
        raise InputError(
            f"{where}: PyTorch compresses nothing and needs less than {_PICKLE} bytes "
            "to describe an SAE; save it again with torch.save"
        )
    if order is not None and order.head(8).strip() != b"little":
        raise InputError(f"{where} was written by a big-endian machine; save it on another")
    try:
        value = _Reader(root, members).run(members[found[0]].read().tobytes())
        tensors = dict(_flat(value))
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as e:
        raise InputError(
            f"{where} holds more than tensors in plain containers ({clipped(str(e), 120)}), which "
            "is not read because it may run code; save its state_dict() as safetensors"
        ) from e
    return Archive(where, tensors)


def _flat(value: Any) -> Iterator[tuple[str, Lazy]]:
    """`(name, tensor)` of every tensor in nested dicts."""
    waiting, seen = [("", value)], 0
    while waiting:
        path, value = waiting.pop()
        if len(path) > _PATH:  # one long key may be in another many times
            raise ValueError(f"a name of more than {_PATH} characters")
        if isinstance(value, Lazy):
            yield path, value
        elif isinstance(value, dict):
            seen += len(value)
            if seen > _VALUES:  # one dict may be in another many times
                raise ValueError(f"more than {_VALUES} values")
            at = f"{path}." if path else ""
            waiting += [(f"{at}{key}", inner) for key, inner in value.items()]


@dataclasses.dataclass(frozen=True)
class _Name:
    """Something that the pickle would import."""

    full: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    kind: str
    dtype: np.dtype
    data: np.ndarray


class _Reader:
    """Carries out a pickle's instructions. Everything it makes is as large as what it reads."""

    def __init__(self, root: str, members: dict[str, Member]):
        self.root, self.members = root, members
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in _CONSTANTS:
                self.stack.append(
                    argument if _CONSTANTS[opcode.name] is ... else _CONSTANTS[opcode.name]
                )
            elif opcode.name in _INSTRUCTIONS:
                _INSTRUCTIONS[opcode.name](self, argument)
            else:
                raise ValueError(f"the instruction {opcode.name}")
        raise ValueError("no end")

    def items(self) -> list[Any]:
        """What lies above the topmost mark."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def tuple(self, n: int, _: Any) -> None:
        items = [self.stack.pop() for _ in range(n)][::-1]
        self.stack.append(tuple(items))

    def name(self, full: str) -> None:
        if full not in _ADMITTED:
            raise ValueError(f"it would import {full}")
        self.stack.append(_Name(full))

    def stack_name(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(f"{module}.{name}")

    def extend(self, _: Any) -> None:
        items = self.items()
        _plain(self.stack[-1], list).extend(items)

    def append(self, _: Any) -> None:
        item = self.stack.pop()
        _plain(self.stack[-1], list).append(item)

    def update(self, items: list[Any]) -> None:
        if any(type(key) not in (str, int) for key in items[::2]):
            raise ValueError("a key that is no text")  # and may take forever to hash
        _plain(self.stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def storage(self, _: Any) -> None:
        """A persistent id: ("storage", its type, its member, a device, how many elements)."""
        tag, kind, key, _, count = self.stack.pop()
        known = isinstance(kind, _Name) and type(key) is str and type(count) is int
        if type(tag) is not str or tag != "storage" or not known:
            raise ValueError("a storage that is none")
        short, dtype = _STORAGES[kind.full.removeprefix("torch.")]
        data = self.members[f"{self.root}data/{key}"].read()
        if data.size != count * dtype.itemsize:
            raise ValueError(f"storage {key} has {data.size} bytes, not {count} of {dtype}")
        self.stack.append(_Storage(short, dtype, data))

    def call(self, _: Any) -> None:
        arguments, what = self.stack.pop(), self.stack.pop()
        if not isinstance(what, _Name) or not isinstance(arguments, tuple):
            raise ValueError("a call of what was not imported")
        self.stack.append(_CALLS[what.full](*arguments))

    def build(self, _: Any) -> None:
        """The state of an object. A state dict has one, its versions (`_metadata`): left out."""
        state = self.stack.pop()
        if type(self.stack[-1]) is not collections.OrderedDict or type(state) is not dict:
            raise ValueError("an object with a state")

    def put(self, at: int | None) -> None:
        self.memo[len(self.memo) if at is None else at] = self.stack[-1]

    def get(self, at: int) -> None:
        self.stack.append(self.memo[at])


def _plain(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"items put into {type(value).__name__}")
    return value


def _tensor(storage, offset, shape, strides, *_: Any) -> Lazy:
    """A strided view of a storage, no larger than it: a shape may not stretch one number."""
    whole = isinstance(storage, _Storage) and len(shape) == len(strides) <= _AXES
    if not whole or not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor that is none")
    count, last, n = 1, offset, storage.data.size // storage.dtype.itemsize
    for size, stride in zip(shape, strides, strict=True):
        count, last = count * size, last + (size - 1) * stride
    if count > n or (count and last >= n):
        raise ValueError(f"a tensor {list(shape)[:4]} beyond its storage of {n}")
    return Lazy(storage.kind, tuple(shape), partial(_view, storage, offset, shape, strides))


def _view(storage: _Storage, offset: int, shape, strides) -> np.ndarray:
    elements = storage.data.view(storage.dtype)[offset:]
    steps = tuple(stride * storage.dtype.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(elements, shape, steps, writeable=False)


def _ordered(*arguments: Any) -> collections.OrderedDict:
    if arguments and arguments != ([],):
        raise ValueError("an OrderedDict made of something")
    return collections.OrderedDict()


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
}
_CONSTANTS: dict[str, Any] = dict.fromkeys(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"), ...
) | dict(NONE=None, NEWTRUE=True, NEWFALSE=False, MARK=_MARK)
_INSTRUCTIONS: dict[str, Callable[[_Reader, Any], None]] = dict(
    PROTO=lambda self, _: None,
    FRAME=lambda self, _: None,
    EMPTY_DICT=lambda self, _: self.stack.append({}),
    EMPTY_LIST=lambda self, _: self.stack.append([]),
    EMPTY_TUPLE=lambda self, _: self.stack.append(()),
    TUPLE=lambda self, _: self.stack.append(tuple(self.items())),
    TUPLE1=lambda self, _: self.tuple(1, _),
    TUPLE2=lambda self, _: self.tuple(2, _),
    TUPLE3=lambda self, _: self.tuple(3, _),
    APPEND=_Reader.append,
    APPENDS=_Reader.extend,
    SETITEM=_Reader.set_item,
    SETITEMS=lambda self, _: self.update(self.items()),
    GLOBAL=lambda self, name: self.name(name.replace(" ", ".")),
    STACK_GLOBAL=_Reader.stack_name,
    BINPERSID=_Reader.storage,
    REDUCE=_Reader.call,
    BUILD=_Reader.build,
    BINPUT=_Reader.put,
    LONG_BINPUT=_Reader.put,
    MEMOIZE=_Reader.put,
    BINGET=_Reader.get,
    LONG_BINGET=_Reader.get,
)
