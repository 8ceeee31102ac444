"""Folders of SAEs in the formats that people publish them in; `docs/saes.md` lists them."""

from qkattr.load.dictionaries.find import (
    SaeFiles,
    SaeSet,
    by_boundary,
    check_set,
    find_saes,
    load_saes,
    recognise,
    split_pattern,
)
from qkattr.load.dictionaries.header import Header, Options, map_sae
from qkattr.load.dictionaries.saelens import CONFIG, WEIGHTS

__all__ = [
    "CONFIG",
    "Header",
    "Options",
    "SaeFiles",
    "SaeSet",
    "WEIGHTS",
    "by_boundary",
    "check_set",
    "find_saes",
    "load_saes",
    "map_sae",
    "recognise",
    "split_pattern",
]
