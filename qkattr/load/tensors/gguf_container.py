"""The GGUF container: metadata, and where the bytes of each tensor lie.

    file      "GGUF", version u32, number of tensors u64, number of entries u64,
              the entries, the tensors, padding, the data
    entry     key string, type u32, value
    tensor    name string, number of sizes u32, sizes u64 (the innermost first), type u32,
              offset in the data u64
    string    length u64, UTF-8
    array     type of an element u32, number of elements u64, the elements

Numbers are little-endian. The data begins at a multiple of `general.alignment`. A file is parsed
in one pass over a memory map. The numbers of an array stay in the map until they are asked for. The
strings of an array, which are most of a file's metadata, are cut out by a loop that does nothing
else. Every length is compared with what the file holds before anything of that length is made.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qkattr.errors import InputError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY = 8, 9
#: The types of numbers, by their code in the file.
_NUMBERS = {
    code: np.dtype(name)
    for code, name in {
        0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
        10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_MOST_SIZES = 4  # of a tensor in ggml
_ALIGNMENT = 32  # where a file does not say
_SHORT = "it ends too early"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file. shape: the outermost size first. code: of its type. offset: in the
    data."""

    name: str
    shape: tuple[int, ...]
    code: int
    offset: int

    def __str__(self) -> str:
        return f"{self.kind.name} {list(self.shape)}"

    @property
    def kind(self) -> GGMLQuantizationType:
        """Its type; `ValueError` where the gguf package knows none of that code."""
        import gguf

        return gguf.GGMLQuantizationType(self.code)

    def byte_shape(self) -> tuple[int, ...]:
        """The shape of its bytes in the file: the last size counts the bytes of a row.

        Raises:
          ValueError: its type is not known, or its rows are not whole blocks of that type.
        """
        from gguf.quants import quant_shape_to_byte_shape

        return quant_shape_to_byte_shape(self.shape, self.kind)


@dataclasses.dataclass(frozen=True)
class Container:
    """A parsed file. start: where the data begins; size: of the file, in bytes."""

    path: Path
    tensors: dict[str, Tensor]
    start: int
    size: int
    _metadata: dict[str, Any] = dataclasses.field(repr=False)

    def keys(self) -> list[str]:
        """The keys of the metadata, in the file's order."""
        return list(self._metadata)

    def get(self, key: str, default: Any = None) -> Any:
        """One value of the metadata: a number, a string, or a list of either."""
        value = self._metadata.get(key, default)
        return value.tolist() if isinstance(value, np.ndarray) else value

    def bytes(self, tensor: Tensor) -> np.ndarray:
        """The bytes of a tensor, mapped, in the shape of `Tensor.byte_shape`.

        Raises:
          InputError: the file has been taken away or cut short since it was parsed.
        """
        shape = tensor.byte_shape()
        start, count = self.start + tensor.offset, math.prod(shape)
        if count == 0:  # nothing cannot be mapped
            return np.empty(shape, np.uint8)
        try:
            return np.asarray(np.memmap(self.path, np.uint8, "r", start, (count,))).reshape(shape)
        except (OSError, ValueError) as e:
            raise InputError(
                f"{self.path.name} changed while it was read ({e}); start again"
            ) from e


def open_container(path: Path) -> Container:
    """Parse a file, and check that it holds all bytes of every tensor.

    Raises:
      InputError: it cannot be read, is not a GGUF file, or a part of it is wrong or missing.
    """
    try:
        container = parse(path)
        for tensor in container.tensors.values():
            end = container.start + tensor.offset + math.prod(tensor.byte_shape())
            if end > container.size:
                raise ValueError(f"{tensor.name!r:.40} ends at byte {end:,} of {container.size:,}")
    except (ValueError, OverflowError, OSError, MemoryError) as e:
        raise InputError(
            f"{path.name} is not a whole GGUF file ({e}); copy or download it again"
        ) from e
    return container


def parse(path: Path) -> Container:
    """Parse a file; the data of its tensors is not read.

    Raises:
      ValueError: it is not a GGUF file, or a part of it is wrong or missing.
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _parse(path, data)
    except struct.error as e:
        raise ValueError(_SHORT) from e


def _parse(path: Path, data: mmap.mmap) -> Container:
    cursor = _Cursor(data)
    if data[:4] != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    cursor.offset = 4
    version = cursor.number(_U32)
    if version not in _VERSIONS:
        big = version & 0xFFFF == 0
        raise ValueError("it is big-endian" if big else f"its version is {version}, not 2 or 3")
    n_tensors, n_entries = cursor.number(_U64), cursor.number(_U64)
    metadata: dict[str, Any] = {}
    for _ in range(n_entries):
        key = cursor.string()
        _once(key, metadata)
        metadata[key] = cursor.value(cursor.number(_U32))
    tensors: dict[str, Tensor] = {}
    for _ in range(n_tensors):
        tensor = cursor.tensor()
        _once(tensor.name, tensors)
        tensors[tensor.name] = tensor
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r:.40}, expected a power of two")
    start = -(-cursor.offset // alignment) * alignment
    return Container(path, tensors, start, len(data), metadata)


def _once(name: str, known: dict[str, Any]) -> None:
    if name in known:
        raise ValueError(f"it has {name!r:.40} twice")


@dataclasses.dataclass
class _Cursor:
    """A place in a file's bytes. What is read moves it on."""

    data: mmap.mmap
    offset: int = 0

    def number(self, kind: struct.Struct) -> Any:
        (value,) = kind.unpack_from(self.data, self.offset)
        self.offset += kind.size
        return value

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """Several strings, one after another: the loop that most of the time goes into."""
        self._need(count, _U64.size)
        data, offset, end, length = self.data, self.offset, len(self.data), _U64.unpack_from
        found = []
        for _ in range(count):
            start = offset + 8
            offset = start + length(data, offset)[0]
            if offset > end:
                raise ValueError("a string in it ends after the file")
            found.append(data[start:offset])
        self.offset = offset
        try:
            return [string.decode() for string in found]
        except UnicodeDecodeError as e:
            raise ValueError(f"a string in it is not UTF-8: {e.object!r:.40}") from e

    def value(self, code: int) -> Any:
        """A value of the metadata; an array of numbers as a view of the file."""
        if code == _STRING:
            return self.string()
        if code != _ARRAY:
            return self.numbers(code, 1)[0].item()
        of, count = self.number(_U32), self.number(_U64)
        return self.strings(count) if of == _STRING else self.numbers(of, count)

    def numbers(self, code: int, count: int) -> np.ndarray:
        if code not in _NUMBERS:
            raise ValueError(f"a value in it has the type {code}, which is not known here")
        kind = _NUMBERS[code]
        self._need(count, kind.itemsize)
        found = np.frombuffer(self.data, kind, count, self.offset)
        self.offset += found.nbytes
        return found

    def tensor(self) -> Tensor:
        name, count = self.string(), self.number(_U32)
        if not 1 <= count <= _MOST_SIZES:
            raise ValueError(f"{name!r:.40} has {count} sizes, expected 1 to {_MOST_SIZES}")
        shape = tuple(self.number(_U64) for _ in range(count))[::-1]
        return Tensor(name, shape, self.number(_U32), self.number(_U64))

    def _need(self, count: int, size: int) -> None:
        if count * size > len(self.data) - self.offset:
            raise ValueError(_SHORT)
