"""What people call of a room is offered by the room itself: `from qkattr.qk import qk_terms`."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("model", "sources", "qk", "graph")
PAGES = ("api", "embedding", "interventions", "scaling", "models")
NAME = re.compile(r"qkattr\.(model|sources|qk|graph)\.(\w+(?:\.\w+)*)")


def room(name: str):
    return importlib.import_module(f"qkattr.{name}")


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_offers_what_type_checkers_see(name):
    tree = ast.parse(Path(room(name).__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith(f"qkattr.{name}.")
        for alias in node.names
    }
    assert sorted(seen) == room(name).__all__
    for said, home in seen.items():
        assert getattr(room(name), said) is getattr(importlib.import_module(home), said)
        assert said in dir(room(name))


@pytest.mark.parametrize("name", ROOMS)
def test_no_name_is_a_modules_too(name):
    """Else it would depend on what was imported before which of them one gets."""
    modules = {found.name for found in pkgutil.iter_modules(room(name).__path__)}
    assert not modules & {*room(name).__all__}


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_what_rooms_offer(page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    named = {(found[1], found[2]) for found in NAME.finditer(text)}
    assert named or page in ("models", "scaling")
    for where, said in named:
        assert said in room(where).__all__, f"{page}.md: qkattr.{where}.{said}"
    for where, said in re.findall(r"^from qkattr\.(\w+) import ([\w, ]+)$", text, re.MULTILINE):
        for part in said.split(", "):
            assert hasattr(room(where), part), f"{page}.md: from qkattr.{where} import {part}"
    assert not re.findall(r"^from qkattr\.(?:model|sources|qk|graph)\.", text, re.MULTILINE)


@pytest.mark.parametrize("name", ROOMS)
def test_other_names_are_refused(name):
    with pytest.raises(AttributeError, match=f"module 'qkattr.{name}' has no attribute 'nothing'"):
        room(name).nothing  # noqa: B018
    with pytest.raises(ImportError):
        exec(f"from qkattr.{name} import nothing")


def test_rooms_wait_for_nothing():
    script = (
        "import sys, qkattr.model, qkattr.sources, qkattr.qk, qkattr.graph\n"
        "assert not {'jax', 'flax', 'chex', 'numpy'} & {*sys.modules}\n"
        "from qkattr.qk import QKTerms, qk_terms\nassert 'jax' in sys.modules\n"
        "from qkattr.qk import terms\nassert terms.qk_terms is qk_terms"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
