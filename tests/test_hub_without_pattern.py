"""What is downloaded of a repository that the registry does not know, when no pattern is given."""

# ruff: noqa: F811 (fixtures of another module)
import huggingface_hub
import pytest
from huggingface_hub import constants
from test_hub import FILES, cache, listed_files, online, snapshot, write_gemma  # noqa: F401

from qkattr.errors import InputError
from qkattr.load import hub, hub_saes, named
from qkattr.load.saes import find_saes

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
