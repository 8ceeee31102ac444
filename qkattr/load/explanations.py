"""Labels of features that others wrote: Neuronpedia's bulk explanations.

    {"modelId": ..., "layer": "20-gemmascope-res-16k", "index": "345", "description": "...", ...}

one JSON object a line, gzipped or not. The set's name begins with the layer: layer L of a set over
the residual stream after the block is boundary L + 1, before the block (`pre`) boundary L.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qkattr.errors import InputError, clipped, quoted

_LAYER = re.compile(r"(\d{1,4})(-.*)?", re.DOTALL)
_OTHER_HOOK = re.compile(r"mlp|att|mid|transcoder|clt|hook_z", re.IGNORECASE)

#: Characters of a label that are kept.
LONGEST = 300


def read_explanations(
    path: str | Path,
    widths: Mapping[int, int],
    *,
    pre: bool = False,
    boundary: int | None = None,
) -> dict[tuple[int, int], str]:
    """Explanations by (boundary, feature); of several for one feature, the first.

    Args:
      widths: how many features each boundary has.
      pre: the SAEs read the stream before their block.
      boundary: the only one that rows may be for; None: any that there is.

    Raises:
      InputError: the file cannot be read, a row is not an explanation, or it is for a layer or a
        feature that is not there.
    """
    labels: dict[tuple[int, int], str] = {}
    for number, row in _rows(Path(path)):
        where = f"{path}, line {number}"
        b = _boundary(row, where, pre)
        if b not in widths or boundary not in (None, b):
            expected = (
                f"boundaries {min(widths)}..{max(widths)}"
                if boundary is None
                else f"boundary {boundary}"
            )
            raise InputError(
                f"{where} is for layer {quoted(row['layer'])}, boundary {b}; expected {expected}; "
                f"give the explanations of these SAEs"
            )
        labels.setdefault((b, _index(row, where, b, widths[b])), _text(row, where))
    if not labels:
        raise InputError(f"{path} holds no explanations; give Neuronpedia's .jsonl.gz")
    return labels


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if packed
            else path.open(encoding="utf-8") as file
        ):
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _row(line, f"{path}, line {number}")
    except InputError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as e:
        raise InputError(f"{path} is damaged ({e}); download it again") from e
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}; give another path") from e


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where} is not JSON; give Neuronpedia's .jsonl.gz") from e
    if not isinstance(row, dict):
        raise InputError(f"{where} is {quoted(line)}, expected an object; give its .jsonl.gz")
    for name in ("layer", "index", "description"):
        if name not in row:
            raise InputError(
                f"{where} has no {name}; expected layer, index and description, as Neuronpedia "
                f"exports them"
            )
    return row


def _boundary(row: dict[str, Any], where: str, pre: bool) -> int:
    match = _LAYER.fullmatch(str(row["layer"]))
    if not match or _OTHER_HOOK.search(match[2] or ""):
        raise InputError(
            f"{where} is for {quoted(str(row['layer']))}, which is not a set of SAEs over the "
            f"residual stream; give the explanations of one"
        )
    return int(match[1]) + (not pre)


def _index(row: dict[str, Any], where: str, boundary: int, width: int) -> int:
    text = str(row["index"])
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) >= width:
        raise InputError(
            f"{where} is for feature {quoted(text)}; boundary {boundary} has 0..{width - 1}; give "
            f"the explanations of these SAEs"
        )
    return int(text)


def _text(row: dict[str, Any], where: str) -> str:
    text = row["description"]
    if not isinstance(text, str):
        raise InputError(f"{where}: its description is {text!r:.40}; expected text")
    return clipped(" ".join(text.split()), LONGEST)
