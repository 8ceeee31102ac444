"""A file of prompts.

.txt    one prompt a line, empty lines left out
.toml   [[prompt]]  text = "..."  and, if wanted, from, to (positions to look between) and group
        (prompts of one group are paraphrases of one another)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qkattr.errors import InputError, quoted
from qkattr.files import read_text, read_toml
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
    if path.suffix == ".toml":
        prompts = _from_toml(path)
    else:
        prompts = [GivenPrompt(line) for line in read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"{path} holds no prompts; write one on each line, or [[prompt]] tables")
    return prompts


def _from_toml(path: Path) -> list[GivenPrompt]:
    tables = read_toml(path).get("prompt", [])
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
            give = "give text" if allowed == (str,) else "give an index or a token's text"
            raise InputError(f"{path}: {name} of prompt {i + 1} is {value!r:.40}; {give}")
    if "text" not in table:
        raise InputError(f"{path}: prompt {i + 1} has no text; give it one")
    return GivenPrompt(**{_FIELDS[name]: value for name, value in table.items()})
