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


def shown(tokens: Sequence[str]) -> list[str]:
    """Each token as people are shown it: one of several that hold a character together is that
    character and which of them it is, as "😀 1/3"; a byte that belongs to none is `<0xF0>`."""
    texts = []
    for group, text in whole(tokens):
        if len(group) == 1 or _BYTE.search(text):
            texts += [readable(tokens[i]) for i in group]
        else:
            texts += [f"{text} {n}/{len(group)}" for n in range(1, len(group) + 1)]
    return texts


def readable(token: str) -> str:
    """A token alone, its bytes that are no text by themselves as `<0xF0>`."""
    return _BYTE.sub(lambda found: f"<0x{found[1].upper()}>", token)


def _bytes(token: str) -> bytes:
    parts = _BYTE.split(token)  # text and bytes by turns
    return b"".join(
        bytes.fromhex(part) if i % 2 else part.encode(errors="backslashreplace")
        for i, part in enumerate(parts)
    )
