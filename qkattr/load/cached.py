"""What of the registry, and which other models, lie in the hub's cache. Asks no network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec

from qkattr.load import hub
from qkattr.load.named import is_model
from qkattr.load.registry import find_saes, registry


@dataclasses.dataclass(frozen=True)
class Cached:
    """A model or a set of SAEs. size: bytes in the cache of its repository, None if it is not
    there. complete: whether nothing needs to be downloaded. facts: what the registry says."""

    name: str
    repo: str
    size: int | None
    complete: bool
    facts: dict[str, Any]


def known_models() -> list[Cached]:
    """The models of the registry."""
    here = _repositories()
    return [
        Cached(
            name, e.repo, _size(here, e.repo), _is_here(here, e.repo), _facts(e, blocks=e.blocks)
        )
        for name, e in registry().models.items()
    ]


def other_models() -> list[Cached]:
    """Models in the cache that the registry lacks, under the names of their repositories."""
    known, here = {entry.repo for entry in registry().models.values()}, _repositories()
    facts = dict(blocks=None, license=None, gated=False, note="")
    return [
        Cached(repo, repo, size, True, facts)
        for repo, (size, _) in sorted(here.items())
        if repo not in known and _is_here(here, repo)
    ]


def known_saes() -> list[Cached]:
    """The sets of the registry. Of one with choices in several repositories, the default's."""
    here, rows = _repositories(), []
    for name, entry in registry().saes.items():
        choice = find_saes(name)
        assert choice is not None  # it is a name of the registry
        files = [file for of_boundary in choice.files().values() for file in of_boundary]
        complete = any(
            all((folder / file).is_file() for file in files)
            for folder in here.get(choice.repo, (0, []))[1]
        )
        choices = "; ".join(" or ".join(values) for values in entry.choices.values())
        facts = _facts(entry, choices=choices)
        rows.append(Cached(name, choice.repo, _size(here, choice.repo), complete, facts))
    return rows


def _facts(entry: Any, **more: Any) -> dict[str, Any]:
    """What people choose by; where the files lie is left out."""
    inner = ("repo", "folder", "files", "optional", "l0_of_layer", "extra", "sourced")
    facts = {k: v for k, v in msgspec.structs.asdict(entry).items() if k not in inner}
    return facts | more


_Here = dict[str, tuple[int, list[Path]]]


def _repositories() -> _Here:
    """Bytes and snapshot folders of every model repository in the cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        found = scan_cache_dir(hub.cache())
    except CacheNotFound:
        return {}
    return {
        repo.repo_id: (repo.size_on_disk, [revision.snapshot_path for revision in repo.revisions])
        for repo in found.repos
        if repo.repo_type == "model"
    }


def _size(here: _Here, repo: str) -> int | None:
    return here[repo][0] if repo in here else None


def _is_here(here: _Here, repo: str) -> bool:
    """Whether a snapshot has a config and all shards."""
    return any(is_model(folder) for folder in here.get(repo, (0, []))[1])
