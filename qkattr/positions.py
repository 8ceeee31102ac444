"""Which positions and places of a prompt are meant by what people type.

Nothing here needs JAX: it is asked before a model is read, and of results that are read without
one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qkattr.errors import InputError, clipped, quoted, some
from qkattr.kinds import Place

#: What reads as an index. `int` takes more, such as the node id "0_1_2".
INDEX = re.compile(r"\s*[+-]?[0-9]{1,9}\s*")


def find_position(tokens: list[str], where: int | str) -> int:
    """A position from an index, a negative index, or a token's text with an optional `#n`.

    Text that reads as a whole number is an index.

    Raises:
      InputError: there is no such position, or the text names several.
    """
    text = str(where)
    if not INDEX.fullmatch(text):
        return _find_token(tokens, text)
    index = int(text)
    if not -len(tokens) <= index < len(tokens):
        raise InputError(
            f"position {clipped(text, 20)} is out of range: the prompt has {len(tokens)} tokens; "
            f"give one of 0..{len(tokens) - 1}, or of -{len(tokens)}..-1 from the end"
        )
    return index % len(tokens)


def _find_token(tokens: list[str], text: str) -> int:
    name, _, number = text.rpartition("#")
    numbered = bool(name) and number.isdecimal() and len(number) < 10 and text not in tokens
    name = name if numbered else text
    found = [i for i, token in enumerate(tokens) if token == name]
    found = found or [i for i, token in enumerate(tokens) if token.strip() == name.strip()]
    if not found:
        raise InputError(f"no token {quoted(name)} in the prompt; `qkattr tokens` lists them")
    if numbered:
        if not 1 <= int(number) <= len(found):
            raise InputError(
                f"token {quoted(name)} occurs {len(found)} times, {quoted(text)} asks for number "
                f"{number}; give #1..#{len(found)}"
            )
        return found[int(number) - 1]
    if len(found) > 1:
        listed = some([f"{quoted(f'{name}#{i + 1}')} at {at}" for i, at in enumerate(found)], 8)
        raise InputError(f"token {quoted(name)} is ambiguous: {listed}; say which")
    return found[0]


def find_place(tokens: list[str], place: tuple, *, n_heads: int, windows: Sequence[int]) -> Place:
    """A place whose positions may be given as token texts, checked.

    Raises:
      InputError: no such block, head or position, or the query does not see the key.
    """
    layer, head, query, key = place
    check_head(layer, head, (len(windows), n_heads))
    t, s = find_position(tokens, query), find_position(tokens, key)
    if s > t:
        raise InputError(
            f"the key at {s} ({quoted(tokens[s])}) comes after the query at {t} "
            f"({quoted(tokens[t])}); "
            f"attention is causal, give a key at or before the query"
        )
    if t - s >= windows[layer]:
        raise InputError(
            f"the key at {s} is outside block {layer}'s window of {windows[layer]} before {t}; "
            f"its score is masked and has no terms, give a nearer key"
        )
    return int(layer), int(head), t, s


def check_head(layer: int | None, head: int | None, grid: tuple[int, int]) -> None:
    """Raise `InputError` unless there is such a block and head (None: any) in a model of L x N."""
    n_blocks, n_heads = grid
    if layer is not None and not 0 <= layer < n_blocks:
        raise InputError(
            f"layer {layer} is out of range: the model has blocks 0..{n_blocks - 1}; "
            f"give one of these"
        )
    if head is not None and not 0 <= head < n_heads:
        raise InputError(
            f"head {head} is out of range: the model has heads 0..{n_heads - 1}; give one of these"
        )
