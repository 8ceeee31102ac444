"""Cards on disk: one .npz of columns without pickles, compressed by LZMA.

Each column in the smallest integer type that holds it; texts as UTF-8, one after the other, with
their lengths; the rest as JSON. A file is read whole: the shipped set is a few megabytes.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from qkattr.errors import InputError
from qkattr.features.cards import HISTOGRAM, Cards
from qkattr.features.norms import NormScales

SCHEMA = 1

_COLUMNS = (
    *("boundaries", "first", "positions", "rows", "row_number", "count", "max", "mean_level"),
    *("bin", "histogram", "context_row", "context_position", "context_level", "window"),
    *("logit_token", "logit_level", "logit_scale", "auc", "n", "source"),
)


def save_cards(cards: Cards, path: str | Path) -> Path:
    """Write the file; what was there survives a failure."""
    from qkattr.export.folder import write_files

    path = Path(path)
    columns = {name: _small(getattr(cards, name)) for name in _COLUMNS}
    columns |= {f"norms.{k}": np.asarray(v) for k, v in dataclasses.asdict(cards.norms).items()}
    columns |= _texts("label", cards.label_text)
    columns |= _texts("token", list(cards.vocabulary.values()))
    columns["token.id"] = np.array(list(cards.vocabulary), np.uint32)
    header = json.dumps({"schema": SCHEMA, **cards.meta}).encode()
    columns["header"] = np.frombuffer(header, np.uint8)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        for name, column in columns.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, column, allow_pickle=False)
    write_files(path.parent, {path.name: buffer.getvalue()})
    return path


def _small(column: np.ndarray) -> np.ndarray:
    """Integers in the smallest type that holds them, floats as they are."""
    column = np.asarray(column)
    if not np.issubdtype(column.dtype, np.integer) or not column.size:
        return column
    low, high = int(column.min()), int(column.max())
    if low < 0:  # a signed type: it holds -1 - high where it holds high
        low, high = min(low, -1 - high), 0
    return column.astype(np.result_type(np.min_scalar_type(low), np.min_scalar_type(high)))


def _texts(name: str, texts: list[str]) -> dict[str, np.ndarray]:
    encoded = [text.encode(errors="backslashreplace") for text in texts]
    return {
        f"{name}.text": np.frombuffer(b"".join(encoded), np.uint8),
        f"{name}.length": _small(np.array([len(text) for text in encoded], int)),
    }


def open_cards(path: str | Path) -> Cards:
    """Read a file that `save_cards` wrote.

    Raises:
      InputError: it is no such file, damaged, or of another schema.
    """
    from qkattr.export.folder import DAMAGE

    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}; give cards that `qkattr features --out` wrote")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            columns = {name: data[name] for name in data.files}
        meta = json.loads(columns["header"].tobytes())
        schema = meta.pop("schema")
    except DAMAGE as e:
        raise InputError(
            f"{path} holds no feature cards, or is damaged ({type(e).__name__}); make them again "
            f"with `qkattr features --out`"
        ) from e
    if schema != SCHEMA:
        raise InputError(
            f"{path} has schema {schema}, this qkattr reads schema {SCHEMA}; make the cards again"
        )
    try:
        return _built(meta, columns)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        raise InputError(
            f"{path} holds damaged feature cards ({type(e).__name__}: {e}); make them again"
        ) from e


def _built(meta: dict[str, Any], columns: dict[str, np.ndarray]) -> Cards:
    norms = {f.name: columns[f"norms.{f.name}"] for f in dataclasses.fields(NormScales)}
    ids = columns["token.id"].tolist()
    cards = Cards(
        meta=meta,
        label_text=_split(columns, "label"),
        vocabulary=dict(zip(ids, _split(columns, "token"), strict=True)),
        norms=NormScales(**(norms | dict(final=float(norms["final"])))),
        **{name: columns[name] for name in _COLUMNS},
    )
    _check(cards)
    return cards


def _split(columns: dict[str, np.ndarray], name: str) -> list[str]:
    blob, lengths = columns[f"{name}.text"].tobytes(), columns[f"{name}.length"].astype(int)
    ends = np.cumsum(lengths)
    if len(blob) != lengths.sum():
        raise ValueError(f"{len(blob)} bytes of {name}s, their lengths say {lengths.sum()}")
    parts = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
    return [blob[start:end].decode() for start, end in parts]


def _check(cards: Cards) -> None:
    """The columns are equally long, and what they point at exists."""
    n, contexts = int(cards.first[-1]), cards.context_level.shape[1]
    width = cards.meta["before"] + 1 + cards.meta["after"]
    shapes = {name: (n,) for name in ("count", "max", "mean_level", "bin", "logit_scale")}
    shapes |= {"auc": (n, 2), "n": (n, 2)}
    shapes |= {"source": (n,), "histogram": (n, HISTOGRAM), "window": (n, contexts, width)}
    shapes |= {name: (n, contexts) for name in ("context_row", "context_position", "context_level")}
    shapes |= {"row_number": (len(cards.rows),), "positions": (len(cards.boundaries),)}
    shapes |= {"first": (len(cards.boundaries) + 1,), "logit_level": cards.logit_token.shape}
    for name, shape in shapes.items():
        found = getattr(cards, name).shape
        if found != shape:
            raise ValueError(f"{name} has shape {list(found)}, not {list(shape)}")
    if len(cards.label_text) != n or len(cards.logit_token) != n:
        raise ValueError(f"{len(cards.label_text)} labels of {n} features")
    if (cards.context_row.max(initial=0) >= max(len(cards.rows), 1)) or (
        cards.context_position.max(initial=0) >= cards.rows.shape[1]
    ):
        raise ValueError("a context lies outside the rows")
