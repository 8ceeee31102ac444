"""Text out of tokens that each hold part of it.

A token's text has bytes that are no UTF-8 by themselves written out, as `\\xe2` (see
`load.tokenizer.Tokenizer.token`): those of a character that lies on several tokens. Put together
they are read as the character again. Exact where a tokenizer does not know better.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

_BYTE = re.compile(r"\\x([89a-f][0-9a-f])")  # no other byte is ever written out
_DECODER = codecs.getincrementaldecoder("utf-8")


def whole(tokens: Sequence[str]) -> list[tuple[range, str]]:
    """Tokens put together until no character is cut: which ones, and their text."""
    found, raw, decoder = [], [], _DECODER("replace")
    for i, token in enumerate(tokens):
        raw.append(_bytes(token))
        decoder.decode(raw[-1])
        cut = decoder.getstate()[0]  # the bytes of a character that has begun
        if not cut or i + 1 == len(tokens):
            text = b"".join(raw).decode(errors="backslashreplace")
            found.append((range(i + 1 - len(raw), i + 1), text))
            raw = []
    return found


def joined(tokens: Sequence[str]) -> str:
    """The text of some tokens."""
    return "".join(text for _, text in whole(tokens))


def _bytes(token: str) -> bytes:
    parts = _BYTE.split(token)  # text and bytes by turns
    return b"".join(
        bytes.fromhex(part) if i % 2 else part.encode(errors="backslashreplace")
        for i, part in enumerate(parts)
    )
