"""What the user says about a set of SAEs: which of several, and what the files leave open."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from pathlib import Path

import msgspec

from qkattr.errors import InputError, some
from qkattr.files import read_toml
from qkattr.load.dictionaries.boundaries import boundary_of
from qkattr.load.dictionaries.header import Found, Header, Options
from qkattr.load.dictionaries.hooks import canonical

#: What the files do not say, beside them: the fields of `Options`.
SETTINGS = "qkattr.toml"
_NEAREST = re.compile(r"(.*)@(\d{1,6})")


def split_pattern(saes: str | Path) -> tuple[Path, str | None]:
    """`FOLDER` or `FOLDER:PATTERN`, split."""
    path = Path(saes)
    if not path.exists():
        folder, colon, pattern = str(saes).rpartition(":")
        if colon and pattern and Path(folder).is_dir():
            return Path(folder), pattern
    return path, None


def read_options(root: Path) -> tuple[Options, tuple[Path, ...]]:
    """The options that lie beside a set of SAEs, and their file if there is one."""
    path = root / SETTINGS
    if not path.is_file():
        return Options(), ()
    said = read_toml(path)
    if unknown := [n for n in said if n not in {f.name for f in dataclasses.fields(Options)}]:
        raise InputError(f"{path} has {some(unknown)}, which is not known; see docs/saes.md")
    try:
        return msgspec.convert(said, Options), (path,)
    except msgspec.ValidationError as e:
        raise InputError(f"{path}: {e}; see docs/saes.md") from e


def matching(
    found: list[Found], root: Path, pattern: str | None, called: str | None = None
) -> list[Found]:
    """The SAEs whose path below the root matches a pattern.

    pattern: a glob, whose `*` goes across folders, to be found anywhere in the path; one that
    begins with a slash is the whole path. Or `GLOB@N`, see `nearest`. None: all. called: the root,
    as errors call it.
    """
    if pattern is None:
        return found
    glob, _ = split_nearest(pattern)
    kept = [f for f in found if matches(path_below(root, f.path), glob)]
    if not kept:
        names = some([path_below(root, f.path) for f in found])
        raise InputError(
            f"no SAE below {called or root} matches {pattern!r:.60}; there are {names}"
        )
    return kept


def matches(path: str, glob: str) -> bool:
    """Whether a path below the root matches, whole if the glob begins with a slash."""
    return fnmatch.fnmatchcase(f"/{path}", glob if glob.startswith("/") else f"*{glob}*")


def nearest(headers: list[Header], pattern: str | None) -> list[Header]:
    """With `GLOB@N`, at each boundary the SAE whose L0 is nearest to N, as its makers say."""
    n = None if pattern is None else split_nearest(pattern)[1]
    if n is None:
        return headers
    best: dict[int, Header] = {}
    for header in headers:
        other = best.setdefault(boundary_of(header), header)
        if _distance(header, n) < _distance(other, n):
            best[boundary_of(header)] = header
    if unsaid := [header for header in best.values() if header.l0 is None]:
        raise InputError(
            f"{unsaid[0].name} does not say its L0, so that @{n} cannot choose; give a pattern "
            "without @"
        )
    return list(best.values())


def split_nearest(pattern: str) -> tuple[str, int | None]:
    """`GLOB@N`, split."""
    match = _NEAREST.fullmatch(pattern)
    return (match[1], int(match[2])) if match else (pattern, None)


def _distance(header: Header, n: int) -> float:
    """How far its L0 is; an SAE that says none is a copy of one that does, or all say none."""
    return math.inf if header.l0 is None else abs(header.l0 - n)


def path_below(root: Path, path: Path) -> str:
    """An SAE's path below the root of its set, as patterns see it."""
    below = path.relative_to(root).as_posix()
    return "" if below == "." else below


def check_factors(options: Options, found: list[Found]) -> None:
    """Raise `InputError` if a norm factor is of a hook that no SAE of the set has."""
    there = {f.hook for f in found}
    if unknown := [name for name in options.norm_factors if canonical(name) not in there]:
        raise InputError(
            f"norm_factors has {some(unknown)}, where no SAE was trained (qkattr.toml); there are "
            f"SAEs at {some(sorted(there))}"
        )
