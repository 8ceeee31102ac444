"""Which tensor of a checkpoint fills which field of `Params`: tables, and the one way to read them.

A row says how a tensor's axes are made of the letters of `qkattr.types`, one word an axis:

    "NH D", "(N H) D"    a linear map to heads, `[N * H, D]`
    "NH+KH+KH D"         several parts, one after another along an axis; each fills its own field
    "N3H D"              three parts within each head
    "1 K D H"            the second of several stacked tensors
    "L D F"              one tensor for all blocks

The name of our field says in what order we keep the same letters, so that `wq_DNH` is the first of
these split into heads and transposed. Hugging Face folders and GGUF files are read by the tables of
a `Family`, trees of JAX programs by a table that their user writes (`load.models.tree`).
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
        "V": c.vocab, "P": c.context, "L": c.n_blocks, "3": 3,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor and the fields that it fills.

    tensor: its name, `{}` for the block's number. axes: see above. fields: one a part;
    "norm_mlp.bias" is the bias of that norm. plus: what the family adds to the tensor before it
    uses it. block: the one that is meant, of a tensor for all.
    """

    tensor: str
    axes: str
    fields: str
    plus: float = 0.0
    block: int = 0

    def at(self, block: int) -> Row:
        """The row of one block."""
        return dataclasses.replace(self, tensor=self.tensor.format(block), block=block)

    def below(self, stem: str) -> Row:
        """The row of a tensor whose name begins so."""
        return dataclasses.replace(self, tensor=stem + self.tensor)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int | None, ...]:
        """The tensor's shape in the checkpoint; None where any number may be stacked."""
        return tuple(None if w.isdigit() else _length(w, sizes) for w in self._words())

    def fits(self, shape: tuple[int, ...], sizes: Mapping[str, int]) -> bool:
        """Whether the tensor's shape is the one that its axes call for."""
        words = self._words()
        return len(shape) == len(words) and all(
            n > int(word) if word.isdigit() else n == _length(word, sizes)
            for n, word in zip(shape, words, strict=True)
        )

    def shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Our shape of every field."""
        letters = [letters for letters, _ in self._parts()]
        fields = zip(self.fields.split(), letters, strict=True)
        return {
            field: tuple(sizes[letter] for letter in _ours(field, there)) for field, there in fields
        }

    def taken(self, tensor: np.ndarray) -> np.ndarray:
        """What the row means of a tensor that holds several stacked ones."""
        indices = {w: self.block if w == "L" else int(w) for w in self._words() if _stacked(w)}
        return tensor[tuple(indices.get(word, slice(None)) for word in self._words())]

    def pieces(
        self, taken: np.ndarray, sizes: Mapping[str, int]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Every field with its part of what was taken, in our layout; views where they can be."""
        for field, (letters, take) in zip(self.fields.split(), self._parts(), strict=True):
            part = take(taken, sizes).reshape([sizes[letter] for letter in letters])
            part = part.transpose([letters.index(c) for c in _ours(field, letters)])
            # In bfloat16 1 + w would round to steps of 1/128.
            yield field, part.astype(np.float32) + np.float32(self.plus) if self.plus else part

    def _words(self) -> list[str]:
        return re.sub(r"\(([^()]*)\)", lambda m: m[1].replace(" ", ""), self.axes).split()

    def _parts(self) -> list[tuple[str, Callable[[np.ndarray, Mapping[str, int]], np.ndarray]]]:
        """The letters of each part, and how it is taken out of the tensor."""
        words = [word for word in self._words() if not _stacked(word)]
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


def _stacked(word: str) -> bool:
    """Whether an axis counts stacked tensors, of which one is meant."""
    return word == "L" or word.isdigit()


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
    ours = ours if "K" in there else ours.replace("K", "N")
    if sorted(ours) != sorted(there):
        raise ValueError(f"{field} is made of {ours}, not of {there}")
    return ours


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which tensors a checkpoint should have, and the fields that they fill.

    block: the rows of every block; outside: of the rest. unused: regular expressions of tensors
    that may be there without being read. scaled_embedding: rows of the embedding are multiplied by
    sqrt(d_model). source, remedy: where the rows are from, and what to do where they do not fit, as
    errors have it.
    """

    block: tuple[Row, ...]
    outside: tuple[Row, ...]
    unused: tuple[str, ...] = ()
    scaled_embedding: bool = False
    source: str = "its config"
    remedy: str = "the weights and the config must belong to one checkpoint"

    def rows(self, n_blocks: int) -> list[Row]:
        """One for every tensor, or part of one."""
        return [*self.outside, *(row.at(b) for row in self.block for b in range(n_blocks))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How a family's folders are read.

    read: the config. block: the rows of a block, whose tensors' names continue `layers`; outside:
    the rows outside the blocks. stems: what all names begin with, and the name of the unembedding,
    in each spelling that is in use. unused: regular expressions of tensors that follow from the
    rest, or that text does not use. aliases: see `Fields`. scaled_embedding: see `Layout`.
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

    def layout(self, config: ModelConfig, found: Collection[str]) -> Layout:
        """The rows under the names that the checkpoint uses.

        found: its tensors' names. Where no spelling fits, the usual one.
        """
        embedding = self.outside[0].tensor
        spelled = [pair for pair in self.stems if pair[0] + embedding in found]
        stem, head = (spelled or self.stems)[0]
        block = tuple(row.below(stem + self.layers) for row in self.block(config))
        outside = tuple(row.below(stem) for row in self.outside)
        unused = self.unused
        if config.tied:
            unused += tuple(re.escape(head) for _, head in self.stems)
        else:
            outside += (Row(head, "V D", "unembed_DV"),)
        return Layout(block, outside, unused, self.scaled_embedding)
