"""A file of prompts.

.txt    one prompt a line, empty lines left out
.toml   [[prompt]]  text = "..."  and, if wanted, from, to (positions to look between) and group
        (prompts of one group are paraphrases of one another)
"""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

from qkattr.errors import InputError, quoted
from qkattr.load.bundle import Prompt

_FIELDS = {"text": "prompt", "from": "source", "to": "target", "group": "group"}


@dataclasses.dataclass(frozen=True)
class GivenPrompt:
    """A prompt; source, target: positions to look between (None: chosen by influence, and the
    last); group: "" or the name of its paraphrases."""

    prompt: Prompt
    source: int | str | None = None
    target: int | str | None = None
    group: str = ""


def read_prompts(path: str | Path) -> list[GivenPrompt]:
    """The prompts of a file.

    Raises:
      InputError: it cannot be read, holds none, or is not of this form.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}; give another path") from e
    except ValueError as e:
        raise InputError(f"{path} is not UTF-8 text; give a .txt or .toml of prompts") from e
    if path.suffix == ".toml":
        prompts = _from_toml(path, text)
    else:
        prompts = [GivenPrompt(line) for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"{path} holds no prompts; write one a line, or [[prompt]] tables")
    return prompts


def _from_toml(path: Path, text: str) -> list[GivenPrompt]:
    try:
        raw = tomllib.loads(text)
    except ValueError as e:
        raise InputError(f"{path} is not TOML: {e}; mend it") from e
    tables = raw.get("prompt", [])
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise InputError(f"{path} should hold [[prompt]] tables; write one for each prompt")
    return [_from_table(path, i, table) for i, table in enumerate(tables)]


def _from_table(path: Path, i: int, table: dict) -> GivenPrompt:
    for name, value in table.items():
        if name not in _FIELDS:
            known = ", ".join(_FIELDS)
            raise InputError(f"{path}: prompt {i + 1} has {quoted(name)}; known are {known}")
        allowed = (str,) if name in ("text", "group") else (str, int)
        if not isinstance(value, allowed) or isinstance(value, bool):
            raise InputError(f"{path}: {name} of prompt {i + 1} is {value!r:.40}; give text")
    if "text" not in table:
        raise InputError(f"{path}: prompt {i + 1} has no text; give it one")
    return GivenPrompt(**{_FIELDS[name]: value for name, value in table.items()})
