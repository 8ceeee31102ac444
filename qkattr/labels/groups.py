"""Features by what people call them: named groups, and a search of labels.

A group is a table of a TOML file: [aunt-names]  features = ["23:1441", "24:720"]
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from qkattr.errors import InputError, quoted, some
from qkattr.files import read_toml
from qkattr.kinds import Group, Labels

_NAME = re.compile(r"([0-9]{1,5}):([0-9]{1,9})")


def read_group(path: str | Path, name: str | None = None) -> Group:
    """The features of one group of a TOML file, by boundary; the only one if it has no name.

    Raises:
      InputError: the file cannot be read, or holds no such group.
    """
    groups = read_toml(path)
    if name is None and len(groups) == 1:
        name = next(iter(groups))
    if name not in groups:
        found = some([quoted(group) for group in groups], 8)
        if not found:
            raise InputError(f'{path} has no groups; write [name] and features = ["23:1441"]')
        if name is None:
            raise InputError(f"{path} has several groups: {found}; say which, as in {path}:NAME")
        raise InputError(f"{path} has no group {quoted(name)}, only {found}; give one of these")
    return _features(groups[name], name, path)


def read_groups(path: str | Path) -> dict[str, Group]:
    """All groups of a TOML file.

    Raises:
      InputError: the file cannot be read, or holds no groups.
    """
    groups = read_toml(path)
    if not groups:
        raise InputError(f'{path} has no groups; write [name] and features = ["23:1441"]')
    return {name: _features(table, name, path) for name, table in groups.items()}


def _features(table: object, name: str, path: str | Path) -> Group:
    features = table.get("features") if isinstance(table, dict) else None
    if not isinstance(features, list) or not features:
        raise InputError(
            f"{path}: group {quoted(name)} lists no features; "
            'write features = ["23:1441", "24:720"]'
        )
    return _by_boundary(_feature(str(feature), path) for feature in features)


def search_labels(labels: Labels, text: str) -> Group:
    """The features whose label contains a text, whatever its case.

    Raises:
      InputError: there is none.
    """
    if not labels:
        raise InputError("no feature has a label; give labels, or SAEs with cards")
    found = [f for f, label in labels.items() if text.casefold() in label.casefold()]
    if not found:
        raise InputError(
            f"none of {len(labels)} labels contains {quoted(text)}; "
            f"give other text, or labels that have it"
        )
    return _by_boundary(sorted(found))


def _by_boundary(features) -> Group:
    group: Group = defaultdict(list)
    for boundary, feature in features:
        group[boundary].append(feature)
    return dict(group)


def _feature(name: str, path) -> tuple[int, int]:
    match = _NAME.fullmatch(name.strip())
    if not match:
        raise InputError(f"{path}: {quoted(name)} names no feature; write boundary:feature")
    return int(match[1]), int(match[2])
