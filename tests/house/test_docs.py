"""The documentation is true: its Python runs, its links lead somewhere, and what it names exists.

Every ```python block of a page runs, in order, in one namespace; ```python skip is left out. A
block whose first line has `# needs smollm2` runs in a slow test. They print what a ```text printed
block holds.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import qkattr
from qkattr.options import TraceOptions

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REAL = "# needs smollm2"
PRINTED = re.compile(r"^```text printed\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python[ \t]*(skip)?[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, real: bool) -> list[str]:
    """A page's blocks, each led by the lines above it, so that a failure names the page's line."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in BLOCK.finditer(text):
        if not block[1] and (REAL in block[2].split("\n", 1)[0]) == real:
            found.append("\n" * text[: block.start(2)].count("\n") + block[2])
    return found


def pages(real: bool) -> list:
    return [pytest.param(p, id=p.stem) for p in PAGES if blocks(p, real)]


def execute(page: Path, real: bool) -> None:
    namespace: dict = {"__name__": "docs"}
    for block in blocks(page, real):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", pages(real=False))
def test_pages_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    execute(page, real=False)
    printed = capsys.readouterr().out
    for said in PRINTED.findall(page.read_text(encoding="utf-8")):
        assert said in printed


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(real=True))
def test_pages_run_on_the_real_model(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    execute(page, real=True)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(other), f"{page.name} links to {target}"


def resolve(name: str):
    """What a dotted name below `qkattr` stands for; an attribute goes before a module (`load`)."""
    value, path = qkattr, "qkattr"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        if isinstance(value, types.ModuleType) and not hasattr(value, part):
            value = importlib.import_module(path)
        elif callable(getattr(value, part)) and path != name:
            value = importlib.import_module(path)
        else:
            value = getattr(value, part)
    return value


def test_names_of_the_api_exist():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(qkattr(?:\.\w+)+)", text))
    assert len(named) > 40
    for name in named:
        resolve(name)
    assert {f"qkattr.{name}" for name in qkattr.__all__} <= named


def test_signatures_of_the_api_name_real_arguments():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name, arguments in re.findall(r"^\| `(qkattr[\w.]+)\(([^`]*)\)`", text, re.MULTILINE):
        real = inspect.signature(resolve(name)).parameters
        parts = re.sub(r"\(.*?\)", "", arguments).split(",")
        said = [part.strip().split("=")[0] for part in parts]
        said = [a.removeprefix("**") for a in said if a not in ("*", "...", "")]
        assert set(said) <= set(real), f"{name} has arguments {list(real)}, api.md says {said}"


def test_fields_of_the_api_exist():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    structs = text[text.index("## Structs") :]
    for name, row in re.findall(r"^\| `(qkattr[\w.]+)` \| (.*) \|$", structs, re.MULTILINE):
        value = resolve(name)
        if not (dataclasses.is_dataclass(value) and isinstance(value, type)):
            continue
        row = re.sub(r"\([^)]*\)", "", row)  # values that a field may have
        row = row.split("; ")[0]
        known = {f.name for f in dataclasses.fields(value)} | set(dir(value))
        for field in re.findall(r"`([a-z]\w*)(?: \[[^`]*\])?`", row):
            assert field in known, f"api.md: {name} has no {field}"


def test_options_are_listed_with_their_defaults():
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", text, re.MULTILINE))
    expected = {f.name: f.default for f in dataclasses.fields(TraceOptions)}
    shown = {name: value.replace('"', "'") for name, value in listed.items() if name in expected}
    assert shown == {name: repr(value) for name, value in expected.items()}


def test_tests_that_pages_name_exist():
    for page in PAGES:
        for file, _, test in re.findall(
            r"`tests/((?:\w+/)*test_\w+\.py)(::(\w+))?`", page.read_text(encoding="utf-8")
        ):
            path = ROOT / "tests" / file
            assert path.exists(), f"{page.name} names {file}"
            assert f"def {test}(" in path.read_text(encoding="utf-8") or not test, (
                f"{page.name} names {file}::{test}"
            )


def test_the_example_model_is_not_qkattrs():
    """The page's own attention code: its first block knows nothing of qkattr."""
    first = blocks(ROOT / "docs" / "embedding.md", real=False)[0]
    assert "qkattr" not in first
    namespace: dict = {"__name__": "docs"}
    exec(compile(first, "embedding.md", "exec"), namespace)
    model = namespace["Decoder"](namespace["nnx"].Rngs(3))
    tokens = jax.random.randint(jax.random.key(4), (namespace["T"],), 0, namespace["V"])
    logits, boundaries, scores = model(tokens)
    # Causal, by its own account: what comes later changes nothing before it.
    other = model(tokens.at[-1].set((tokens[-1] + 1) % namespace["V"]))
    np.testing.assert_array_equal(boundaries[:, :-1], other[1][:, :-1])
    assert logits.shape[0] == scores.shape[2] == namespace["T"]
