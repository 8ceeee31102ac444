"""What was measured of a prompt, in files that a later run takes it from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qkattr.errors import InputError

Measured = dict[str, Any]


class KeptMeasures:
    """A prompt's measures, each in a file whose name says what made it; without a folder, nowhere.

    made_of: all that they depend on; which other measures were asked for is no part of it.
    """

    def __init__(self, folder: str | Path | None, made_of: dict[str, Any]):
        self.folder = None if folder is None else Path(folder) / "prompts"
        self.made_of = {name: value for name, value in made_of.items() if name != "measures"}

    def get(self, name: str, measure: Callable[[], Measured]) -> Measured:
        """What is there, or else what `measure` returns, which then is there.

        Raises:
          InputError: what is there cannot be read.
        """
        if self.folder is None:
            return measure()
        made_of = json.dumps(dict(**self.made_of, measure=name), sort_keys=True)
        path = self.folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.json"
        if path.is_file():
            return _read(path)
        measured = measure()
        _write(path, measured)
        return measured


def _read(path: Path) -> Measured:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(
            f"{path} cannot be read; delete it, so that its prompt is measured again"
        ) from e


def _write(path: Path, measured: Measured) -> None:
    from qkattr.files import write_files

    text = json.dumps(measured, separators=(",", ":"))
    write_files(path.parent, {path.name: text.encode()})
