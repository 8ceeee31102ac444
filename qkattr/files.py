"""Small files read whole, files that are written whole or not at all, and values as JSON."""

from __future__ import annotations

import contextlib
import json
import lzma
import math
import os
import tempfile
import tomllib
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from qkattr.errors import InputError

#: What `np.load` raises on a file that is cut short, overwritten or no archive at all.
DAMAGED_NPZ = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    TypeError,
    AttributeError,
    SyntaxError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


def read_text(path: str | Path, what: str = "UTF-8 text") -> str:
    """The text of a file.

    what: what errors say that it should be.

    Raises:
      InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}; give another path") from e
    except ValueError as e:
        raise InputError(f"{path} is not {what}: {e}; mend it") from e


def read_toml(path: str | Path) -> dict[str, Any]:
    """What a TOML file holds.

    Raises:
      InputError: it cannot be read, or is not TOML.
    """
    text = read_text(path, "TOML")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is not TOML: {e}; mend it") from e


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `InputError` if it is anything else."""
    try:
        value = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise InputError(f"{path} cannot be read as JSON ({e}); copy or download it again") from e
    if not isinstance(value, dict):
        raise InputError(
            f"{path} holds a JSON {type(value).__name__}, expected an object; copy or download "
            "it again"
        )
    return value


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end.

    After an exception it is gone, and what was at `path` is unchanged.

    Raises:
      OSError: the folder cannot be written to, or `path` is a folder.
    """
    with _replacing([path]) as [temporary]:
        yield temporary


@contextlib.contextmanager
def _replacing(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """`replacing` of several: none takes its place before all are on the disk."""
    made: list[Path] = []
    try:
        for path in paths:
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(handle)
            made.append(Path(name))
        yield made
        mask = os.umask(0)
        os.umask(mask)
        for temporary in made:
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o666 & ~mask)
        for temporary, path in zip(made, paths, strict=True):
            os.replace(temporary, path)
    finally:
        for temporary in made:
            temporary.unlink(missing_ok=True)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all of the files or none: to temporary names first, then renamed in their order.

    Raises:
      InputError: the folder cannot be written, or the disk is full; files that were there are
        unchanged.
    """
    check_writable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _replacing([folder / name for name in files]) as temporaries:
            for temporary, content in zip(temporaries, files.values(), strict=True):
                temporary.write_bytes(content)
    except OSError as e:
        raise InputError(
            f"cannot write to {folder}: {_reason(e)}; what was there is unchanged, make room or "
            f"choose another folder"
        ) from e


def check_writable(folder: Path) -> None:
    """Fail before the work, not after it. Nothing is made yet.

    Raises:
      InputError: the folder cannot be made or written to.
    """
    try:
        existing = folder
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise NotADirectoryError(None, f"{existing} is a file")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except (OSError, ValueError) as e:
        raise InputError(f"cannot write to {folder}: {_reason(e)}; choose another folder") from e


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def encoded(value: Any) -> bytes:
    r"""JSON in UTF-8 as the standard has it: what is not finite is null. Half a surrogate pair,
    which UTF-8 does not have, becomes its escape, `\udc80`."""
    try:
        return msgspec.json.encode(value, enc_hook=_plain)
    except UnicodeEncodeError:
        return dumps(value).encode(errors="backslashreplace")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):  # an option that the caller computed
        return value.item()
    raise NotImplementedError


def dumps(value: Any, *, ascii: bool = False) -> str:
    """JSON as the standard has it: what is not finite is null."""
    try:
        return json.dumps(value, ensure_ascii=ascii, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=ascii, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
