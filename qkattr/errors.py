"""The one exception that means "the input is wrong" (exit code 2), and text that is safe to show.

Any other exception is a fault of qkattr (exit code 1).
"""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: what is wrong, what was expected, what was found, and what to do.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def printable(text: str) -> str:
    r"""Text with control characters, bidi overrides and lone surrogates written out, as `\x1b`.

    Zero-width joiners stay between two characters that they may join, as in emoji and in Persian.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or _joins(text, i) else c.encode("unicode_escape").decode()
        for i, c in enumerate(text)
    )


def _joins(text: str, i: int) -> bool:
    """Whether it is a zero-width (non-)joiner with no ASCII and nothing unprintable beside it."""
    if text[i] not in "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}":
        return False
    beside = text[max(i - 1, 0) : i], text[i + 1 : i + 2]
    return all(c.isprintable() and not c.isascii() for c in beside)


def clipped(text: str, most: int) -> str:
    """Text of at most `most` characters; an ellipsis stands for what is left out."""
    return text if len(text) <= most else text[: most - 1] + "…"


def quoted(text: str, most: int = 60) -> str:
    """A token or a name between quotes, clipped; as Python writes it, but for joiners, which stay
    as in `printable`."""
    text = clipped(text, most)
    mark = '"' if "'" in text and '"' not in text else "'"
    body = printable(text.replace("\\", r"\\"))
    return mark + body.replace(mark, "\\" + mark) + mark


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Raise `InputError` unless the value of an option is one of those that are known."""
    if value not in known:
        raise InputError(
            f"{name} {quoted(str(value))} is not known; give one of {', '.join(known)}"
        )


def some(names: list[str], most: int = 3) -> str:
    """`a, b, c and 12 more`: a list of names that stays on one line."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
