"""Columns on disk: one .npz without pickles, compressed by LZMA.

Each column in the smallest integer type that holds it; texts as UTF-8, one after the other, with
their lengths; the rest as JSON. A file is read whole: the shipped set is a few megabytes.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qkattr.errors import InputError
from qkattr.files import DAMAGED_NPZ, write_files

SCHEMA = 1


def write_columns(
    path: Path,
    meta: Mapping[str, Any],
    columns: Mapping[str, np.ndarray],
    texts: Mapping[str, list[str]],
) -> None:
    """Write the file; what was there survives a failure. meta: what JSON can say of them."""
    packed = {name: _small(column) for name, column in columns.items()}
    for name, listed in texts.items():
        packed |= _joined(name, listed)
    header = json.dumps({"schema": SCHEMA, **meta}).encode()
    packed["header"] = np.frombuffer(header, np.uint8)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        for name, column in packed.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, column, allow_pickle=False)
    write_files(path.parent, {path.name: buffer.getvalue()})


def read_columns(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """`(meta, columns)` of a file that `write_columns` wrote; `split` makes texts of theirs.

    Raises:
      InputError: it is no such file, damaged, or of another schema.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}; give cards that `qkattr features --out` wrote")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            columns = {name: data[name] for name in data.files}
        meta = json.loads(columns.pop("header").tobytes())
        schema = meta.pop("schema")
    except DAMAGED_NPZ as e:
        raise InputError(
            f"{path} holds no feature cards, or is damaged ({type(e).__name__}); make them again "
            f"with `qkattr features --out`"
        ) from e
    if schema != SCHEMA:
        raise InputError(
            f"{path} has schema {schema}, this qkattr reads schema {SCHEMA}; make the cards again"
        )
    return meta, columns


def split(columns: Mapping[str, np.ndarray], name: str) -> list[str]:
    """The texts that were written under a name.

    Raises:
      ValueError: they are not as long as they say.
    """
    blob, lengths = columns[f"{name}.text"].tobytes(), columns[f"{name}.length"].astype(int)
    ends = np.cumsum(lengths)
    if len(blob) != lengths.sum():
        raise ValueError(f"{len(blob)} bytes of {name}s, their lengths say {lengths.sum()}")
    parts = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
    return [blob[start:end].decode() for start, end in parts]


def _small(column: np.ndarray) -> np.ndarray:
    """Integers in the smallest type that holds them, floats as they are."""
    column = np.asarray(column)
    if not np.issubdtype(column.dtype, np.integer) or not column.size:
        return column
    low, high = int(column.min()), int(column.max())
    if low < 0:  # a signed type: it holds -1 - high where it holds high
        low, high = min(low, -1 - high), 0
    return column.astype(np.result_type(np.min_scalar_type(low), np.min_scalar_type(high)))


def _joined(name: str, texts: list[str]) -> dict[str, np.ndarray]:
    encoded = [text.encode(errors="backslashreplace") for text in texts]
    return {
        f"{name}.text": np.frombuffer(b"".join(encoded), np.uint8),
        f"{name}.length": _small(np.array([len(text) for text in encoded], int)),
    }
