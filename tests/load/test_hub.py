"""Models and SAEs by name: out of a cache that lies on disk, with every download replaced."""

# ruff: noqa: F811 (fixtures of another module)
import errno
import json
from pathlib import Path

import folders
import huggingface_hub
import msgspec
import pytest
from hub_cache import COMMIT, OTHER, cache, online, small, snapshot, write_set  # noqa: F401
from huggingface_hub import constants, errors

import qkattr
from qkattr.errors import InputError
from qkattr.load import hub, named, registry
from qkattr.load.dictionaries import find_saes
from qkattr.load.fingerprint import fingerprint


def test_a_cached_model_needs_no_network(cache, small):
    folders.write_model(snapshot(cache, "user/small"), tokenizer=True)
    by_repo, by_name = qkattr.load("user/small"), qkattr.load("small")
    assert by_repo.model_hash == by_name.model_hash and by_repo.tokenizer is not None
    assert qkattr.load(f"user/small@{COMMIT}").model_hash == by_repo.model_hash


def test_a_revision_is_pinned(cache):
    folders.write_model(snapshot(cache, "user/small"))
    folders.write_model(snapshot(cache, "user/small", OTHER, "v2"), seed=1)
    hashes = {qkattr.load(f"user/small{at}").model_hash for at in ("", "@main", f"@{COMMIT}")}
    others = {qkattr.load(f"user/small{at}").model_hash for at in ("@v2", f"@{OTHER}")}
    assert len(hashes) == len(others) == 1 and hashes != others


def test_local_paths_win(cache, tmp_path, monkeypatch):
    folders.write_model(snapshot(cache, "user/small"), seed=1)
    folders.write_model(tmp_path / "user" / "small")
    monkeypatch.chdir(tmp_path)
    local = qkattr.load("user/small").model_hash
    assert local == qkattr.load(tmp_path / "user" / "small").model_hash
    monkeypatch.chdir(cache)
    assert qkattr.load("user/small").model_hash != local


def test_only_what_is_needed_of_a_model_is_downloaded(cache, online, tmp_path):
    folder = folders.write_model(tmp_path / "downloaded")
    asked = online(lambda repo: folder)
    qkattr.load("user/small@v1")
    assert asked == [
        ("user/small", "v1", hub.MODEL_FILES, True),
        ("user/small", "v1", hub.MODEL_FILES, False),
    ]
    assert not any(name.endswith((".bin", ".py", ".pt")) for name in hub.MODEL_FILES)


@pytest.mark.parametrize("reached", [True, False])
def test_cached_weights_without_a_tokenizer_are_completed(cache, tmp_path, monkeypatch, reached):
    """The hub is asked for the tokenizer; where it cannot be reached, the weights will do."""
    part = folders.write_model(snapshot(cache, "user/small"))
    whole = folders.write_model(tmp_path / "whole", tokenizer=True)
    asked = []

    def download(repo, *, local_files_only, **rest):
        asked.append(local_files_only)
        if not local_files_only and not reached:
            raise errors.LocalEntryNotFoundError("no network")
        return str(part if local_files_only else whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert (qkattr.load("user/small").tokenizer is not None) == reached
    assert asked == [True, False]


def test_only_the_chosen_saes_are_downloaded(cache, online, tmp_path, small):
    choice = registry.find_saes("small-res:snap")
    root = snapshot(cache, "user/saes")
    write_set(root, choice)
    asked = online(lambda repo: root)
    source = named.sae_source("small-res:snap")
    assert set(asked[-1][2]) == {p for paths in choice.files().values() for p in paths}
    assert all(pattern.startswith("snap/") for pattern in asked[-1][2])
    assert source is not None and source.choice == choice


def test_variants_lie_in_one_snapshot(cache, small, tmp_path):
    folders.write_model(snapshot(cache, "user/small"))
    root = snapshot(cache, "user/saes")
    for seed, variant in enumerate(("plain", "snap")):
        write_set(root, registry.find_saes(f"small-res:{variant}"), seed)
    bundle = qkattr.load("small", "small-res:snap")
    assert [d is not None for d in bundle.dictionaries] == [False, True, True]
    assert bundle.source == registry.Source(
        "small-scan", "res-snap", {1: "0-res-snap", 2: "1-res-snap"}, False
    )
    assert bundle.notes == ("small-res: not verified: the width",)
    again = qkattr.load("small", "small-res:snap")
    assert again.saes_hash == bundle.saes_hash != qkattr.load("small", "small-res").saes_hash


def test_only_the_files_of_the_set_count(cache, small, tmp_path):
    """Whatever else a snapshot holds, in the same folders too; and nothing is written."""
    choice = registry.find_saes("small-res")
    root = snapshot(cache, "user/saes")
    write_set(root, choice)
    before = find_saes(named.sae_source("small-res").path)
    write_set(root, registry.find_saes("small-res:snap"), seed=1)
    (root / "cfg.json").write_text("{}")
    (root / "qkattr.toml").write_text("centre = true")
    for name in ("plain/blocks.0/layer1.sae.pt", "plain/blocks.0/sae.safetensors"):
        (root / name).write_bytes(b"of something else")
    after = find_saes(named.sae_source("small-res").path)
    assert after.files == before.files and after.hash == before.hash
    assert [h.config.centre for h in after.headers.values()] == [False, False]
    assert not (tmp_path / "qkattr").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(centred=True), "centre = true\n"),
        (dict(format="qwen-scope", repo="user/saes-L0_50"), "k = 50\n"),
        (
            dict(format="qwen-scope", repo="user/saes-L0_50", centred=True),
            "centre = true\nk = 50\n",
        ),
        ({}, None),
    ],
)
def test_a_set_is_what_its_files_are_in_a_folder(cache, small, tmp_path, monkeypatch, change, said):
    """With what they do not say in a qkattr.toml beside them: the same SAEs and fingerprint."""
    entry = msgspec.structs.replace(small, **change)
    made = registry.Registry(registry.registry().models, {"small-res": entry})
    monkeypatch.setattr(registry, "registry", lambda: made)
    choice = registry.find_saes("small-res")
    for root in (snapshot(cache, entry.repo), tmp_path / "copy"):
        write_set(root, choice)
    if said is not None:
        (tmp_path / "copy" / "qkattr.toml").write_text(said)
    one, other = find_saes(named.sae_source("small-res").path), find_saes(tmp_path / "copy")
    assert one.hash == other.hash == fingerprint(other.root, other.files)
    configs = [[h.config for h in found.headers.values()] for found in (one, other)]
    assert configs[0] == configs[1] and configs[0][0].centre == bool(change.get("centred"))


def test_errors_call_an_sae_by_its_repository(cache):
    """At its root, not by the commit that the folder is named after."""
    root = folders.write_saes(snapshot(cache, "user/one"), boundaries=[1])
    for path in [*root.glob("*/*")]:
        path.rename(root / path.name)
    config = json.loads((root / "cfg.json").read_text())
    (root / "cfg.json").write_text(json.dumps(config | dict(d_in=-1)))
    with pytest.raises(InputError, match="^SAE one: d_in should lie in"):
        find_saes(named.sae_source("user/one").path)


def test_saes_of_a_repository_that_is_not_in_the_registry(cache):
    folders.write_model(snapshot(cache, "user/small"))
    folders.write_saes(snapshot(cache, "other/saes") / "set")
    whole, part = (qkattr.load("user/small", f"other/saes{at}") for at in ("", "/set@main"))
    assert whole.notes == () and part.source is None
    assert part.saes_hash != ""


def test_an_incomplete_set_is_refused(cache, online, small, tmp_path):
    choice = registry.find_saes("small-res")
    root = snapshot(cache, "user/saes")
    write_set(root, choice)
    (root / "plain/blocks.1/sae_weights.safetensors").unlink()
    online(lambda repo: root)
    with pytest.raises(InputError, match="has no plain/blocks.1/sae_weights.safetensors, which"):
        named.sae_source("small-res")


# What the hub refuses


class Response:
    """As much of an HTTP response as the errors of the hub look at."""

    headers: dict = {}
    request = None
    status_code = 403


def failure(kind, message="said the hub"):
    try:
        return kind(message, response=Response())
    except TypeError:
        return kind(message)


FAILURES = [
    (lambda: failure(errors.GatedRepoError), "is gated: accept its licence at https://hugg"),
    (lambda: failure(errors.RepositoryNotFoundError), "no such repository on the hub: user/repo"),
    (lambda: failure(errors.RevisionNotFoundError), "user/repo has no revision v9; see https://"),
    (lambda: failure(errors.HfHubHTTPError), "the hub refused user/repo@v9 (said the hub)"),
    (lambda: failure(errors.LocalEntryNotFoundError), "the hub cannot be reached; check the net"),
    (lambda: ConnectionError("reset"), "the hub cannot be reached"),
    (lambda: OSError(errno.ENOSPC, "No space left on device"), "no space left in"),
    (lambda: PermissionError(errno.EACCES, "Permission denied"), "set HF_HOME to a folder"),
]


@pytest.mark.parametrize("make, message", FAILURES)
def test_refusals(cache, online, monkeypatch, make, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def fail(repo):
        raise make()

    online(fail)
    with pytest.raises(InputError) as caught:
        named.model_folder("user/repo@v9")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_fault_is_not_hidden(cache, online, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def fail(repo):
        raise ZeroDivisionError

    online(fail)
    with pytest.raises(ZeroDivisionError):
        named.model_folder("user/repo")


def test_offline(cache):
    for name in ("google/gemma-3-270m", "gemma-3-270m", f"user/repo@{COMMIT}"):
        with pytest.raises(InputError, match="not in the cache .* and HF_HUB_OFFLINE is set"):
            named.model_folder(name)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        named.sae_source("gpt2-small-res-jb")


@pytest.mark.parametrize(
    "name",
    ["smollm2", "./model", "../user/repo", "/user/repo", "user/repo/..", "a b/c", "", "/", "x@y"],
)
def test_what_is_no_name_of_a_repository(name):
    assert hub.parse_repo(name) is None


def test_names_of_repositories():
    assert hub.parse_repo("u/r@v1") == hub.Repo("u/r", "v1")
    assert hub.parse_repo("u/r/a/b@v1") == hub.Repo("u/r", "v1", "a/b")
    assert str(hub.parse_repo("u/r@v1")) == "u/r@v1"


# Through the command line


@pytest.fixture
def root(tmp_path):
    return Path(tmp_path)


def test_near_names_are_suggested(refused, cache):
    line = refused("tokens", "x", "-m", "gemma-3-270")
    assert "no such model: 'gemma-3-270'; did you mean gemma-3-270m" in line
    folders.write_model(snapshot(cache, "user/small"))
    line = refused("trace", "1,2", "--ids", "-m", "user/small", "-s", "gpt2_small_res-j")
    assert "no such SAEs: 'gpt2_small_res-j'; did you mean gpt2-small-res-jb" in line


def test_notes_are_said_once(cache, small, capsys):
    from qkattr.cli.main import main

    folders.write_model(snapshot(cache, "user/small"))
    write_set(snapshot(cache, "user/saes"), registry.find_saes("small-res"))
    assert main(["trace", "1,2,3", "--ids", "-m", "small", "-s", "small-res", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "qkattr: note: small-res: not verified: the width\n"
    json.loads(out)


def listed(capsys, *arguments):
    from qkattr.cli.main import main

    assert main(["models", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_models_lists_what_is_known_and_what_is_here(cache, small, capsys):
    folders.write_model(snapshot(cache, "user/small"))
    folders.write_model(snapshot(cache, "other/model"))
    write_set(snapshot(cache, "user/saes"), registry.find_saes("small-res"))
    raw = json.loads(listed(capsys, "--json"))
    (known, other), (saes,) = raw["models"], raw["saes"]
    assert known["name"] == "small" and known["complete"] and known["cached_bytes"] > 0
    assert other["name"] == "other/model" and other["complete"]
    assert saes["complete"] and saes["choices"] == "plain or snap" and saes["unsure"] == "the width"
    assert "small-res" in listed(capsys)


def test_models_without_a_cache(cache, capsys):
    cache.rmdir()
    raw = json.loads(listed(capsys, "--json"))
    assert set(registry.registry().models) == {m["name"] for m in raw["models"]}
    assert not any(row["complete"] or row["cached_bytes"] for row in raw["models"] + raw["saes"])
    raw = json.loads(listed(capsys, "llama-3", "--json"))
    assert {m["name"] for m in raw["models"]} == {"llama-3-8b", "llama-3.1-8b", "llama-3.2-1b"}
    assert json.loads(listed(capsys, "--cached", "--json")) == {"models": [], "saes": []}
    assert "gemma-scope-2b-pt-res" in listed(capsys)


def test_a_set_that_is_there_in_part(cache, small, capsys):
    choice = registry.find_saes("small-res")
    root = snapshot(cache, "user/saes")
    write_set(root, choice)
    (root / "plain/blocks.1/cfg.json").unlink()
    (row,) = json.loads(listed(capsys, "--json"))["saes"]
    assert row["cached_bytes"] and not row["complete"]
    assert "in part" in listed(capsys)
