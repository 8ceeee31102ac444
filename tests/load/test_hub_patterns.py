"""Which SAEs of a hub repository are downloaded: those that a pattern names, or, without one,
those whose names may be of the residual stream."""

# ruff: noqa: F811 (fixtures of another module)
from types import SimpleNamespace

import folders
import huggingface_hub
import numpy as np
import pytest
from hub_cache import COMMIT, cache, online, small, snapshot  # noqa: F401
from huggingface_hub import constants

import qkattr
from qkattr.errors import InputError
from qkattr.load import hub, named
from qkattr.load.dictionaries import find_saes, hub_saes

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


# Without a pattern


MIXED = [f"layers.{i}{hook}/sae.safetensors" for i in (0, 1) for hook in ("", ".mlp", ".attention")]
WITHOUT_A_PATTERN = [
    ("user/saes", MIXED, MIXED[::3]),
    ("user/saes", FILES, FILES[:-1]),
    ("google/gemma-scope-2-9b-pt",
     ["attn_out_all/layer_0_width_16k_l0_big/params.safetensors",
      "resid_post_all/layer_0_width_16k_l0_big/params.safetensors",
      "resid_post_all/layer_0_width_16k_l0_big/config.json",
      "transcoder_all/layer_0_width_16k_l0_big/params.safetensors"],
     ["resid_post_all/layer_0_width_16k_l0_big/params.safetensors",
      "resid_post_all/layer_0_width_16k_l0_big/config.json"]),
    ("user/qwen", ["layer0.sae.pt", "layer1.sae.pt", "config.json"],
     ["layer0.sae.pt", "layer1.sae.pt", "config.json"]),
]  # fmt: skip


@pytest.mark.parametrize("repo, files, chosen", WITHOUT_A_PATTERN)
def test_without_a_pattern_other_hooks_are_not_downloaded(repo, files, chosen):
    assert hub_saes.choose_files(files, hub.Repo(repo), None) == chosen


def test_a_part_that_a_pattern_downloaded_is_not_the_whole(cache, listed_files, monkeypatch):
    """What is in the cache already did for all that the repository has."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    files = [f"layer_{i}/width_16k/average_l0_9/params.npz" for i in (0, 1)]
    listed_files(files)
    root = write_gemma(snapshot(cache, "user/res"), files[:1])
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached_first(root, asked))
    assert sorted(find_saes(named.sae_source("user/res:layer_0").path).headers) == [1]
    assert sorted(find_saes(named.sae_source("user/res").path).headers) == [1, 2]
    assert [entry[2] for entry in asked if not entry[3]] == [tuple(files)]


def cached_first(root, asked):
    def download(repo, *, revision, allow_patterns, local_files_only):
        asked.append((repo, revision, tuple(allow_patterns), local_files_only))
        return str(root if local_files_only else write_gemma(root, allow_patterns))

    return download


@pytest.mark.parametrize("kind, what", [("mlp", "the MLP"), ("att", "attention")])
def test_a_repository_of_another_hook_is_refused_before_it_is_downloaded(
    cache, online, listed_files, kind, what
):
    listed_files(FILES[:8])
    asked = online(lambda repo: cache)
    with pytest.raises(InputError, match=rf"but 8 of blocks.N.*\({what}\), as the names of its"):
        named.sae_source(f"google/gemma-scope-2b-pt-{kind}")
    assert [entry for entry in asked if not entry[3]] == []
