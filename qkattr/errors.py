"""The one exception that means "the input is wrong" (exit code 2), and text that is safe to show.

Any other exception is a fault of qkattr (exit code 1).
"""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: what is wrong, what was expected, what was found, and what to do.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def printable(text: str) -> str:
    r"""Text with control characters, bidi overrides and lone surrogates written out, as `\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def clipped(text: str, most: int) -> str:
    """Text of at most `most` characters; an ellipsis stands for what is left out."""
    return text if len(text) <= most else text[: most - 1] + "…"


def quoted(text: str, most: int = 60) -> str:
    """A token or a name between quotes, as Python writes it, clipped."""
    return repr(clipped(text, most))
