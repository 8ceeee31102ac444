"""What a saved result answers without its model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qkattr.kinds import NO_WINDOW, Place
from qkattr.positions import find_place

if TYPE_CHECKING:
    from qkattr.qk.table import QKAttribution
    from qkattr.result import Result


def place_in(result: Result, place: tuple) -> Place:
    """`find_place` for a result, with or without its model."""
    n_heads = result.settings["n_heads"]
    return find_place(result.tokens, place, n_heads=n_heads, windows=windows_of(result))


def windows_of(result: Result) -> list[int]:
    """The attention window of every block."""
    return [NO_WINDOW if w is None else w for w in result.settings["windows"]]


def stored_in_full(result: Result, place: Place, most: int | None = None) -> QKAttribution | None:
    """The attribution that the result itself holds, unless some of its pairs were left out.

    most: how many of the strongest pairs are needed; None: all.
    """
    stored = result.qk.get(".".join(map(str, place)))
    if stored is None:
        return None
    needed = stored.n_pairs if most is None else min(most, stored.n_pairs)
    return stored if needed <= len(stored.pairs) else None
