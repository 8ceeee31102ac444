"""A hub's cache on disk and a small registry, with every download replaced."""

import folders
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from qkattr.load import cached, registry

COMMIT = "a" * 40
OTHER = "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("QKATTR_CACHE", str(tmp_path / "qkattr"))
    return folder


def snapshot(cache, repo, commit=COMMIT, branch="main"):
    """Where the files of a repository lie in the cache."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "blobs").mkdir(exist_ok=True)
    if branch:
        (folder / "refs" / branch).write_text(commit)
    return folder / "snapshots" / commit


def write_set(root, choice, seed=0):
    """The SAEs of a choice, in SAELens form, at the places that the registry has for them."""
    made = root.parent / f"made{seed}"
    folders.write_saes(made, boundaries=sorted(choice.files()), seed=seed)
    for boundary, (config, weights) in choice.files().items():
        source = made / f"blocks.{boundary - 1}.hook_resid_post"
        (root / config).parent.mkdir(parents=True, exist_ok=True)
        (source / "cfg.json").rename(root / config)
        (source / "sae_weights.safetensors").rename(root / weights)


@pytest.fixture
def small(monkeypatch):
    """A registry with one small model and one set of SAEs, two variants in one repository."""
    entry = registry.SaeEntry(
        repo="user/saes",
        folder="{kind}/blocks.{layer}",
        files=["cfg.json", "sae_weights.safetensors"],
        choices={"kind": ["plain", "snap"]},
        model="small",
        format="saelens",
        hook="resid_post",
        layers=folders.BLOCKS,
        license="MIT",
        scan="small-scan",
        source_set="res-{kind}",
        unsure="the width",
    )
    models = {"small": registry.ModelEntry(repo="user/small", blocks=folders.BLOCKS, license="MIT")}
    made = registry.Registry(models, {"small-res": entry})
    monkeypatch.setattr(registry, "registry", lambda: made)
    monkeypatch.setattr(cached, "registry", lambda: made)
    registry._sae_names.cache_clear()
    registry._sae_repos.cache_clear()
    yield entry
    registry._sae_names.cache_clear()
    registry._sae_repos.cache_clear()


@pytest.fixture
def online(monkeypatch):
    """Replaces the download by one that does `work(folder asked for, patterns)`."""
    asked = []

    def use(work):
        def download(repo, *, revision, allow_patterns, local_files_only):
            asked.append((repo, revision, tuple(allow_patterns), local_files_only))
            if local_files_only:
                raise errors.LocalEntryNotFoundError("not here")
            return str(work(repo))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return asked

    return use
