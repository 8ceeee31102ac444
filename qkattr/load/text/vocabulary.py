"""GPT-2's tokenizer in its own two files, `vocab.json` and `merges.txt`, where a folder has no
`tokenizer.json`: what old repositories have (DialoGPT).

The text is cut and its bytes are spelled as GPT-2's tokenizer does; the tokens of
`added_tokens.json` and the special ones are cut out of it first, as `transformers` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from qkattr.errors import InputError
from qkattr.files import read_json_object, read_text

FILES = ("vocab.json", "merges.txt")
_ADDED = "added_tokens.json"


def from_vocabulary(folder: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer of the two files; None where they are not there.

    Raises:
      InputError: the files are damaged or do not belong together.
    """
    if not all((folder / name).is_file() for name in FILES):
        return None
    vocab = read_json_object(folder / FILES[0])
    added = read_json_object(folder / _ADDED) if (folder / _ADDED).is_file() else {}
    lines = read_text(folder / FILES[1]).splitlines()
    merges: Any = [
        tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")
    ]
    try:
        inner = tokenizers.Tokenizer(models.BPE(vocab, merges))
        for token in sorted(added, key=added.__getitem__):
            inner.add_tokens([AddedToken(token, normalized=False)])
    except Exception as e:  # the tokenizers library raises bare Exceptions
        raise InputError(
            f"{folder / FILES[0]} and {FILES[1]} do not make a tokenizer ({e}); copy or download "
            "them again"
        ) from e
    if wrong := [token for token, id in added.items() if inner.token_to_id(token) != id]:
        raise InputError(
            f"{folder / _ADDED}: {wrong[0]!r:.40} should have id {added[wrong[0]]!r:.20}, which "
            f"{FILES[0]} leaves no room for; copy or download both again"
        )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner
