"""The models and SAEs known by name: `data/registry.toml`, typed and checked.

A set of SAEs is named `NAME` or `NAME:CHOICE,CHOICE`, as in `gemma-scope-2-270m-pt-res:262k,big`;
what is not chosen is the entry's first. Nothing here touches the network or the disk's cache.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Iterable
from importlib import resources
from typing import Any, Literal

import msgspec

from qkattr.errors import InputError, quoted

Format = Literal[
    "saelens",
    "gemma-scope",
    "gemma-scope-2",
    "llama-scope",
    "llama-scope-r1",
    "sparsify",
    "qwen-scope",
]


class ModelEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model; the fields are explained in the file."""

    repo: str
    blocks: int
    license: str
    gated: bool = False
    note: str = ""


class Extra(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An SAE that does not follow its set's pattern. choice: the value that asks for it; None: it
    is always one of the set."""

    folder: str
    boundary: int
    source: str | None = None
    choice: str | None = None


class SaeEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A set of SAEs; the fields are explained in the file."""

    repo: str
    folder: str
    files: list[str]
    model: str
    format: Format
    hook: Literal["resid_post", "resid_pre"]
    layers: int
    license: str
    aliases: list[str] = []
    optional: list[str] = []
    choices: dict[str, list[str]] = {}
    l0_of_layer: dict[str, list[int]] = {}
    extra: list[Extra] = []
    width: str | None = None
    prepend_bos: bool | None = None
    centred: bool = False
    norm: Literal["in the files"] | None = None
    scan: str | None = None
    source_set: str | None = None
    sourced: list[int] | None = None
    note: str = ""
    unsure: str = ""


class Registry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    models: dict[str, ModelEntry]
    saes: dict[str, SaeEntry]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where Neuronpedia has the cards of a set: pages `scan/source/index`.

    sources: by boundary. source_set: the part of their names that all share, None without sources.
    pre: source L is the stream before block L, boundary L.
    """

    scan: str
    source_set: str | None
    sources: dict[int, str]
    pre: bool

    def to_json(self) -> dict[str, Any]:
        """As results keep it."""
        return dict(scan=self.scan, source_set=self.source_set, pre=self.pre)

    @classmethod
    def from_json(cls, raw: dict[str, Any], n_blocks: int) -> Source:
        """As results keep it: one source a boundary, whether it is there or not."""
        name, pre = raw["source_set"], raw["pre"]
        layers = range(n_blocks + pre) if name else ()
        return cls(raw["scan"], name, {i + (not pre): f"{i}-{name}" for i in layers}, pre)


@dataclasses.dataclass(frozen=True)
class SaeChoice:
    """A set of SAEs with its choices made. chosen: by the name of the choice."""

    name: str
    entry: SaeEntry
    chosen: dict[str, str]

    @property
    def repo(self) -> str:
        return self.entry.repo.format(**self.chosen)

    @property
    def model_repo(self) -> str:
        """The repository of the model that they were trained on."""
        return registry().models[self.entry.model].repo

    def files(self, *, optional: bool = False) -> dict[int, tuple[str, ...]]:
        """The files of each boundary's SAE, as paths in the repository; or those it may lack."""
        names = self.entry.optional if optional else self.entry.files
        shift = self.entry.hook == "resid_post"
        files = {
            b + shift: _paths(self._fill(self.entry.folder, b), names, b) for b in self._layers
        }
        return files | {e.boundary: _paths(e.folder, names, 0) for e in self._extra}

    def source(self) -> Source | None:
        """What Neuronpedia calls them; None where that is not known."""
        entry, pre = self.entry, self.entry.hook == "resid_pre"
        if entry.scan is None:
            return None
        if entry.source_set is None:
            return Source(entry.scan, None, {}, pre)
        name = entry.source_set.format(**self.chosen)
        layers = self._layers if entry.sourced is None else entry.sourced
        sources = {layer + (not pre): f"{layer}-{name}" for layer in layers}
        sources |= {e.boundary: e.source for e in self._extra if e.source}
        return Source(entry.scan, name, sources, pre)

    def notes(self) -> tuple[str, ...]:
        """What to know when they are used."""
        entry = self.entry
        unsure = f"not verified: {entry.unsure}" if entry.unsure else ""
        blocks = registry().models[entry.model].blocks
        gaps = [str(b) for b in range(1, blocks + 1) if b not in self.files()]
        missing = f"there is no SAE at boundary {', '.join(gaps)}" if gaps else ""
        texts = (entry.note, missing, unsure)
        return tuple(f"{self.name}: {text}" for text in texts if text)

    @property
    def _extra(self) -> list[Extra]:
        chosen = (None, *self.chosen.values())
        return [extra for extra in self.entry.extra if extra.choice in chosen]

    @property
    def _layers(self) -> range:
        return range(self.entry.layers)

    def _fill(self, pattern: str, layer: int) -> str:
        l0 = self.entry.l0_of_layer.get(self.chosen.get("width", ""))
        return pattern.format(layer=layer, l0=l0[layer] if l0 else None, **self.chosen)


def _paths(folder: str, names: list[str], layer: int) -> tuple[str, ...]:
    filled = (name.format(layer=layer) for name in names)
    return tuple(f"{folder}/{name}" if folder else name for name in filled)


@functools.cache
def registry() -> Registry:
    """The whole file."""
    text = resources.files("qkattr").joinpath("data/registry.toml").read_text(encoding="utf-8")
    return msgspec.toml.decode(text, type=Registry)


def find_model(name: str) -> ModelEntry | None:
    """The entry of a model's short name."""
    return registry().models.get(_plain(name))


def find_saes(name: str) -> SaeChoice | None:
    """The set that a name stands for: its own, an alias, or its repository where only one set lies.

    Raises:
      InputError: the set is known, and the choice is not one of its.
    """
    name, _, choice = name.partition(":")
    known, variant = _sae_names().get(_plain(name)), ""
    if known is None:
        known, variant = _sae_repos().get(name.lower(), (None, ""))
    if known is None:
        return None
    entry = registry().saes[known]
    return SaeChoice(known, entry, _chosen(known, entry, f"{variant},{choice}"))


def is_choice(name: str, choice: str) -> bool:
    """Whether a text is a choice of variants of a set that is known by its own or its
    repository's name, with or without a revision after it."""
    try:
        return find_saes(f"{name}:{choice.partition('@')[0]}") is not None
    except InputError:
        return False


#: The model whose SAEs are in the package, and these SAEs.
PACKAGED = "smollm2"


def near(name: str, known: Iterable[str]) -> str:
    """`did you mean a or b?`, of names that are near; else nothing."""
    given, names = _plain(name.partition(":")[0]), list(known)
    found = difflib.get_close_matches(given, names, n=3)
    found = found or [other for other in names if given and other.startswith(given)][:3]
    return f"did you mean {' or '.join(found)}? " if found else ""


def near_model(name: str) -> str:
    return near(name, [PACKAGED, *registry().models])


def near_saes(name: str) -> str:
    return near(name, [PACKAGED, *_sae_names()])


def _plain(name: str) -> str:
    """SAELens spells some names with underscores."""
    return re.sub(r"_", "-", name.lower())


@functools.cache
def _sae_names() -> dict[str, str]:
    saes = registry().saes
    return {alias: name for name, entry in saes.items() for alias in (name, *entry.aliases)}


@functools.cache
def _sae_repos() -> dict[str, tuple[str, str]]:
    """The set of a repository and the choice that it stands for, where only one set lies in it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, entry in registry().saes.items():
        axes = [axis for axis in entry.choices if f"{{{axis}}}" in entry.repo]
        for values in itertools.product(*(entry.choices[axis] for axis in axes)):
            repo = entry.repo.format(**dict(zip(axes, values, strict=True))).lower()
            found.setdefault(repo, []).append((name, ",".join(values)))
    return {repo: sets[0] for repo, sets in found.items() if len(sets) == 1}


def _chosen(name: str, entry: SaeEntry, choice: str) -> dict[str, str]:
    chosen = {axis: values[0] for axis, values in entry.choices.items()}
    for value in filter(None, choice.split(",")):
        axes = [axis for axis, values in entry.choices.items() if value in values]
        if not axes:
            known = "; ".join(f"{a} {' or '.join(v)}" for a, v in entry.choices.items())
            raise InputError(
                f"{name} has no choice {quoted(value)}; "
                + (f"give one of its own: {known}" if known else f"give {name} alone")
            )
        chosen[axes[0]] = value
    return chosen
