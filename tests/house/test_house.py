"""The house: rooms import downwards, nothing imports in a circle, no two types share a name.

The contracts of import-linter in pyproject.toml say which rooms there are. The circles are counted
by a script of our own over the syntax tree. Imports inside functions and for type checking count in
both.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qkattr"


def modules(package: Path) -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for path in package.rglob("*.py"):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """The modules of the package that each module imports, wherever in it."""
    known, found = modules(package), defaultdict(set)
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= {node.module} if not inner & known.keys() else inner
    return {
        name: {other for other in found[name] & known.keys() if other != name} for name in known
    }


def circles(graph: dict[str, set[str]]) -> set[str]:
    """The modules that can be reached from themselves."""
    reached = {name: set(others) for name, others in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reached[name]:
                reached[name] |= reached[middle]
    return {name for name in graph if name in reached[name]}


def lint(root: Path) -> subprocess.CompletedProcess:
    """Check the contracts of pyproject.toml on the package below a folder."""
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    return subprocess.run(
        [*command, *config], cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )


@pytest.fixture
def copy(tmp_path):
    """A copy of the package that can be broken."""
    leave = shutil.ignore_patterns("data", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "qkattr", ignore=leave)
    (tmp_path / "qkattr/data").mkdir()
    return tmp_path


def test_nothing_imports_in_a_circle():
    assert circles(imports(PACKAGE)) == set()


def test_the_contracts_hold():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "module, line, contract",
    [
        ("model/layers", "from qkattr.sources.components import Components", "rooms import"),
        ("qk/terms", "def late():\n    from qkattr.graph.backward import sweep", "rooms import"),
        ("kinds", "if TYPE_CHECKING:\n    from qkattr.subject import Subject", "rooms import"),
        ("export/html", "from qkattr.api import Result", "does not know its front doors"),
    ],
)
def test_a_broken_contract_is_seen(copy, module, line, contract):
    path = copy / f"qkattr/{module}.py"
    path.write_text(path.read_text(encoding="utf-8") + f"\n\n{line}\n", encoding="utf-8")
    done = lint(copy)
    broken = [said for said in done.stdout.splitlines() if said.endswith("BROKEN")]
    assert done.returncode == 1 and any(contract in said for said in broken), done.stdout


def test_a_circle_is_seen(copy):
    path = copy / "qkattr/qk/table.py"
    late = "\n\ndef late():\n    from qkattr.qk.rows import unfolded\n"
    path.write_text(path.read_text(encoding="utf-8") + late, encoding="utf-8")
    assert {"qkattr.qk.table", "qkattr.qk.rows"} <= circles(imports(copy / "qkattr"))


def test_no_two_types_share_a_name():
    """Classes and aliases; those that begin with _ are their module's own."""
    found = Counter()
    for path in modules(PACKAGE).values():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found[node.name] += 1
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                variable = isinstance(node.value, ast.Call)  # a TypeVar
                found[name] += bool(re.fullmatch(r"[A-Z]\w*[a-z]\w*", name)) and not variable
    assert [name for name, n in found.items() if n > 1 and not name.startswith("_")] == []


def test_no_file_is_long():
    """400 lines, of source or of tests."""
    paths = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    long = [p.name for p in paths if len(p.read_text(encoding="utf-8").splitlines()) > 400]
    assert long == []
