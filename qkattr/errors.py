"""The one exception that means "the input is wrong" (exit code 2), as opposed to a fault of qkattr (exit code 1)."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: what is wrong, what was expected, what was found, and what to do.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
