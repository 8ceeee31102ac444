"""What a plain install brings: every package that is imported without one of the extras."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Extras whose packages are asked for where they are used, with a line that says how to get them.
OPTIONAL = ("frames", "figures", "train", "parquet")


def named(requirements: list[str]) -> set[str]:
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
    return {name.lower().replace("-", "_") for name in names}


def imported() -> dict[str, set[str]]:
    """The distributions that the package imports anywhere, and in which files."""
    of, found = packages_distributions(), {}
    for path in (ROOT / "qkattr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for module in {module.split(".")[0] for module in modules}:
                if module not in sys.stdlib_module_names and module != "qkattr":
                    name = of.get(module, [module])[0].lower().replace("-", "_")
                    found.setdefault(name, set()).add(path.name)
    return found


def test_every_import_is_a_dependency_or_an_extra():
    required = named(PROJECT["dependencies"])
    extras = {name: named(PROJECT["optional-dependencies"][name]) for name in OPTIONAL}
    known = required.union(*extras.values())
    assert {name: files for name, files in imported().items() if name not in known} == {}


@pytest.mark.parametrize("package", ["gguf", "safetensors", "tokenizers", "jax", "typer"])
def test_what_the_demo_needs_is_no_extra(package):
    assert package in named(PROJECT["dependencies"])


def test_the_wheel_is_tried_where_changes_are():
    """`.ci/run` and `make wheel` build it, install it alone and run the demo."""
    assert "make wheel" in (ROOT / ".ci/run").read_text()
    assert "\n\t.ci/wheel $(PYTHON)\n" in (ROOT / "Makefile").read_text()
