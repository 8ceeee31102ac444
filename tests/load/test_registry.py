"""Every entry of the registry of names, and what is made of them."""

import re
import string

import msgspec
import pytest

from qkattr.errors import InputError
from qkattr.load import hub, registry

REGISTRY = registry.registry()
MODELS, SAES = REGISTRY.models, REGISTRY.saes


def fields(pattern):
    return {name for _, name, _, _ in string.Formatter().parse(pattern) if name}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    entry = MODELS[name]
    assert re.fullmatch(r"[a-z0-9.-]+", name)
    assert hub.parse_repo(entry.repo) == hub.Repo(entry.repo)
    assert 1 <= entry.blocks <= 200 and entry.license


@pytest.mark.parametrize("name", SAES)
def test_saes(name):
    entry = SAES[name]
    assert re.fullmatch(r"[a-z0-9.-]+", name) and name not in MODELS
    assert entry.model in MODELS and 1 <= entry.layers <= MODELS[entry.model].blocks
    assert entry.license and entry.files
    known = {"layer", *entry.choices} | ({"l0"} if entry.l0_of_layer else set())
    patterns = [entry.repo, entry.folder, *entry.files, *entry.optional]
    assert set().union(*map(fields, patterns)) <= known
    named = set().union(*map(fields, [*patterns, entry.source_set or ""]))
    asked = {e.choice for e in entry.extra} - {None}
    for axis, of_axis in entry.choices.items():
        assert axis in named or set(of_axis[1:]) <= asked and of_axis[0] not in asked
    values = [value for choice in entry.choices.values() for value in choice]
    assert len(values) == len(set(values))
    for width, l0 in entry.l0_of_layer.items():
        assert width in entry.choices["width"] and len(l0) == entry.layers
        assert all(value > 0 for value in l0)
    assert bool(entry.width) + ("width" in entry.choices) + ("variant" in entry.choices) == 1
    assert entry.source_set is None or entry.scan


@pytest.mark.parametrize("name", SAES)
def test_files_of_every_choice(name):
    """Every boundary once, no file twice, nothing left unfilled."""
    entry = SAES[name]
    last = MODELS[entry.model].blocks
    for value in [None, *(v for choice in entry.choices.values() for v in choice)]:
        choice = registry.find_saes(name if value is None else f"{name}:{value}")
        assert choice is not None and choice.name == name
        assert hub.parse_repo(choice.repo) == hub.Repo(choice.repo)
        files = choice.files()
        paths = [path for of_boundary in files.values() for path in of_boundary]
        assert len(paths) == len(set(paths)) == len(files) * len(entry.files)
        assert not any(c in path for path in paths for c in "{}*[]") and "None" not in str(paths)
        assert set(files) <= set(range(last + 1)) and len(files) >= last - 1
        source = choice.source()
        if source is not None and source.source_set:
            assert set(source.sources) <= set(files)
            assert all(s.endswith(f"-{source.source_set}") for s in source.sources.values())


def test_choices():
    choice = registry.find_saes("gemma-scope-2-270m-pt-res:262k,big")
    assert choice.files()[18] == ("resid_post_all/layer_17_width_262k_l0_big/params.safetensors",)
    choice = registry.find_saes("gemma_scope_2b_pt_res_canonical:65k")
    assert choice.files()[2] == ("layer_1/width_65k/average_l0_121/params.npz",)
    assert choice.source().sources[2] == "1-gemmascope-res-65k"
    choice = registry.find_saes("gpt2-small-res-jb")
    assert set(choice.files()) == set(range(13))
    assert choice.source().sources[0] == "0-res-jb" and choice.source().pre
    assert choice.source().sources[12] == "12-res-jb"
    choice = registry.find_saes("gemma-scope-2b-pt-res:65k,embedding-44")
    assert choice.files()[0] == ("embedding/width_4k/average_l0_44/params.npz",)
    assert choice.files()[1] == ("layer_0/width_65k/average_l0_73/params.npz",)
    assert 0 not in registry.find_saes("gemma-scope-2b-pt-res:65k").files()
    with pytest.raises(InputError, match="no choice '1m'; give one of its own: width 16k or 262k"):
        registry.find_saes("gemma-scope-2-270m-pt-res:1m")
    with pytest.raises(InputError, match="give gpt2-small-res-jb alone"):
        registry.find_saes("gpt2-small-res-jb:x")


#: As SAELens 6.54 lists them.
EMBEDDINGS = {"2b": {6, 21, 44, 111}, "9b": {7, 14, 22, 80}}


@pytest.mark.parametrize("size", EMBEDDINGS)
def test_embeddings_of_gemma_scope(size):
    entry = SAES[f"gemma-scope-{size}-pt-res"]
    said = {int(value.split("-")[1]) for value in entry.choices["embedding"][1:]}
    assert said == EMBEDDINGS[size]


@pytest.mark.parametrize("name", ["70m", "70m-deduped", "160m", "160m-deduped"])
def test_sparsify_sets_of_pythia(name):
    choice = registry.find_saes(f"EleutherAI/sae-pythia-{name}-32k")
    assert choice.name == f"sae-pythia-{name}-32k" and choice.entry.model == f"pythia-{name}"
    assert choice.files()[3] == ("layers.2/cfg.json", "layers.2/sae.safetensors")
    assert len(choice.files()) == MODELS[f"pythia-{name}"].blocks


def test_qwens_configs_are_wished_for():
    for name in (name for name in SAES if name.startswith("qwen-scope")):
        wished = registry.find_saes(name).files(optional=True)
        assert set(wished.values()) == {("config.json",)}


def test_what_is_a_choice():
    assert registry.is_choice("google/gemma-scope-2b-pt-res", "65k,embedding-6")
    assert registry.is_choice("google/gemma-scope-2b-pt-res", "65k@main")
    assert not registry.is_choice("google/gemma-scope-2b-pt-res", "width_65k@50")
    assert not registry.is_choice("user/repo", "65k")


def test_repositories_stand_for_their_set():
    assert registry.find_saes("google/gemma-scope-2-1b-it").name == "gemma-scope-2-1b-it-res"
    assert registry.find_saes("fnlp/Llama-Scope-R1-Distill") is None  # three sets lie in it
    assert registry.find_saes("user/repo") is None
    for variant in ("W32K-L0_50", "W32K-L0_100"):
        choice = registry.find_saes(f"Qwen/SAE-Res-Qwen3-1.7B-Base-{variant}")
        assert choice.name == "qwen-scope-3-1.7b-base" and choice.chosen == {"variant": variant}
    assert registry.find_saes("qwen/sae-res-qwen3-8b-base-w64k-l0_100").repo.endswith("L0_100")
    assert registry.find_saes("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_70") is None


def test_near_names():
    assert "gemma-3-270m" in registry.near_model("gemma-3-270")
    assert "gpt2-small-res-jb" in registry.near_saes("gpt2_small_resjb")
    assert registry.near_model("zzzzzz") == ""


def test_what_is_unsure_is_said():
    missing = registry.find_saes("gemma-2-9b-res-matryoshka-dc").notes()
    assert missing == ("gemma-2-9b-res-matryoshka-dc: there is no SAE at boundary 42",)
    notes = registry.find_saes("llama_scope_lxr_8x").notes()
    assert any("not verified: the unit of the JumpReLU threshold" in note for note in notes)


def test_a_misspelt_field_is_refused():
    with pytest.raises(msgspec.ValidationError, match="unknown field `licence`"):
        msgspec.toml.decode(
            '[models.x]\nrepo="a/b"\nblocks=1\nlicence="MIT"\n[saes]', type=registry.Registry
        )
