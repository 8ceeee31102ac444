"""Writes qkattr/data/config_attributes.toml: which attributes of a config change what is computed.

    pip download --no-deps --dest wheels transformers==5.24.0      once for each version
    for w in wheels/*.whl; do unzip -q $w '*.py' -d unpacked/$(basename $w .whl); done
    python docs/config_attributes.py unpacked/*

The file names the versions that were read last. The script reads the configuration and modeling
files of unpacked `transformers` releases (before 2.0: `pytorch-transformers`) as syntax trees and
imports none of them. Versions, defaults and reads come from the releases; what an attribute does
is judged by hand, in `config_judgements.py`. An attribute without a judgement ends the run with
its name, and so does one that is judged to change nothing and yet is read by the code of a causal
language model, unless a reason is given.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import datetime
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from config_judgements import (
    CLASSES,
    FAMILY_INERT,
    GROUPS,
    HEAD,
    ONLY,
    USED,
    USED_WHY,
    WHY,
)

FILE = Path(__file__).parents[1] / "qkattr/data/config_attributes.toml"
# Classes and functions whose reads change nothing that a causal language model computes.
ELSEWHERE = re.compile(
    r"SequenceClassification|TokenClassification|QuestionAnswering|DoubleHeads|SequenceSummary"
    r"|MultiModalProjector|Config$|attention_forward$"
)
NOT_LITERAL = object()


@dataclasses.dataclass(frozen=True)
class Release:
    """An unpacked wheel. version: as in 4.57.6; root: the package's folder."""

    version: tuple[int, ...]
    root: Path

    @property
    def minor(self) -> str:
        return f"{self.version[0]}.{self.version[1]}"


def releases(folders: list[str]) -> list[Release]:
    """The oldest first."""
    found = []
    for folder in map(Path, folders):
        version = re.search(r"transformers-(\d+(?:\.\d+)+)", folder.name)
        roots = [folder / name for name in ("transformers", "pytorch_transformers")]
        root = next((root for root in roots if root.is_dir()), None)
        if version is None or root is None:
            raise SystemExit(f"{folder} is not an unpacked wheel such as transformers-5.0.0-...")
        found.append(Release(tuple(map(int, version[1].split("."))), root))
    return sorted(found, key=lambda release: release.version)


# What a class sets -------------------------------------------------------------------------------


def value_of(node: ast.expr | None) -> Any:
    """A literal, a product of literals, or the default of a checked field; else NOT_LITERAL."""
    try:
        if isinstance(node, ast.Call):
            node = next(k.value for k in node.keywords if k.arg == "default")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return value_of(node.left) * value_of(node.right)
        return ast.literal_eval(node)
    except (ValueError, TypeError, StopIteration):
        return NOT_LITERAL


def attributes(class_: ast.ClassDef) -> dict[str, Any]:
    """What configs of a class hold or take from JSON, each with its default or NOT_LITERAL."""
    found: dict[str, Any] = {}
    for name, default in _attributes(class_):
        if found.get(name, NOT_LITERAL) is NOT_LITERAL:
            found[name] = default
    return found


def _attributes(class_: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    decorators = " ".join(map(ast.unparse, class_.decorator_list))
    for node in class_.body:
        if isinstance(node, ast.AnnAssign) and re.search("dataclass|strict", decorators):
            if "ClassVar" not in ast.unparse(node.annotation):
                yield ast.unparse(node.target), value_of(node.value)
        if not isinstance(node, ast.FunctionDef):
            continue
        if "generation_defaults" in node.name:
            returned = next(n.value for n in ast.walk(node) if isinstance(n, ast.Return))
            yield from ast.literal_eval(returned).items()
        if node.name == "__init__":
            yield from _parameters(node.args)
        if node.name in ("__init__", "__post_init__", "convert_rope_params_to_dict"):
            yield from _popped(node)
            yield from ((name, NOT_LITERAL) for name in _assigned(node))
        if any(".setter" in ast.unparse(d) for d in node.decorator_list):
            yield node.name, NOT_LITERAL
            yield from ((name, NOT_LITERAL) for name in _assigned(node))


def _parameters(args: ast.arguments) -> Iterator[tuple[str, Any]]:
    named = args.args[len(args.args) - len(args.defaults) :]
    both = [
        *zip(named, args.defaults, strict=True),
        *zip(args.kwonlyargs, args.kw_defaults, strict=True),
    ]
    yield from ((arg.arg, value_of(default)) for arg, default in both)


def _popped(function: ast.FunctionDef) -> Iterator[tuple[str, Any]]:
    """kwargs.pop("name", default), kwargs.get and "name" in kwargs."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and re.match(r"kwargs\.(pop|get)\('", ast.unparse(node)):
            default = value_of(node.args[1]) if len(node.args) > 1 else NOT_LITERAL
            yield ast.literal_eval(node.args[0]), default
        if isinstance(node, ast.Compare) and ast.unparse(node).endswith("' in kwargs"):
            yield ast.literal_eval(node.left), NOT_LITERAL


def _assigned(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) == "self":
                yield node.attr


def find_class(files: list[Path], names: tuple[str, ...]) -> ast.ClassDef | None:
    for file in filter(Path.is_file, files):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name in names:
                return node
    return None


def of_base(release: Release) -> dict[str, Any]:
    files = [release.root / f"{name}_utils.py" for name in ("configuration", "modeling")]
    class_ = find_class(files, ("PretrainedConfig", "PreTrainedConfig"))
    return {} if class_ is None else attributes(class_)


def of_generation(release: Release) -> dict[str, Any]:
    file = release.root / "generation/configuration_utils.py"
    class_ = find_class([file], ("GenerationConfig",))
    return {} if class_ is None else attributes(class_)


def of_family(release: Release, family: str) -> dict[str, Any]:
    files = [release.root / f"{path}.py" for path in _paths(family, "configuration")]
    files += [release.root / f"modeling_{family}.py"]
    class_ = find_class(files, (CLASSES[family],))
    return {} if class_ is None else attributes(class_)


def _paths(family: str, kind: str) -> tuple[str, str]:
    name = family.removesuffix("_text")
    return f"models/{name}/{kind}_{name}", f"{kind}_{name}"


# What a forward pass reads -----------------------------------------------------------------------


def reads(release: Release, family: str) -> set[str]:
    """Attributes of the config that the family's model, or what all models share, looks at."""
    own = _existing(release, _paths(family, "modeling"))
    shared = _existing(release, ("modeling_rope_utils", "masking_utils"))
    return {name for file in (own and own + shared) for name in _reads(file)}


def _existing(release: Release, paths: Iterable[str]) -> list[Path]:
    return [file for file in (release.root / f"{path}.py" for path in paths) if file.is_file()]


def _reads(file: Path) -> Iterator[str]:
    for top in ast.parse(file.read_text(encoding="utf-8")).body:
        if not ELSEWHERE.search(getattr(top, "name", "")):
            yield from _read_in(top)


def _read_in(node: ast.AST) -> Iterator[str]:
    if getattr(node, "name", "") == "_init_weights":
        return
    if isinstance(node, ast.Attribute) and _is_config(node.value):
        yield node.attr
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
        if _is_config(node.args[0]) and isinstance(node.args[1], ast.Constant):
            yield str(node.args[1].value)
    for child in ast.iter_child_nodes(node):
        yield from _read_in(child)


def _is_config(node: ast.expr) -> bool:
    return bool(re.search(r"(^|\.)(text_)?config$", ast.unparse(node)))


# The table ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class History:
    """Of one attribute: the releases that set it, its defaults, the releases that read it."""

    having: list[str] = dataclasses.field(default_factory=list)
    defaults: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    reading: list[str] = dataclasses.field(default_factory=list)

    def add(self, minor: str, default: Any) -> None:
        self.having.append(minor)
        if default is not NOT_LITERAL:
            self.defaults.append((minor, default))

    def entry(self, key: tuple[str, str], *, used: bool = False) -> str:
        """An inline table. key: family (or "") and name. used: it is part of the arithmetic."""
        fields = [("versions", span(self.having))] if self.having else []
        fields += [("default", json.dumps(self.defaults[-1][1]))] if self.defaults else []
        was = [f"{json.dumps(value)} in {span(minors)}" for value, minors in self._before()]
        fields += [("was", ", ".join(was))] if was else []
        if not used:
            fields += [("only", only)] if (only := of_key(ONLY, key)) else []
            fields += [("read", span(self.reading))] if self.reading else []
        fields += [("why", why)] if (why := of_key(USED_WHY if used else WHY, key)) else []
        return "{ " + ", ".join(f"{k} = {_text(v)}" for k, v in fields) + " }" if fields else "{}"

    def _before(self) -> Iterator[tuple[Any, list[str]]]:
        for text in dict.fromkeys(json.dumps(value) for _, value in self.defaults[:-1]):
            if text != json.dumps(self.defaults[-1][1]):
                yield json.loads(text), [v for v, d in self.defaults if json.dumps(d) == text]


def of_key(table: dict, key: tuple[str, str]) -> str:
    """What a table says of a family's attribute, or of the attribute of any family."""
    return table.get(key, table.get(key[1], ""))


def span(minors: list[str]) -> str:
    return minors[0] if minors[0] == minors[-1] else f"{minors[0]}-{minors[-1]}"


def _text(value: str) -> str:
    return f"'{value}'" if '"' in value else f'"{value}"'


def histories(found: list[Release], of: Callable[[Release], dict[str, Any]]) -> dict[str, History]:
    table: dict[str, History] = {}
    for release in found:
        for name, default in of(release).items():
            table.setdefault(name, History()).add(release.minor, default)
    return table


def note_reads(table: dict[str, History], found: list[Release], families: list[str]) -> None:
    for release in found:
        names = {name for family in families for name in reads(release, family)}
        for name in names & set(table):
            table[name].reading.append(release.minor)


def section(
    title: str, table: dict[str, History], names: Iterable[str], family: str = ""
) -> list[str]:
    used = title.endswith(".used")
    lines = [
        f"{name if re.fullmatch('[A-Za-z0-9_-]+', name) else json.dumps(name)} = "
        f"{table[name].entry((family, name), used=used)}"
        for name in sorted(names)
    ]
    return ["", f"[{title}]", *lines] if lines else []


def base_table(found: list[Release]) -> tuple[list[str], set[str]]:
    """The sections of the base class, and all names in them."""
    judged = {name: group for group, names in GROUPS.items() for name in names.split()}
    table = histories(found, of_base)
    unjudged("the base class", set(table) - set(judged))
    for name in judged:
        table.setdefault(name, History())
    note_reads(table, found, list(CLASSES))
    explained("", table, set(judged) - set(GROUPS["arithmetic"].split()))
    lines = []
    for group in GROUPS:
        names = [name for name, its in judged.items() if its == group]
        lines += section(f"base.{group}", table, names)
    return lines, set(judged)


def generation_table(found: list[Release], base: set[str]) -> list[str]:
    names = sorted(set(histories(found, of_generation)) - base)
    if clash := set(names) & set(USED.split()):
        raise SystemExit(f"the generation config sets {', '.join(sorted(clash))}, which is in use")
    return ["", "[generation]", *array("names", names)]


def array(name: str, texts: Iterable[str]) -> list[str]:
    inside = ", ".join(json.dumps(text) for text in texts)
    return [
        f"{name} = [",
        *textwrap.wrap(inside, 96, initial_indent="  ", subsequent_indent="  "),
        "]",
    ]


def family_table(found: list[Release], family: str, base: set[str]) -> list[str]:
    table = histories(found, lambda release: of_family(release, family))
    inert = set(FAMILY_INERT.get(family, "").split())
    used = (set(table) & set(USED.split())) - inert
    unjudged(CLASSES[family], set(table) - base - inert - used)
    for name in inert:
        table.setdefault(name, History())
    note_reads(table, found, [family])
    explained(family, table, inert)
    return [
        *section(f"families.{family}.used", table, used, family),
        *section(f"families.{family}.inert", table, inert, family),
    ]


def unjudged(where: str, names: set[str]) -> None:
    if names:
        raise SystemExit(
            f"{where} sets {', '.join(sorted(names))}, which has no judgement; read what the "
            f"models do with it and say so in docs/config_judgements.py"
        )


def explained(family: str, table: dict[str, History], inert: set[str]) -> None:
    """An attribute that is read, and that changes nothing all the same, has a reason."""
    bare = [
        f"{name} (read in {span(table[name].reading)})"
        for name in sorted(inert)
        if table[name].reading and not of_key(WHY, (family, name))
    ]
    if bare:
        raise SystemExit(f"{family or 'the base class'}: no reason is given for {', '.join(bare)}")


def write(found: list[Release]) -> str:
    base, names = base_table(found)
    lines = [*base, *generation_table(found, names)]
    for family in CLASSES:
        lines += family_table(found, family, names)
    versions = array("transformers", (".".join(map(str, r.version)) for r in found))
    head = HEAD.replace("DATE", datetime.date.today().isoformat())
    return "\n".join([head, *versions, *lines]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("unpacked", nargs="+", help="folders of unpacked wheels")
    FILE.write_text(write(releases(parser.parse_args().unpacked)))


if __name__ == "__main__":
    main()
