"""Feature cards: what each feature of each boundary does on a text, in columns.

A context is a reference into `rows`, the token rows in which contexts lie, stored once; its window
holds the feature's activation at the positions around it. Activations are stored as levels of the
feature's largest one (1/255 of it the mean and that of a context, 1/15 those around), logits as
levels of the feature's largest, 1/127; histogram counts to 3 %, AUCs to 0.002. Counts, maxima and
tokens are as measured.
Axes: X features of all boundaries, one after the other; C contexts, W positions of a window, Q
tokens listed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from qkattr.cards.card import Card, Example
from qkattr.cards.levels import NOT_MEASURED, auc_of, count_of
from qkattr.cards.norms import NormScales
from qkattr.cards.store import read_columns, split, write_columns
from qkattr.errors import InputError

#: Half octaves of the histogram, the last the one that holds the maximum.
HISTOGRAM = 12
#: Where a label comes from.
AUTOMATIC, GIVEN = 0, 1


_COLUMNS = (
    *("boundaries", "first", "positions", "rows", "row_number", "count", "max", "mean_level"),
    *("bin", "histogram", "context_row", "context_position", "context_level", "window"),
    *("logit_token", "logit_level", "logit_scale", "auc", "n", "source"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Cards:
    """The cards of a set of SAEs.

    meta: what they are of: model, saes, their hashes, the text, settings. boundaries: `[Y]`, and
    the first of each one's features in the columns, `[Y + 1]`. The rest is columns; see the module.
    """

    meta: dict[str, Any]
    boundaries: Int[np.ndarray, "Y"]
    first: Int[np.ndarray, "Y+1"]
    positions: Int[np.ndarray, "Y"]
    rows: Int[np.ndarray, "n T"]
    row_number: Int[np.ndarray, "n"]
    count: Int[np.ndarray, "X"]
    max: Float[np.ndarray, "X"]
    mean_level: Int[np.ndarray, "X"]
    bin: Int[np.ndarray, "X"]
    histogram: Int[np.ndarray, "X H"]
    context_row: Int[np.ndarray, "X C"]
    context_position: Int[np.ndarray, "X C"]
    context_level: Int[np.ndarray, "X C"]
    window: Int[np.ndarray, "X C W"]
    logit_token: Int[np.ndarray, "X Q"]
    logit_level: Int[np.ndarray, "X Q"]
    logit_scale: Float[np.ndarray, "X"]
    auc: Int[np.ndarray, "X 2"]
    n: Int[np.ndarray, "X 2"]
    source: Int[np.ndarray, "X"]
    label_text: list[str]
    vocabulary: dict[int, str]
    norms: NormScales

    @classmethod
    def open(cls, path: str | Path) -> Cards:
        """Read a file that `save` wrote.

        Raises:
          InputError: it is no such file, damaged, or of another schema.
        """
        path = Path(path)
        meta, columns = read_columns(path)
        try:
            return _built(meta, columns)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            raise InputError(
                f"{path} holds damaged feature cards ({type(e).__name__}: {e}); make them again"
            ) from e

    def save(self, path: str | Path) -> Path:
        """Write one file; what was there survives a failure."""
        path = Path(path)
        columns = {name: np.asarray(getattr(self, name)) for name in _COLUMNS}
        columns |= {f"norms.{k}": np.asarray(v) for k, v in dataclasses.asdict(self.norms).items()}
        columns["token.id"] = np.array(list(self.vocabulary), np.uint32)
        texts = dict(label=self.label_text, token=list(self.vocabulary.values()))
        write_columns(path, self.meta, columns, texts)
        return path

    def origin(self) -> str:
        """What text the cards were made from, in a sentence or more."""
        meta = self.meta
        rows = f"{meta['text_rows']:,} rows of {meta['text_length']} tokens"
        text = f" of {meta['text']}" if meta["text"] else ""
        about = meta.get("about", "")
        return f"The cards were made from {rows}{text}. {about}".strip()

    def __len__(self) -> int:
        return len(self.count)

    def width(self, boundary: int) -> int:
        """How many features a boundary has; 0 where there are no cards."""
        at = self._of_boundary.get(boundary)
        return 0 if at is None else int(self.first[at + 1] - self.first[at])

    def label(self, boundary: int, index: int) -> str:
        """A feature's label; "" where there is no card."""
        if not 0 <= index < self.width(boundary):
            return ""
        return self.label_text[self.first[self._of_boundary[boundary]] + index]

    def labels(
        self, features: Iterable[tuple[int, int]] | None = None
    ) -> dict[tuple[int, int], str]:
        """Labels by (boundary, index), of all features or of some."""
        if features is None:
            features = ((b, i) for b in self._of_boundary for i in range(self.width(b)))
        return {(b, i): text for b, i in features if (text := self.label(b, i))}

    def card(self, boundary: int, index: int) -> Card:
        """The card of a feature.

        Raises:
          InputError: there is no such boundary or feature.
        """
        x = self.row_of(boundary, index)
        return Card(
            boundary=boundary,
            index=index,
            label=self.label_text[x],
            auc=auc_of(self.auc[x, 0]),
            n=int(self.n[x, 0]),
            strong_auc=auc_of(self.auc[x, 1]),
            strong_n=int(self.n[x, 1]),
            given=bool(self.source[x] == GIVEN),
            count=int(self.count[x]),
            density=float(self.count[x] / self.positions[self._of_boundary[boundary]]),
            max=float(self.max[x]),
            mean=float(f"{self.mean_level[x] / 255 * float(self.max[x]):.4g}"),
            histogram=self._histogram(x),
            examples=[self._example(x, int(c)) for c in np.flatnonzero(self.context_level[x])],
            top_logits=self._logits(x, 0),
            bottom_logits=self._logits(x, 1),
        )

    def row_of(self, boundary: int, index: int) -> int:
        """Where a feature is in the columns."""
        if boundary not in self._of_boundary:
            known = f"{self.boundaries.min()}..{self.boundaries.max()}"
            raise InputError(
                f"there are no cards for boundary {boundary}; the file has boundaries {known}"
            )
        if not 0 <= index < self.width(boundary):
            last = self.width(boundary) - 1
            raise InputError(f"boundary {boundary} has no feature {index}; give one of 0..{last}")
        return int(self.first[self._of_boundary[boundary]] + index)

    def with_labels(self, labels: dict[tuple[int, int], str]) -> Cards:
        """Cards with some labels replaced by ones that were written elsewhere.

        Raises:
          InputError: there is no such feature.
        """
        text, auc, source = list(self.label_text), self.auc.copy(), self.source.copy()
        for (boundary, index), label in labels.items():
            x = self.row_of(boundary, index)
            text[x], auc[x], source[x] = label, NOT_MEASURED, GIVEN
        return dataclasses.replace(self, label_text=text, auc=auc, source=source)

    @functools.cached_property
    def _of_boundary(self) -> dict[int, int]:
        return {int(b): at for at, b in enumerate(self.boundaries)}

    def _histogram(self, x: int) -> list[tuple[float, float, int]]:
        counts = count_of(self.histogram[x])
        edges = 2.0 ** ((int(self.bin[x]) - 31 - np.arange(HISTOGRAM + 1)[::-1]) / 2)
        bins = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
        return [(low, high, n) for low, high, n in bins if n]

    def _example(self, x: int, c: int) -> Example:
        before, after = self.meta["before"], self.meta["after"]
        row, position = int(self.context_row[x, c]), int(self.context_position[x, c])
        first, last = max(position - before, 0), min(position + after + 1, self.rows.shape[1])
        levels = self.window[x, c, first - position + before : last - position + before] / 15
        levels[position - first] = self.context_level[x, c] / 255
        top = self.meta["top"]
        fifths = self.context_level.shape[1] - top
        name = "Top" if c < top else f"Quantile {1 - (c - top + 0.5) / fifths:.1f}"
        return Example(
            quantile=name,
            tokens=[self.token(i) for i in self.rows[row, first:last]],
            activations=[float(f"{v:.4g}") for v in levels * float(self.max[x])],
            at=position - first,
            row=int(self.row_number[row]),
            position=position,
        )

    def _logits(self, x: int, side: int) -> list[tuple[str, float]]:
        raised = self.meta["raised"]
        at = slice(raised, None) if side else slice(raised)
        values = self.logit_level[x, at] / 127 * float(self.logit_scale[x])
        tokens = [self.token(i) for i in self.logit_token[x, at]]
        return [(t, float(f"{v:.3g}")) for t, v in zip(tokens, values, strict=True)]

    def token(self, token_id: int) -> str:
        """A token as text; its id where the text is not known."""
        return self.vocabulary.get(int(token_id), str(token_id))


def _built(meta: dict[str, Any], columns: dict[str, np.ndarray]) -> Cards:
    norms: dict[str, Any] = {
        f.name: columns[f"norms.{f.name}"] for f in dataclasses.fields(NormScales)
    }
    norms["final"] = float(norms["final"])
    ids = columns["token.id"].tolist()
    cards = Cards(
        meta=meta,
        label_text=split(columns, "label"),
        vocabulary=dict(zip(ids, split(columns, "token"), strict=True)),
        norms=NormScales(**norms),
        **{name: columns[name] for name in _COLUMNS},
    )
    _check(cards)
    return cards


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
