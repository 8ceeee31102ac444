"""What is asked for by name, as local files: models and SAEs of the registry or of the hub.

The SAEs of a set of the registry lie among others in a repository's snapshot: of its files only
those of the set count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path

from qkattr.errors import InputError
from qkattr.load import hub
from qkattr.load.dictionaries import Options, SaeFiles, hub_saes
from qkattr.load.dictionaries.choose import split_pattern
from qkattr.load.models import hf
from qkattr.load.registry import SaeChoice, find_model, find_saes, is_choice
from qkattr.load.text import vocabulary
from qkattr.sources.dictionary import Dictionary


@dataclasses.dataclass(frozen=True)
class SaeSource:
    """SAEs on disk, and the registry's entry if it has one. called: what the user knows the folder
    as, where that is not its path."""

    path: Path | SaeFiles
    choice: SaeChoice | None = None
    called: str | None = None


def model_folder(name: str) -> Path | None:
    """The folder of a model that the registry or the hub knows; None where neither may.

    Raises:
      InputError: see `hub.fetch`.
    """
    short, _, revision = name.partition("@")
    entry = find_model(short)
    repo = hub.Repo(entry.repo, revision or None) if entry else hub.parse_repo(name)
    if repo is None or repo.folder:
        return None
    return hub.fetch(repo, hub.MODEL_FILES, _is_whole, enough=is_model)


def _is_whole(folder: Path) -> bool:
    """Whether a folder has a model and its tokenizer."""
    files = [("tokenizer.json",), vocabulary.FILES]
    return is_model(folder) and any(all((folder / n).is_file() for n in names) for names in files)


def is_model(folder: Path) -> bool:
    """Whether a folder has a config and all weights."""
    with contextlib.suppress(InputError):
        return (folder / "config.json").is_file() and bool(hf.weight_files(folder))
    return False


def sae_source(name: str) -> SaeSource | None:
    """SAEs that the registry or the hub knows; None where neither may, or a folder has the name.

    name: a name of the registry or a repository, with choices of the registry or, of a repository,
    with a pattern: see `hub_saes`.

    Raises:
      InputError: the choice is not one of the set's, or nothing matches; or see `hub.fetch`.
    """
    if split_pattern(name)[1] is not None:
        return None
    base, _, pattern = name.partition(":")
    repo = hub.parse_repo(base)
    if pattern and repo is not None and not (repo.id == base and is_choice(base, pattern)):
        folder = hub_saes.fetch_matching(repo, pattern) / repo.folder
        return SaeSource(Path(f"{_with_saes(folder, name)}:{pattern}"), called=base)
    short, _, revision = name.partition("@")
    choice = find_saes(short)
    if choice is not None:
        return SaeSource(_chosen(choice, revision or None), choice, name)
    if repo is None or pattern:
        return None
    folder = hub_saes.fetch_matching(repo, None)
    return SaeSource(_with_saes(folder / repo.folder, name), called=name)


def _with_saes(folder: Path, name: str) -> Path:
    if not hub_saes.has_saes(folder):
        raise InputError(
            f"{name} holds no SAEs that qkattr reads; give another repository, or user/repo/folder"
        )
    return folder


def _chosen(choice: SaeChoice, revision: str | None) -> SaeFiles:
    """A set's files, which are downloaded if they are not there."""
    needed = [name for files in choice.files().values() for name in files]
    wished = [name for files in choice.files(optional=True).values() for name in files]
    snapshot = hub.fetch(
        hub.Repo(choice.repo, revision),
        [*needed, *wished],
        lambda folder: all((folder / name).is_file() for name in needed),
    )
    if missing := [name for name in needed if not (snapshot / name).is_file()]:
        why = (
            f"in the cache {hub.cache()}, and HF_HUB_OFFLINE is set; unset it"
            if hub.offline()
            else "or it was not downloaded; check the network"
        )
        raise InputError(
            f"{choice.repo} has no {missing[0]}, which {choice.name} needs, {why}, or give the "
            "SAEs as a local folder"
        )
    k = re.search(r"-L0_(\d+)$", choice.repo) if choice.entry.format == "qwen-scope" else None
    options = Options(centre=choice.entry.centred or None, k=k and int(k[1]))
    said = {"centre = true": options.centre, f"k = {options.k}": options.k}
    settings = "".join(f"{line}\n" for line, value in said.items() if value is not None)
    return SaeFiles(snapshot, None, (*needed, *wished), options, settings)


def of_other_model(model: str, choice: SaeChoice) -> tuple[str, ...]:
    """A note, where a model of the hub is not the one that the registry has for a set."""
    if Path(model).exists():
        return ()
    entry, given = find_model(model.partition("@")[0]), hub.parse_repo(model)
    repo = entry.repo if entry else given and given.id
    if repo is None or repo.lower() == choice.model_repo.lower():
        return ()
    return (f"{choice.name}: trained on {choice.model_repo}, and the model is {repo}",)


def informed(
    dictionaries: tuple[Dictionary | None, ...], choice: SaeChoice
) -> tuple[Dictionary | None, ...]:
    """The dictionaries with what the registry knows and their files do not say."""

    def one(dictionary: Dictionary | None) -> Dictionary | None:
        if dictionary is None or dictionary.config.prepend_bos is not None:
            return dictionary
        config = dataclasses.replace(dictionary.config, prepend_bos=choice.entry.prepend_bos)
        return dataclasses.replace(dictionary, config=config)

    return tuple(one(dictionary) for dictionary in dictionaries)
