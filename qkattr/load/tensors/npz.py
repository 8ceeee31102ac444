"""A NumPy `.npz` file as arrays: nothing is read until it is used, and no object is ever made.

Members that are stored, as `numpy.savez` does, stay in the mapped file.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from qkattr.errors import InputError, clipped
from qkattr.load.tensors.archive import Archive, Lazy, Member, damaged, open_members

_TYPES = {"<f4": "F32", "<f2": "F16", "<f8": "F64"}
_HEADER = 2**14  # bytes; NumPy writes 128


def open_npz(path: Path, where: str) -> Archive:
    """Map an npz file. Arrays that are not of floats are listed, by NumPy's name of their type, and
    cannot be read: one of objects would be a pickle.

    Raises:
      InputError: the file is cut short or no npz, or the shape of an array of floats is not what
        its member has bytes for.
    """
    tensors = {}
    for name, member in open_members(path, where).items():
        tensors[name.removesuffix(".npy")] = _tensor(member, where)
    return Archive(where, tensors)


def _tensor(member: Member, where: str) -> Lazy:
    name = clipped(member.name, 60)
    try:
        shape, fortran, dtype, length = _header(member.head(_HEADER))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as e:
        raise damaged(where, f"{name}: {e}") from e
    kind = _TYPES.get(dtype.str)
    if kind is None:
        return Lazy(dtype.str, shape, partial(_refuse, where, name, dtype.str))
    count = 1
    for n in shape:
        count *= n  # of Python's integers: NumPy's would overflow on a lying shape
    if member.size != length + count * dtype.itemsize:
        raise InputError(
            f"{where}: {name} says {dtype} {list(shape)}, its {member.size - length} bytes are not "
            "that many; copy or download it again"
        )
    return Lazy(kind, shape, partial(_read, member, length, dtype, shape, "F" if fortran else "C"))


def _refuse(where: str, name: str, kind: str) -> np.ndarray:
    raise InputError(
        f"{where}: {name} is {kind!r:.40}, expected little-endian floats; convert the file"
    )


def _header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    stream = io.BytesIO(head)
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if any(n < 0 for n in shape):
        raise ValueError(f"shape {list(shape)}")
    return shape, fortran, dtype, stream.tell()


def _read(member: Member, start: int, dtype: np.dtype, shape: tuple[int, ...], order) -> np.ndarray:
    return member.read()[start:].view(dtype).reshape(shape, order=order)
