"""Labels of features that others wrote: Neuronpedia's bulk explanations.

    {"modelId": ..., "layer": "20-gemmascope-res-16k", "index": "345", "description": "...", ...}

one JSON object a line, gzipped or not. The set's name begins with the layer: layer L of a set over
the residual stream after the block is boundary L + 1, before the block (`pre`) boundary L. Lines
are read one by one, and neither a line nor what a file unpacks to may be of any size.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from qkattr.errors import InputError, clipped, quoted

_LAYER = re.compile(r"(\d{1,4})(-.*)?", re.DOTALL)
_OTHER_HOOK = re.compile(r"mlp|att|mid|transcoder|clt|hook_z", re.IGNORECASE)

#: Characters of a label that are kept.
LONGEST = 300
#: Bytes of a line, and of a whole file, at most; a set of 131,072 features has some 50 MB.
LINE, WHOLE = 2**24, 2**31


def read_explanations(
    path: str | Path,
    widths: Mapping[int, int] | None = None,
    *,
    pre: bool = False,
    boundary: int | None = None,
) -> dict[tuple[int, int], str]:
    """Explanations by (boundary, feature); of several for one feature, the first.

    Args:
      widths: how many features each boundary has; None: any row is taken.
      pre: the SAEs read the stream before their block.
      boundary: the only one that rows may be for; None: any that there is.

    Raises:
      InputError: the file cannot be read, a row is not an explanation, or it is for a layer or a
        feature that is not there.
    """
    labels: dict[tuple[int, int], str] = {}
    for number, row in _rows(Path(path)):
        where = f"{path}, line {number}"
        b = boundary_of(row["layer"], where, pre)
        feature = checked((b, row["index"]), where, widths, boundary)
        labels.setdefault(feature, label_of(row["description"], where))
    if not labels:
        raise InputError(f"{path} holds no explanations; give Neuronpedia's .jsonl.gz")
    return labels


def open_bytes(path: Path) -> IO[bytes]:
    """A file's bytes, unpacked if it is gzipped.

    Raises:
      OSError: it cannot be opened; and while it is read, whatever gzip says of a damaged one.
    """
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else path.open("rb")  # type: ignore[return-value]


#: What reading a damaged gzip file raises.
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows."""
    read = 0
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE + 1), b""), 1):
                read += len(line)
                if len(line) > LINE or read > WHOLE:
                    raise InputError(
                        f"{path}, line {number}: a line has at most {LINE} bytes and a file "
                        f"{WHOLE}; give Neuronpedia's .jsonl.gz"
                    )
                if line.strip():
                    yield number, _row(line.decode("utf-8"), f"{path}, line {number}")
    except DAMAGED as e:
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


def boundary_of(layer: object, where: str, pre: bool) -> int:
    """The boundary of a layer: a number, or the name of a source, `20-gemmascope-res-16k`.

    Raises:
      InputError: it is neither, or the source is not over the residual stream.
    """
    match = _LAYER.fullmatch(str(layer).strip())
    if not match or _OTHER_HOOK.search(match[2] or ""):
        raise InputError(
            f"{where} is for {quoted(str(layer))}, which is not a set of SAEs over the "
            f"residual stream; give the explanations of one"
        )
    return int(match[1]) + (not pre)


def checked(
    feature: tuple[int, object],
    where: str,
    widths: Mapping[int, int] | None,
    boundary: int | None = None,
) -> tuple[int, int]:
    """A feature as (boundary, index), if it is one of the SAEs.

    Raises:
      InputError: its index is no number, or the SAEs have no such boundary or feature.
    """
    b, index = feature[0], str(feature[1]).strip()
    if (widths is not None and b not in widths) or boundary not in (None, b):
        known = f"boundaries {min(widths)}..{max(widths)}" if widths else "another boundary"
        expected = known if boundary is None else f"boundary {boundary}"
        raise InputError(
            f"{where} is for boundary {b}; expected {expected}; give the labels of these SAEs"
        )
    number = int(index) if re.fullmatch(r"[0-9]{1,9}", index) else None
    if number is None or (widths is not None and number >= widths[b]):
        last = f"; boundary {b} has 0..{widths[b] - 1}" if widths is not None else ""
        raise InputError(
            f"{where} is for feature {quoted(index)}{last}; give the labels of these SAEs"
        )
    return b, number


def label_of(text: object, where: str) -> str:
    """A label as one line of bounded length; `InputError` unless it is text."""
    if not isinstance(text, str):
        raise InputError(f"{where}: its description is {text!r:.40}; expected text")
    return clipped(" ".join(text.split()), LONGEST)
