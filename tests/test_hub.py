"""Models and SAEs by name: out of a cache that lies on disk, with every download replaced."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import folders
import huggingface_hub
import msgspec
import numpy as np
import pytest
from huggingface_hub import constants, errors

import qkattr
from qkattr.errors import InputError
from qkattr.load import cached, hub, hub_saes, named, registry
from qkattr.load.saes import find_saes

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


def test_links_follow_a_cache_that_moved(cache, small, tmp_path, monkeypatch):
    choice = registry.find_saes("small-res")
    write_set(snapshot(cache, "user/saes"), choice)
    first = named.sae_source("small-res").path
    moved = tmp_path / "moved"
    cache.rename(moved)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(moved))
    again = named.sae_source("small-res").path
    assert again == first and all(p.is_file() for p in first.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(centred=True), "centre = true\n"),
        (dict(format="qwen-scope", repo="user/saes-L0_50"), "k = 50\n"),
        ({}, None),
    ],
)
def test_what_files_do_not_say_lies_beside_them(cache, small, monkeypatch, change, said):
    entry = msgspec.structs.replace(small, **change)
    made = registry.Registry(registry.registry().models, {"small-res": entry})
    monkeypatch.setattr(registry, "registry", lambda: made)
    write_set(snapshot(cache, entry.repo), registry.find_saes("small-res"))
    path = named.sae_source("small-res").path / "qkattr.toml"
    assert (path.read_text() if path.exists() else None) == said


def test_saes_of_a_repository_that_is_not_in_the_registry(cache):
    folders.write_model(snapshot(cache, "user/small"))
    folders.write_saes(snapshot(cache, "other/saes") / "set")
    whole, part = (qkattr.load("user/small", f"other/saes{at}") for at in ("", "/set@main"))
    assert whole.notes == () and part.source is None
    assert part.saes_hash != ""


# A pattern of a repository

FILES = [
    f"layer_{layer}/width_{width}/average_l0_{l0}/params.npz"
    for layer in (0, 1)
    for width in ("16k", "65k")
    for l0 in (20 + layer, 80 + layer)
] + ["embedding/width_4k/average_l0_6/params.npz", "README.md"]


@pytest.fixture
def listed_files(monkeypatch):
    """What the hub says that repositories hold, and the revisions that it was asked for."""
    asked = []

    def use(files, commit=COMMIT):
        def model_info(self, repo, *, revision=None):
            asked.append((repo, revision))
            siblings = [SimpleNamespace(rfilename=name) for name in files]
            return SimpleNamespace(sha=commit, siblings=siblings)

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        return asked

    return use


def write_gemma(root, files=FILES, d=folders.D):
    rng = np.random.default_rng(0)
    shapes = dict(W_enc=(d, 24), W_dec=(24, d), b_enc=24, b_dec=d, threshold=24)
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".npz"):
            arrays = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
            np.savez(root / name, **arrays)
    return root


def test_only_what_a_pattern_matches_is_downloaded(cache, online, listed_files, tmp_path):
    revisions = listed_files(FILES)
    root = tmp_path / "downloaded"
    downloaded = online(lambda repo: write_gemma(root, downloaded[-1][2]))
    for _ in range(2):
        source = named.sae_source("google/gemma-scope-2b-pt-res:width_16k@50")
        chosen = find_saes(source.path).headers
        assert {b: h.folder.name for b, h in chosen.items()} == {
            1: "average_l0_20", 2: "average_l0_21"
        }  # fmt: skip
    assert revisions == [("google/gemma-scope-2b-pt-res", None)]  # kept
    assert [asked for asked in downloaded if not asked[3]] == [
        ("google/gemma-scope-2b-pt-res", COMMIT, (FILES[0], FILES[4]), False)
    ] * 2  # the replaced cache is always empty
    assert source.choice is None


def test_a_choice_of_a_known_repository_is_no_pattern(cache, online, listed_files):
    revisions = listed_files(FILES)
    online(lambda repo: cache)
    with pytest.raises(InputError, match="has no layer_0/width_65k/average_l0_73/params.npz"):
        named.sae_source("google/gemma-scope-2b-pt-res:65k")
    assert revisions == []


def test_a_pattern_that_matches_nothing(cache, listed_files):
    listed_files(FILES)
    with pytest.raises(InputError, match="no SAE of user/repo matches 'width_1m'; there are embed"):
        named.sae_source("user/repo:width_1m")
    with pytest.raises(InputError, match="no SAE of user/repo matches 'x@5'; there are none"):
        named.sae_source("user/repo/elsewhere:x@5")


def test_a_pattern_without_the_network_is_of_the_cache(cache):
    folders.write_model(snapshot(cache, "user/small"))
    write_gemma(snapshot(cache, "user/saes"))
    bundle = qkattr.load("user/small", "user/saes:width_65k@100")
    assert [float(sae.l0) for sae in bundle.dictionaries[1:]] == [80, 81]
    bundle = qkattr.load("user/small", "user/saes@main:/layer_?/width_16k/average_l0_2?")
    assert [float(sae.l0) for sae in bundle.dictionaries[1:]] == [20, 21]
    with pytest.raises(InputError, match="other/saes is no folder, .*HF_HUB_OFFLINE is set"):
        named.sae_source("other/saes:width_65k")


def test_attention_saes_of_the_hub_are_not_read(cache):
    """By the name of the repository, which the cache keeps in that of a folder."""
    folders.write_model(snapshot(cache, "user/small"))
    write_gemma(snapshot(cache, "google/gemma-scope-2b-pt-att"), FILES[:1])
    for given in ("google/gemma-scope-2b-pt-att", "google/gemma-scope-2b-pt-att:width_16k@50"):
        with pytest.raises(InputError, match="holds no SAE of the residual .* 1 of blocks.N.attn"):
            qkattr.load("user/small", given)


def test_a_local_folder_with_a_pattern_goes_before_the_hub(cache, tmp_path, monkeypatch):
    write_gemma(tmp_path / "user" / "saes")
    monkeypatch.chdir(tmp_path)
    assert named.sae_source("user/saes:width_65k@50") is None


LAYOUTS = {
    "layers.?": (
        ["layers.0/cfg.json", "layers.0/sae.safetensors", "layers.0.mlp/sae.safetensors"],
        ["layers.0/cfg.json", "layers.0/sae.safetensors"],
    ),
    "L0R": (
        [
            "L0R-8x/hyperparams.json",
            "L0R-8x/checkpoints/final.safetensors",
            "L1R-8x/lm_config.json",
        ],
        ["L0R-8x/hyperparams.json", "L0R-8x/checkpoints/final.safetensors"],
    ),
    "layer0.": (
        ["config.json", "layer0.sae.pt", "layer10.sae.pt", "README.md"],
        ["config.json", "layer0.sae.pt"],
    ),
    "*SAE*": (["x-SAE-l19.pth", "model.safetensors"], ["x-SAE-l19.pth"]),
}


@pytest.mark.parametrize("pattern", LAYOUTS)
def test_the_files_of_an_sae_in_every_layout(pattern):
    files, chosen = LAYOUTS[pattern]
    pattern = f"/{pattern}" if pattern == "layers.?" else pattern
    assert hub_saes.choose_files(files, hub.Repo("u/r"), pattern) == chosen
    below = [f"set/{name}" for name in files]
    repo = hub.Repo("u/r", folder="set")
    assert hub_saes.choose_files(below, repo, pattern) == [f"set/{name}" for name in chosen]


def test_a_pattern_with_an_l0_takes_all_where_names_say_none():
    files = ["layer_0_width_16k_l0_big/params.safetensors", "layer_0_width_16k_l0_small/cfg.json"]
    assert hub_saes.choose_files(files, hub.Repo("u/r"), "16k@50") == files[:1]
    files = [f"layer_{i}/width_16k/{a}/params.npz" for i in (0, 1) for a in ("canonical", "x")]
    named = [file.replace("/x/", "/average_l0_7/") for file in files]
    assert hub_saes.choose_files(named, hub.Repo("u/r"), "16k@50") == named[1::2]
    assert hub_saes.choose_files(files, hub.Repo("u/r"), "16k@50") == files


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
