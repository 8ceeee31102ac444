"""What the pages say that commands print is what they print."""

import importlib.util
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def outputs():
    spec = importlib.util.spec_from_file_location("outputs", DOCS / "outputs.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["outputs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_pages_show_what_their_commands_print(outputs):
    assert outputs.check() == []


def test_every_figure_of_the_pages_is_drawn_by_a_command(outputs):
    drawn = {*outputs.FIGURES, "page.png", "faithfulness.png"}  # the last: `faithfulness --out`
    assert {path.name for path in DOCS.glob("*.png")} == drawn


@pytest.mark.parametrize(
    "printed, same",
    [
        ("  23.2   +3.366   7.74 %\n", True),
        ("  23.2   +3.36   7.75 %\n", True),  # another machine's rounding
        ("  23.2   +4.366   7.74 %\n", False),
        ("  23.2   -3.366   7.74 %\n", False),
        ("  23.7   +3.366   7.74 %\n", False),
        ("  23.2   +3.366\n", False),
        ("  23.2   +3.366   7.74 %\n  24.4\n", False),
    ],
)
def test_differences_are_seen(outputs, printed, same):
    assert (outputs.differences("  23.2   +3.366   7.74 %\n", printed) == "") == same


def test_ranges_of_lines(outputs):
    text = "\n".join("abcdefgh")
    assert outputs.chosen(text, "1-2, 5, 7-") == "a\nb\n  ...\ne\n  ...\ng\nh\n"
