"""What text cards were made from is said wherever cards are shown."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from qkattr.cli.main import main
from qkattr.load.smollm2 import ABOUT_PACKAGED, packaged_cards

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def cards():
    return packaged_cards()


def test_the_shares_that_the_docs_name(cards):
    spec = importlib.util.spec_from_file_location("near", ROOT / "docs" / "near.py")
    assert spec is not None and spec.loader is not None
    near = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(near)
    rows, strongest = near.made_rows(cards), near.strongest_is_made(cards)
    assert (rows.sum(), len(rows)) == (104, 1024)
    assert f"{100 * strongest.sum() / (cards.count > 0).sum():.0f}" == "13"
    said = (ROOT / "docs" / "training.md").read_text()
    assert "104 of 1,024" in said and "13 % of all features" in said


def test_origin(cards):
    assert cards.origin().startswith(
        "The cards were made from 1,024 rows of 128 tokens of rows.npy."
    )
    assert cards.origin().endswith(ABOUT_PACKAGED)


@pytest.mark.parametrize("text, said", [("notes.txt", "tokens of notes.txt."), ("", "tokens.")])
def test_origin_of_other_cards(cards, text, said):
    import dataclasses

    meta = {k: v for k, v in cards.meta.items() if k != "about"} | dict(text=text)
    assert dataclasses.replace(cards, meta=meta).origin().endswith(said)


@pytest.mark.parametrize("asked", [(), ("--boundary", "12", "--index", "345")])
def test_the_terminal_says_it(asked, capsys):
    assert main(["features", *asked]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "a tenth of it short sentences from templates" in said


@pytest.mark.slow
def test_the_page_says_it(bundle):
    import qkattr

    page = qkattr.trace(bundle, "I always loved visiting Aunt Sally.", qk=0)._repr_html_()
    assert "a tenth of it short sentences from templates" in page
