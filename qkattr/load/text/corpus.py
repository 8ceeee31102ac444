"""Text to rows of token ids, all of one length, each beginning with the BOS.

.txt          the whole file is one document
.jsonl(.gz)   a document a line: its "text"
.parquet      a document a row: its column "text" (needs pyarrow)
.npy          rows of token ids as they are, int[n, length], memory-mapped

Documents are joined by the BOS and cut into rows; what does not fill the last row is left out.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qkattr.errors import InputError, quoted
from qkattr.load.text.tokenizer import Tokenizer

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".parquet", ".npy")


def read_rows(
    path: str | Path,
    *,
    tokenizer: Tokenizer | None,
    length: int,
    vocab: int,
    bos: bool | None = None,
) -> np.ndarray:
    """The rows of a text file, `int[n, length]`.

    tokenizer: not needed for .npy. length: tokens of a row. vocab: of the model; ids beyond it are
      refused. bos: whether each row begins with the BOS; None: if the tokenizer has one.

    Raises:
      InputError: the file cannot be read, is not of a known form, or is shorter than one row.
    """
    path = Path(path)
    if not path.name.endswith(ENDINGS):
        raise InputError(
            f"{path.name!r} is not text that qkattr reads; give one of {', '.join(ENDINGS)}"
        )
    if not path.is_file():
        raise InputError(f"no such file: {path}; give a text file")
    if path.suffix == ".npy":
        return _read_npy(path, length, vocab)
    if tokenizer is None:
        raise InputError(f"{path.name} is text, and the model has no tokenizer; give a .npy of ids")
    with_bos = tokenizer.bos_id is not None if bos is None else bos
    ids = _join(documents(path), tokenizer, with_bos)
    body = length - with_bos
    n = len(ids) // body
    if n < 1:
        raise InputError(f"{path} has {len(ids)} tokens, expected at least {body}; give more text")
    rows = ids[: n * body].reshape(n, body)
    if with_bos:
        rows = np.concatenate([np.full((n, 1), tokenizer.need_bos(), rows.dtype), rows], axis=1)
    return _within(rows, vocab, path)


def documents(path: Path) -> Iterator[str]:
    """The documents of a text file, one by one."""
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
        elif path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
        else:
            opener = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _text_of(line, f"{path}, line {number}")
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 text; convert it, or give another file") from e
    except (OSError, EOFError) as e:
        reason = getattr(e, "strerror", None) or e
        raise InputError(f"cannot read {path}: {reason}; give another file") from e


def _text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as e:
        raise InputError(f"{where} is not JSON ({e}); mend it") from e
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{where} has no "text"; give one JSON object a line, with "text"')
    return text


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as e:
        raise InputError(
            f"{path.name} needs pyarrow, which is not installed; pip install pyarrow"
        ) from e
    try:
        file = parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise InputError(f'{path} has no column "text", it has {quoted(names)}; rename one')
        for batch in file.iter_batches(columns=["text"]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str):
                    raise InputError(f'{path}: column "text" holds {text!r:.40}; give text only')
                yield text
    except pyarrow.ArrowException as e:
        raise InputError(f"cannot read {path}: {str(e).splitlines()[0]}; give another file") from e


def _join(texts: Iterator[str], tokenizer: Tokenizer, with_bos: bool) -> np.ndarray:
    """The ids of all documents in one array, with the BOS between two of them."""
    parts = []
    for text in texts:
        ids = tokenizer.encode(text, bos=False)
        between = [tokenizer.need_bos()] if with_bos and parts else []
        parts.append(np.array([*between, *ids], np.int64))
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def read_ids(path: Path) -> np.ndarray:
    """Memory-mapped token ids, `int[n, length]`, of a .npy file.

    Raises:
      InputError: the file cannot be read, or holds something else.
    """
    try:
        ids = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, TypeError, OverflowError, EOFError) as e:
        reason = getattr(e, "strerror", None) or "it is not a whole array"
        raise InputError(
            f"cannot read {str(path)!r}: {reason}; give rows of token ids as np.save writes them"
        ) from e
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise InputError(
            f"{path} holds {ids.dtype} {list(ids.shape)}, expected integers [rows, tokens]; give "
            "rows of token ids"
        )
    return ids


def _read_npy(path: Path, length: int, vocab: int) -> np.ndarray:
    rows = read_ids(path)
    if len(rows) < 1 or rows.shape[1] != length:
        raise InputError(
            f"{path} has {rows.shape[0]} rows of {rows.shape[1]} tokens, expected rows of "
            f"{length}; save token ids so, or set the row's length"
        )
    return _within(rows, vocab, path)


def _within(rows: np.ndarray, vocab: int, path: Path) -> np.ndarray:
    least, most = int(rows.min()), int(rows.max())
    if least < 0 or most >= vocab:
        bad = least if least < 0 else most
        raise InputError(
            f"{path} holds token id {bad}, the model's vocabulary is 0..{vocab - 1}; use the "
            f"model's own tokenizer"
        )
    return rows
