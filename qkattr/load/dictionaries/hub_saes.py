"""Which files of a repository a pattern chooses, so that no others are downloaded.

`user/repo:PATTERN` means what `FOLDER:PATTERN` means of the whole repository as a folder. Without a
pattern, SAEs whose names say that they are of other hooks are not downloaded. What a repository
holds is asked of the hub once and kept, so that a choice stays at the commit that it was made at.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import msgspec

from qkattr.errors import InputError, some
from qkattr.files import replacing
from qkattr.load import hub
from qkattr.load.dictionaries.choose import matches, split_nearest
from qkattr.load.dictionaries.hooks import boundary, by_names, counts, layer_of
from qkattr.load.smollm2 import cache_folder

#: The files of SAEs.
SAE_FILES = (
    *("*cfg.json", "*config.json", "*hyperparams.json"),
    *("*sae_weights.safetensors", "*sae.safetensors", "*params.safetensors", "*final.safetensors"),
    *("*params.npz", "*.sae.pt", "*ae.pt", "*-SAE-l*.pt", "*-SAE-l*.pth"),
)
WEIGHTS = tuple(pattern for pattern in SAE_FILES if not pattern.endswith(".json"))
_SINGLE = ("*.sae.pt", "*-SAE-l*.pt", "*-SAE-l*.pth")
_L0 = re.compile(r"average_l0_(\d{1,6})")


class Listing(msgspec.Struct, frozen=True):
    """What a repository held at a commit."""

    commit: str
    files: list[str]


def fetch_matching(repo: hub.Repo, pattern: str | None) -> Path:
    """The folder of a snapshot with the SAEs whose path in `repo.folder` matches a pattern, or,
    without one, with those whose names do not say that they are of other hooks.

    Raises:
      InputError: there are none; or see `hub.fetch`.
    """
    listing = _listing(repo)
    if listing is None:  # offline, gated, ...: what the cache has, or `fetch` says why not
        return hub.fetch(repo, ["README.md"], lambda found: has_saes(found / repo.folder))
    chosen = choose_files(listing.files, repo, pattern)
    complete = lambda folder: all((folder / name).is_file() for name in chosen)  # noqa: E731
    return hub.fetch(hub.Repo(repo.id, listing.commit), chosen, complete)


def has_saes(folder: Path) -> bool:
    """Whether any file of a folder may be of an SAE's weights."""
    return any(True for pattern in WEIGHTS for _ in folder.rglob(pattern))


def choose_files(files: Iterable[str], repo: hub.Repo, pattern: str | None) -> list[str]:
    """The files of the SAEs that match; with `GLOB@N` only of those nearest, if names say L0s.

    Raises:
      InputError: none matches; or, without a pattern, all are of other hooks.
    """
    of_saes = [name for name in files if _any(name, SAE_FILES) and _below(name, repo.folder)]
    there = sorted({_place(name) for name in of_saes if _any(name, WEIGHTS)})
    kept = set(_on_the_stream(there, repo) if pattern is None else _matching(there, repo, pattern))
    beside = {str(PurePosixPath(at).parent) for at in kept if _any(at, _SINGLE)}
    return [
        name
        for name in of_saes
        if _place(name) in kept
        or (name.endswith(".json") and str(PurePosixPath(name).parent) in beside)
    ]


def _matching(there: list[str], repo: hub.Repo, pattern: str) -> list[str]:
    glob, n = split_nearest(pattern)
    kept = [at for at in there if matches(_path(at, repo.folder), glob)]
    if not kept:
        have = some([_path(at, repo.folder) for at in there]) or "none"
        raise InputError(f"no SAE of {repo} matches {pattern!r:.60}; there are {have}")
    return kept if n is None else _nearest(kept, n)


def _on_the_stream(there: list[str], repo: hub.Repo) -> list[str]:
    """Those whose names mean the residual stream, or mean nothing."""
    root = Path(f"/models--{repo.id.replace('/', '--')}")
    hooks = {at: by_names(root / at, None) or "" for at in there}
    kept = [at for at, hook in hooks.items() if not hook or boundary(hook) is not None]
    if there and not kept:
        raise InputError(
            f"{repo} holds no SAE of the residual stream, but {counts(hooks.values())}, as the "
            f"names of its folders have it; where they mislead, give {repo}:PATTERN"
        )
    return kept


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _below(name: str, folder: str) -> bool:
    return not folder or name.startswith(f"{folder}/")


def _path(place: str, folder: str) -> str:
    return place[len(folder) + 1 :] if folder else place


def _place(name: str) -> str:
    """The path by which the SAE of a file is chosen: its folder, or the file where it is one."""
    if _any(name, _SINGLE):
        return name
    parent = PurePosixPath(name).parent
    return str(parent.parent if parent.name == "checkpoints" else parent)


def _nearest(places: list[str], n: int) -> list[str]:
    """Of each layer the one whose L0 is nearest; all of a layer where no name says an L0."""
    of_layer: dict[int | None, list[str]] = {}
    for at in places:
        of_layer.setdefault(layer_of(Path(at)), []).append(at)
    chosen = []
    for several in of_layer.values():
        off = {at: abs(int(match[1]) - n) for at in several if (match := _L0.search(at))}
        chosen += [min(off, key=lambda at: off[at])] if off else several
    return chosen


def _listing(repo: hub.Repo) -> Listing | None:
    """What the repository holds, as it was when this was first asked; None: it cannot be asked."""
    name = f"{quote(repo.revision or 'main', safe='')}.json"
    path = cache_folder() / "listings" / repo.id.replace("/", "--") / name
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(path.read_bytes(), type=Listing)
    found = _ask(repo)
    if found is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(msgspec.json.encode(found))
    return found


def _ask(repo: hub.Repo) -> Listing | None:
    import huggingface_hub

    revision = repo.revision
    with contextlib.suppress(Exception):  # not in the cache
        at = huggingface_hub.snapshot_download(repo.id, revision=revision, local_files_only=True)
        revision = Path(str(at)).name
    with contextlib.suppress(Exception):  # whatever it is, `hub.fetch` meets it again and says it
        info = huggingface_hub.HfApi().model_info(repo.id, revision=revision)
        if info.sha:
            return Listing(info.sha, [file.rfilename for file in info.siblings or ()])
    return None
