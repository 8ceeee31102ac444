"""Which tensor of a checkpoint fills which field of `Params`: tables, and the one way to read them.

A row says how a tensor's axes are made of the letters of `qkattr.types`: a linear map to heads is
"NH D", `[N * H, D]`. The name of our field says in what order we keep the same letters, so that
`wq_DNH` is that tensor split into heads and transposed. Fused tensors fill several fields.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from qkattr.config import ModelConfig
from qkattr.load.models.families.fields import Fields


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """The letters of a row's axes; 3 is the query, key and value of one head."""
    c = config
    return {
        "D": c.d_model, "N": c.n_heads, "K": c.n_kv_heads, "H": c.head_dim, "F": c.d_mlp,
        "V": c.vocab, "P": c.context, "3": 3,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor and the fields that it fills.

    axes: one word an axis of the tensor. "NH+KH+KH" is one part after another, "N3H" the three
    parts within each head. fields: one a part; "norm_mlp.bias" is the bias of that norm. plus: what
    the family adds to the tensor before it uses it.
    """

    tensor: str
    axes: str
    fields: str
    plus: float = 0.0

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The tensor's shape in the checkpoint."""
        return tuple(_length(word, sizes) for word in self.axes.split())

    def shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Our shape of every field."""
        letters = [letters for letters, _ in self._parts()]
        fields = zip(self.fields.split(), letters, strict=True)
        return {
            field: tuple(sizes[letter] for letter in _ours(field, there)) for field, there in fields
        }

    def pieces(
        self, tensor: np.ndarray, sizes: Mapping[str, int]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Every field with its part of the tensor, in our layout; views where they can be."""
        for field, (letters, take) in zip(self.fields.split(), self._parts(), strict=True):
            part = take(tensor, sizes).reshape([sizes[letter] for letter in letters])
            yield field, part.transpose([letters.index(c) for c in _ours(field, letters)])

    def _parts(self) -> list[tuple[str, Callable[[np.ndarray, Mapping[str, int]], np.ndarray]]]:
        """The letters of each part, and how it is taken out of the tensor."""
        words = self.axes.split()
        for axis, word in enumerate(words):
            if "+" in word:
                return [
                    (
                        "".join([*words[:axis], part, *words[axis + 1 :]]),
                        lambda a, sizes, i=i, axis=axis, word=word: _slice(a, axis, word, i, sizes),
                    )
                    for i, part in enumerate(word.split("+"))
                ]
            if "3" in word:
                rest = "".join(words).replace("3", "")
                return [
                    (rest, lambda a, sizes, i=i, words=words: _third(a, words, i, sizes))
                    for i in range(3)
                ]
        return [("".join(words), lambda a, sizes: a)]


def _length(word: str, sizes: Mapping[str, int]) -> int:
    return sum(math.prod(sizes[letter] for letter in part) for part in word.split("+"))


def _slice(a: np.ndarray, axis: int, word: str, i: int, sizes: Mapping[str, int]) -> np.ndarray:
    ends = np.cumsum([0, *(_length(part, sizes) for part in word.split("+"))])
    return a[(slice(None),) * axis + (slice(ends[i], ends[i + 1]),)]


def _third(a: np.ndarray, words: list[str], i: int, sizes: Mapping[str, int]) -> np.ndarray:
    letters = "".join(words)
    a = a.reshape([sizes[letter] for letter in letters])
    return a.take(i, axis=letters.index("3"))


def _ours(field: str, there: str) -> str:
    """The order of the letters in our field: as its name ends, or as they are there."""
    suffix = field.rsplit("_", 1)[-1]
    ours = suffix if suffix.isupper() else there
    # A tensor that is fused within each head has as many key heads as query heads.
    return ours if "K" in there else ours.replace("K", "N")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How a family's folders are read.

    read: the config. block: the rows of a block, whose tensors' names continue `layers`; outside:
    the rows outside the blocks. stems: what all names begin with, and the name of the unembedding,
    in each spelling that is in use. unused: regular expressions of tensors that follow from the
    rest, or that text does not use. aliases: see `Fields`. scaled_embedding: rows of the embedding
    are multiplied by sqrt(d_model).
    """

    read: Callable[[Fields], ModelConfig]
    block: Callable[[ModelConfig], tuple[Row, ...]]
    outside: tuple[Row, ...]
    stems: tuple[tuple[str, str], ...] = (("model.", "lm_head.weight"), ("", "lm_head.weight"))
    layers: str = "layers.{}."
    unused: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scaled_embedding: bool = False

    def config(self, raw: Mapping[str, Any], accept: Collection[str] = ()) -> ModelConfig:
        """Read a config; `InputError` if an attribute is missing, wrong or not handled and not one
        of `accept`."""
        fields = Fields(raw, aliases=self.aliases, accept=accept)
        config = self.read(fields)
        fields.refuse_the_rest()
        return config

    def rows(
        self, config: ModelConfig, found: Mapping[str, Any]
    ) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
        """The rows of a block and those outside, under the names that the checkpoint uses.

        found: its tensors' names. Where no spelling fits, the usual one.
        """
        embedding = self.outside[0].tensor
        spelled = [pair for pair in self.stems if pair[0] + embedding in found]
        stem, head = (spelled or self.stems)[0]
        outside = tuple(_renamed(row, stem) for row in self.outside)
        if not config.tied:
            outside += (Row(head, "V D", "unembed_DV"),)
        return tuple(_renamed(row, stem + self.layers) for row in self.block(config)), outside

    def is_unused(self, name: str, config: ModelConfig) -> bool:
        """Whether a tensor may be there without being read."""
        tied = config.tied and any(name == head for _, head in self.stems)
        return tied or any(re.fullmatch(pattern, name) for pattern in self.unused)


def _renamed(row: Row, stem: str) -> Row:
    return dataclasses.replace(row, tensor=stem + row.tensor)
