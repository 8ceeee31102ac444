"""The members of a zip file, mapped or inflated within bounds: what `.npz` and PyTorch files are.

A member that is stored is a view of the mapped file and costs no memory. One that is deflated is
inflated only when the file as a whole claims no more than `_RATIO` times its own size: weights
hardly compress, a bomb does nothing else.
"""

from __future__ import annotations

import dataclasses
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qkattr.errors import InputError, clipped

_RATIO, _SLACK = 16, 2**20  # inflated bytes may be this many times the file's, and so many more
_DIRECTORY = 2**20  # bytes of a zip's directory, which zipfile reads whole
_LOCAL, _END, _END64 = struct.Struct("<4s22xHH"), b"PK\5\6", b"PK\6\6"
_UNREADABLE = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, struct.error)


@dataclasses.dataclass(frozen=True)
class Member:
    """One member: its bytes in the file, and how many it has once inflated."""

    name: str
    stored: np.ndarray
    size: int
    deflated: bool

    def head(self, most: int) -> bytes:
        """The first bytes, at most so many."""
        if not self.deflated:
            return self.stored[:most].tobytes()
        return zlib.decompressobj(-15).decompress(self.stored[: 2 * most].data, most)

    def read(self) -> np.ndarray:
        """All bytes: a view of the file, or inflated."""
        if not self.deflated:
            return self.stored
        inflated = zlib.decompressobj(-15).decompress(self.stored.data, self.size)
        return np.frombuffer(inflated, np.uint8)


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A tensor of an archive: its type and shape, and how to get it."""

    dtype: str
    shape: tuple[int, ...]
    get: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Archive:
    """The tensors of one file, as `MappedTensors` has them. where: how errors call it."""

    where: str
    tensors: dict[str, Lazy]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def type(self, name: str) -> str:
        return self.tensors[name].dtype

    def read(self, name: str) -> np.ndarray:
        """A read-only view of one tensor, or a copy if it lies in the file compressed."""
        try:
            return self.tensors[name].get()
        except InputError:
            raise
        except (zlib.error, ValueError) as e:
            raise damaged(self.where, f"{clipped(name, 60)}: {e}") from e


def damaged(where: str, what: object) -> InputError:
    return InputError(f"{where} is not a whole file ({what}); copy or download it again")


def open_members(path: Path, where: str) -> dict[str, Member]:
    """Every member of a zip by its name, nothing read but the directory.

    Raises:
      InputError: the file is cut short or no zip; or its members overlap its end, are encrypted,
        have one name, or claim more bytes than a file of its size holds.
    """
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as file:
            infos = file.infolist()
        data = np.memmap(path, np.uint8, mode="r")
        members = {info.filename: _member(data, info) for info in infos}
    except _UNREADABLE as e:
        raise damaged(where, e) from e
    if len(members) < len(infos):
        raise damaged(where, "two members have one name")
    claimed, most = sum(m.size for m in members.values()), _RATIO * data.size + _SLACK
    if claimed > most:
        raise InputError(
            f"{where} has {data.size} bytes and claims to hold {claimed}, expected at most {most}; "
            "it is damaged, or was made to fill the memory; download it "
            "again from a source that you trust"
        )
    return members


def _check_directory(path: Path) -> None:
    """Raise `ValueError` if the directory that zipfile is about to read is absurdly large."""
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 2**16 - 128))
        tail = file.read()
    for mark, start, length in ((_END, 12, 4), (_END64, 40, 8)):
        at = tail.rfind(mark)
        size = int.from_bytes(tail[at + start : at + start + length], "little") if at >= 0 else 0
        if size > _DIRECTORY and size != 2**32 - 1:
            raise ValueError(f"its directory has {size} bytes")


def _member(data: np.ndarray, info: zipfile.ZipInfo) -> Member:
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename!r:.60} is encrypted or compressed in an unknown way")
    at, deflated = info.header_offset, info.compress_type == zipfile.ZIP_DEFLATED
    mark, name, extra = _LOCAL.unpack(data[at : at + _LOCAL.size].tobytes())
    start = at + _LOCAL.size + name + extra
    stored = np.asarray(data[start : start + info.compress_size])
    whole = stored.size == info.compress_size and (deflated or stored.size == info.file_size)
    if mark != b"PK\3\4" or not whole:
        raise ValueError(f"{info.filename!r:.60} lies beyond its end")
    return Member(info.filename, stored, info.file_size, deflated)
