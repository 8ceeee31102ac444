"""The text that SAEs are checked on: a passage, or rows of token ids in a `.npy` file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from qkattr.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from qkattr.load.bundle import Bundle


def read_text(path: Path | None) -> str | np.ndarray:
    """A passage (by default the packaged sample), or memory-mapped token ids `[rows, tokens]`."""
    if path is None:
        return resources.files("qkattr").joinpath("sample.txt").read_text(encoding="utf-8")
    if path.suffix == ".npy":
        from qkattr.load.text.corpus import read_ids

        return read_ids(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot read {str(path)!r}: {reason}; give a text file") from e


def cut_rows(
    bundle: Bundle, text: str | np.ndarray, bos: bool | None, most: int
) -> list[list[int]]:
    """Rows of token ids of one length, `most` of them at most.

    A passage is cut into rows of 128 tokens, each with the BOS that the whole would have; rows of
    token ids are taken as they are, from the first on.
    """
    if not isinstance(text, str):
        return _checked_rows(bundle, text[:most])
    from qkattr.features.check import ROW

    if not text.strip():
        raise InputError("the text is empty; give at least 16 tokens of text")
    wanted = bundle.bos if bos is None else bos
    tokenizer = bundle.tokenizer
    if tokenizer is None:
        raise InputError(f"{bundle.model} has no tokenizer that qkattr can read; check needs one")
    ids = tokenizer.encode(text, bos=wanted)
    first = ids[:1] if tokenizer.bos_id is not None and ids[0] == tokenizer.bos_id else []
    body = ids[len(first) :]
    length = min(ROW, bundle.config.context, len(ids)) - len(first)
    starts = range(0, len(body) - length + 1, length)
    return [[*first, *body[i : i + length]] for i in starts][:most]


def _checked_rows(bundle: Bundle, ids: np.ndarray) -> list[list[int]]:
    context, vocab = bundle.config.context, bundle.config.vocab
    if not ids.size or ids.shape[1] > context:
        raise InputError(
            f"the text is {ids.shape[0]} rows of {ids.shape[1]} tokens, expected rows of 16 to "
            f"{context}; give other rows"
        )
    if ids.min() < 0 or ids.max() >= vocab:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise InputError(
            f"the text has token id {wrong}, outside the model's vocabulary, 0..{vocab - 1}"
        )
    return ids.tolist()
