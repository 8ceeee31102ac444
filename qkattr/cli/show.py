"""Tables for the terminal. Prompts, tokens and labels are hostile: nothing of them is markup.

Whatever is printed goes through `printable`, so that no escape sequence reaches the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qkattr.errors import printable


def console() -> Console:
    """Standard output, as wide as the terminal (120 columns in a pipe)."""
    out = Console(highlight=False, markup=False, emoji=False)
    if out.is_terminal:
        return out
    return Console(highlight=False, markup=False, emoji=False, width=120)


def say(out: Console, text: str) -> None:
    """A line of text."""
    out.print(Text(printable(text)))


def show_table(
    out: Console, title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]
) -> None:
    """A table; columns whose name ends in "|" are numbers, to the right."""
    heading = Text(printable(title))
    table = Table(box=box.SIMPLE_HEAD, title=heading, title_justify="left", title_style="bold")
    for column in columns:
        right = column.endswith("|")
        table.add_column(column.rstrip("|"), justify="right" if right else "left", no_wrap=right)
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    out.print(table)


def percent(x: float) -> str:
    """A share, in percent."""
    return f"{100 * x:.2f} %"


def bar(x: float, most: float, width: int = 16) -> str:
    """A signed bar of characters."""
    n = round(width * abs(x) / most) if most else 0
    return ("█" if x >= 0 else "░") * n
