"""Buckets of sizes, so that another prompt meets code that is already compiled."""

from __future__ import annotations


def bucket(n: int, *, smallest: int = 8) -> int:
    """The least of 8, 12, 16, 24, 32, 48, 64, ... (doublings of 8 and of 12) that holds n."""
    size = smallest
    while size < n:
        if n <= size * 3 // 2:
            return size * 3 // 2
        size *= 2
    return size
