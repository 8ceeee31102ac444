"""`import qkattr` and `qkattr --help` wait for nothing, and every public name is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import qkattr

#: What takes long to import, and what only some commands need.
SLOW = ("jax", "flax", "numpy", "tokenizers", "safetensors", "rich", "jinja2", "gguf", "pandas")


def run(script: str) -> str:
    """What a new interpreter prints."""
    command = [sys.executable, "-W", "error", "-c", script]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def imported(script: str) -> set[str]:
    """Those of the slow packages that a new interpreter has after a script."""
    said = run(f"import sys\n{script}\nprint('\\n', *sorted({{*sys.modules}} & {{*{SLOW}}}))")
    return set(said.splitlines()[-1].split())


COMMANDS = "trace qk why heads steer faithfulness tokens check train pack demo features".split()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([c, "--help"] for c in COMMANDS)]
)
def test_help_imports_nothing_slow(arguments):
    script = f"from qkattr.cli.main import main\nassert main({arguments}) == 0"
    assert imported(script) == set()


def test_a_wrong_command_line_imports_nothing_slow():
    script = "from qkattr.cli.main import main\nassert main(['tokns', 'x']) == 2"
    assert imported(script) == set()


def test_the_package_imports_nothing_slow():
    assert imported("import qkattr, qkattr.errors") == set()
    assert "jax" in imported("import qkattr\nqkattr.why")


@pytest.mark.parametrize("name", qkattr.__all__)
def test_every_public_name_comes_alone(name):
    home = run(f"import qkattr\nprint(qkattr.{name}.__module__)")
    assert home.startswith("qkattr.")
    assert run(f"from qkattr import {name}\nprint({name}.__module__)") == home


@pytest.mark.parametrize(
    "first",
    [
        "import qkattr.load.bundle",
        "import qkattr.load",
        "from qkattr.load.models import hf",
        "from qkattr.load.tensors.mapped import open_mapped",
        "from qkattr import load",
    ],
)
def test_load_is_the_function_whatever_was_imported_before(first):
    script = (
        f"{first}\nimport qkattr\nfrom qkattr.load import hub\n"
        "from qkattr.load.opening import load\n"
        "assert qkattr.load is load and hub.__name__ == 'qkattr.load.hub'\n"
        "from qkattr import load as again\nassert again is load"
    )
    run(script)


def test_names_are_listed_and_others_refused():
    assert {*qkattr.__all__} <= {*dir(qkattr)}
    for name in ("Loader", "graph_", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"module 'qkattr' has no attribute '{name}'"):
            getattr(qkattr, name)
    with pytest.raises(ImportError):
        from qkattr import nothing_of_this_name  # noqa: F401  # pyright: ignore
