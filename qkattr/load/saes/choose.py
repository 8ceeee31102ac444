"""What the user says about a set of SAEs: which of several, and what the files leave open."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from pathlib import Path

import msgspec

from qkattr.errors import InputError
from qkattr.load.files import read_toml
from qkattr.load.mapped import some
from qkattr.load.saes.boundaries import boundary_of
from qkattr.load.saes.header import Header, Options

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


def choose(headers: list[Header], root: Path, pattern: str | None) -> list[Header]:
    """The SAEs whose path below the root matches a pattern, anywhere in it.

    pattern: a glob, whose `*` goes across folders; or `GLOB@N`: of those that match, the one
    at each boundary whose L0 is nearest to N, as its makers say. None: all.
    """
    if pattern is None:
        return headers
    nearest = _NEAREST.fullmatch(pattern)
    glob = f"*{nearest[1] if nearest else pattern}*"
    kept = [h for h in headers if fnmatch.fnmatchcase(path_below(root, h), glob)]
    if not kept:
        names = some([path_below(root, h) for h in headers])
        raise InputError(f"no SAE below {root} matches {pattern!r:.60}; there are {names}")
    if not nearest:
        return kept
    best: dict[int, Header] = {}
    for header in kept:
        if header.l0 is None:
            raise InputError(
                f"{header.name} does not say its L0, so that @{nearest[2]} cannot "
                "choose; give a pattern without @"
            )
        other = best.setdefault(boundary_of(header), header)
        if _distance(header, nearest[2]) < _distance(other, nearest[2]):
            best[boundary_of(header)] = header
    return list(best.values())


def _distance(header: Header, n: str) -> float:
    return abs((header.l0 or 0.0) - float(n))


def path_below(root: Path, header: Header) -> str:
    """An SAE's path below the root of its set, as patterns see it."""
    return header.folder.relative_to(root).as_posix()
