"""Repositories of the Hugging Face hub: `user/repo`, `user/repo@revision`, `user/repo/folder`.

What is in the cache already is taken from there, without asking the network; so a branch stays at
the commit that was downloaded first. Where the cache is, a token, and being offline are what
huggingface_hub makes of HF_HOME, HF_TOKEN and HF_HUB_OFFLINE. Only files that are needed are
downloaded, and never code or pickled weights of a model.
"""

from __future__ import annotations

import dataclasses
import errno
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from qkattr.errors import InputError

#: The files of a model: configs, tokenizer, safetensors weights.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "model*.safetensors",
)

#: The libraries that versions of huggingface_hub talk to the network with.
_NETWORK = ("httpx", "httpx2", "requests", "urllib3")

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"({_PART}/{_PART})((?:/[^/@:]+)*)(?:@([^@\s]{{1,200}}))?")


@dataclasses.dataclass(frozen=True)
class Repo:
    """A repository, the commit, tag or branch asked for, and the folder in it."""

    id: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        return self.id + (f"@{self.revision}" if self.revision else "")


def parse_repo(name: str) -> Repo | None:
    """The repository that a name may stand for, or None: then it is something else."""
    match = _NAME.fullmatch(name)
    if match is None or ".." in name:
        return None
    return Repo(match[1], match[3], match[2].strip("/"))


def fetch(
    repo: Repo,
    patterns: Sequence[str],
    complete: Callable[[Path], bool],
    enough: Callable[[Path], bool] | None = None,
) -> Path:
    """The folder of a snapshot that holds the files matching `patterns`.

    Args:
      complete: whether a folder has everything; if a cached one has, nothing is downloaded.
      enough: whether a cached one will do where the hub cannot be asked for the rest; None: as
        `complete`.

    Raises:
      InputError: no such repository or revision, it is gated, there is no network or no space.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    def snapshot(local: bool) -> Path:
        folder = huggingface_hub.snapshot_download(
            repo.id, revision=repo.revision, allow_patterns=list(patterns), local_files_only=local
        )
        return Path(str(folder))

    cached = None
    try:
        cached = snapshot(local=True)
        if complete(cached):
            return cached
    except HFValidationError as e:
        raise InputError(f"{repo.id} is no name of a repository ({e}); give user/repo") from e
    except Exception:  # not in the cache, or only part of it: whatever it says, the hub is asked
        pass
    try:
        return snapshot(local=False)
    except Exception as e:
        if cached is not None and enough is not None and enough(cached):
            return cached
        raise _refusal(repo, e) from e


def cache() -> str:
    """The folder of the hub's cache."""
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def offline() -> bool:
    """Whether the user has said that the network may not be used."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _refusal(repo: Repo, error: Exception) -> Exception:
    """What became of a download, in one line; the error itself if it is nothing that is known."""
    from huggingface_hub import errors

    reasons = [error, *filter(None, (error.__cause__, error.__context__))]
    page = f"https://huggingface.co/{repo.id}"

    def is_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(reason, kinds) for reason in reasons)

    if is_any(errors.GatedRepoError):
        return InputError(
            f"{repo.id} is gated: accept its licence at {page} while logged in, and set HF_TOKEN "
            f"to a token of that account"
        )
    if is_any(errors.RevisionNotFoundError):
        return InputError(f"{repo.id} has no revision {repo.revision}; see {page}/commits")
    if is_any(errors.RepositoryNotFoundError):
        return InputError(
            f"no such folder and no such repository on the hub: {repo.id}; check the name, or set "
            f"HF_TOKEN if it is private"
        )
    full = [r for r in reasons if isinstance(r, OSError) and r.errno == errno.ENOSPC]
    if full:
        return InputError(f"no space left in {cache()} for {repo}; make room, or set HF_HOME")
    if offline():
        return InputError(
            f"{repo} is no folder, and not in the cache {cache()}, and HF_HUB_OFFLINE is set; "
            f"unset it, or copy the cache of a machine that has it"
        )
    if is_any(PermissionError):
        return InputError(f"cannot write to {cache()}; set HF_HOME to a folder that can be written")
    answer = next((r for r in reasons if isinstance(r, errors.HfHubHTTPError)), None)
    if answer is not None:
        said = str(answer).strip().splitlines()[0]
        return InputError(f"the hub refused {repo} ({said:.200}); try again later, or see {page}")
    of_network = any(type(reason).__module__.split(".")[0] in _NETWORK for reason in reasons)
    if of_network or is_any(errors.LocalEntryNotFoundError, ConnectionError, TimeoutError):
        return InputError(
            f"{repo} is no folder, not in the cache {cache()}, and the hub cannot be reached; "
            f"check the network, or give a local folder"
        )
    return error
