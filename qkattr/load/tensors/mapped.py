"""A safetensors file as memory-mapped NumPy arrays: nothing is read until it is used.

The safetensors library checks the file (header size, types, offsets against the shapes and the
file's length). Its own NumPy loader copies, so the arrays are mapped here, at the offsets of the
header that it has just accepted: each by itself, so that what was read of a tensor leaves memory
with the array.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from qkattr.errors import InputError

#: The types that weights may have, as safetensors names them.
FLOATS = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_DTYPES = FLOATS | {"U8": np.dtype("u1")}
_LENGTH_BYTES = 8  # the header's length, little-endian, opens the file


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class MappedTensors:
    """The tensors of one safetensors file. `where` is how errors call it; metadata: its own."""

    where: str
    metadata: dict[str, str]
    _entries: dict[str, _Entry]
    _path: Path
    _header: int  # its length, after which the offsets count

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def type(self, name: str) -> str:
        """A tensor's type as the file names it: F32, BOOL, I64, ..."""
        return self._entries[name].dtype

    def read(self, name: str) -> np.ndarray:
        """A read-only view of one tensor, in the file's own type.

        Raises:
          InputError: the tensor is neither of floats nor of uint8, or the file has been taken away
            or cut short since it was opened.
        """
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise not_floats(self.where, name, entry.dtype)
        (start, stop), dtype = entry.data_offsets, _DTYPES[entry.dtype]
        if start == stop:  # nothing cannot be mapped
            return np.empty(entry.shape, dtype)
        try:
            data = np.memmap(self._path, np.uint8, "r", self._header + start, (stop - start,))
        except (OSError, ValueError) as e:
            raise InputError(f"{self.where} changed while it was read ({e}); start again") from e
        return np.asarray(data).view(dtype).reshape(entry.shape)


def header_bytes(path: Path) -> int:
    """The length of a safetensors file's header, its length field included."""
    with path.open("rb") as file:
        return _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")


def open_mapped(path: Path, where: str | None = None) -> MappedTensors:
    """Map a safetensors file, which may hold tensors of any type: only those that are read must be
    of floats or uint8.

    Raises:
      InputError: there is no such file, or it is cut short or corrupt.
    """
    where = where or path.name
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as e:
        raise InputError(
            f"{where} is not a whole safetensors file ({e}); copy or download it again"
        ) from e
    length = header_bytes(path)
    with path.open("rb") as file:
        header = msgspec.json.decode(file.read(length)[_LENGTH_BYTES:])
    metadata = header.pop("__metadata__", None) or {}
    entries = msgspec.convert(header, dict[str, _Entry])
    return MappedTensors(where, metadata, entries, path, length)


def not_floats(where: str, name: str, kind: str) -> InputError:
    """What to say of a tensor that should hold weights and is of another type."""
    return InputError(
        f"{where}: {name} is {kind}, expected {', '.join(FLOATS)}; convert the file to one of them"
    )


def check_finite(tensor: np.ndarray, name: str, where: str) -> None:
    """Raise `InputError` if the tensor holds a NaN or an infinity; the sum finds them cheaply."""
    with np.errstate(all="ignore"):
        suspicious = not np.isfinite(tensor.sum(dtype=np.float32))
    if suspicious and not np.isfinite(tensor).all():
        raise InputError(
            f"{where}: {name} holds NaN or infinite values; the file is damaged or its training "
            "diverged"
        )
