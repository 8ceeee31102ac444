"""Small files, read whole: text, JSON, TOML."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qkattr.errors import InputError


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


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
      InputError: it cannot be read, or is not JSON.
    """
    return _read(path, json.loads, "JSON")


def read_toml(path: str | Path) -> dict[str, Any]:
    """What a TOML file holds.

    Raises:
      InputError: it cannot be read, or is not TOML.
    """
    return _read(path, tomllib.loads, "TOML")


def _read(path: str | Path, parse: Callable[[str], Any], what: str) -> Any:
    text = read_text(path, what)
    try:
        return parse(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is not {what}: {e}; mend it") from e
