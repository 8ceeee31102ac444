"""What the names of hooks, folders and repositories mean, and sets that mix hooks."""

import dataclasses
from pathlib import Path

import folders
import layouts
import numpy as np
import pytest
from test_formats import MODEL, near

import qkattr
from qkattr.cli.main import main
from qkattr.errors import InputError
from qkattr.load.dictionaries import find_saes, hooks, load_saes
from qkattr.sources.dictionary import reconstruct

RNG = np.random.default_rng

#: The stream before or after a block, or the embedding, in every spelling that publishers use.
BOUNDARIES = {
    "blocks.3.hook_resid_post": 4,
    "blocks.3.hook_resid_pre": 3,
    "blocks.3.hook_out": 4,
    "blocks.3.hook_in": 3,
    "model.layers.3": 4,
    "model.layers.3.output": 4,
    "model.layers.3.input": 3,
    "layers.3": 4,
    "transformer.h.3": 4,
    "h.3": 4,
    "gpt_neox.layers.3": 4,
    "model.language_model.layers.3": 4,
    "language_model.model.layers.3": 4,
    "resid_post_layer_3": 4,
    "resid_out_layer3": 4,
    "resid_pre_layer_3": 3,
    "hook_embed": 0,
    "embed_tokens": 0,
    "model.embed_tokens": 0,
    "transformer.wte": 0,
    "gpt_neox.embed_in": 0,
    "blocks.03.hook_resid_post": 4,
}
ELSEWHERE = (
    "",
    "blocks.3.hook_resid_mid",
    "blocks.3.hook_mlp_out",
    "blocks.3.attn.hook_z",
    "blocks.3.ln1.hook_normalized",
    "model.layers.3.mlp",
    "model.layers.3.self_attn.o_proj.input",
    "model.layers.3.post_feedforward_layernorm.output",
    "model.vision_tower.encoder.layers.3",
    "encoder.layers.3",
    "model.norm",
    "lm_head",
    "transformer.wpe",
    "layers.3.mlp",
    "layers.12345",
    "mlp_out_layer_3",
    "attn_out_layer3",
    *hooks.OTHERS,
)


@pytest.mark.parametrize("name", BOUNDARIES)
def test_spellings_of_the_residual_stream(name):
    assert hooks.boundary(name) == hooks.boundary(hooks.canonical(name)) == BOUNDARIES[name]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_hooks_elsewhere(name):
    assert hooks.boundary(name) is None and hooks.canonical(name) == name


@pytest.mark.parametrize(
    "path, hook",
    [
        ("gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_9", "blocks.3.hook_resid_post"),
        ("gemma-scope-2b-pt-mlp/layer_3/width_16k/average_l0_9", "blocks.3.mlp"),
        ("gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_9", "blocks.3.attn"),
        ("gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_9", "transcoder"),
        ("models--google--gemma-scope-9b-pt-mlp/snapshots/0a/layer_3/width_16k/average_l0_9",
         "blocks.3.mlp"),
        ("models--google--gemma-scope-9b-pt-res/snapshots/0a/layer_3/width_16k/average_l0_9",
         "blocks.3.hook_resid_post"),
        ("mlp/attn/mine/layer_3/width_16k/average_l0_9", "blocks.3.hook_resid_post"),
        ("gemma-scope-2-1b-pt/resid_post_all/layer_3_width_16k_l0_small",
         "blocks.3.hook_resid_post"),
        ("gemma-scope-2-1b-pt/attn_out_all/layer_3_width_16k_l0_small", "blocks.3.attn"),
        ("gemma-scope-2-1b-pt/mlp_out/layer_3_width_16k_l0_small", "blocks.3.mlp"),
        ("gemma-scope-2-1b-pt/transcoder_all/layer_3_width_16k_l0_small_affine", "transcoder"),
        ("gemma-scope-2-1b-pt/clt/width_262k_l0_medium", "cross-layer transcoder"),
        ("gemma-scope-2-1b-pt/crosscoder/layer_7_13_width_65k", "crosscoder"),
        ("transcoders-and-saes/resid_post/layer_3_width_16k", "blocks.3.hook_resid_post"),
        ("attn_out_layer3/10_32768", "blocks.3.attn"),
        ("resid_out_layer3/10_32768", "blocks.3.hook_resid_post"),
        ("embed/10_32768", "embed_tokens"),
        ("pythia__res-sm/x/y", ""),
        ("a/b/c/d", ""),
    ],
)  # fmt: skip
def test_names_of_folders(path, hook):
    root = Path("/a/b/c/d")
    assert hooks.by_names(root / path, None) == hook
    stated = hooks.by_names(root / path, 3, stated="resid_pre")
    assert stated == "blocks.3.hook_resid_pre"


def gemma_1(repo, root):
    for layer in (0, 1):
        at = f"{repo}/layer_{layer}/width_16k/average_l0_9"
        layouts.gemma_scope(root, RNG(layer), at=at)
    return root


@pytest.mark.parametrize(
    "repo, what",
    [
        ("gemma-scope-2b-pt-mlp", r"2 of blocks.N.mlp \(the MLP\)"),
        ("gemma-scope-9b-pt-att", r"2 of blocks.N.attn \(attention\)"),
        ("gemma-scope-2b-pt-transcoders", "2 transcoders"),
        ("models--google--gemma-scope-2b-pt-att/snapshots/0123abc", "2 of blocks.N.attn"),
    ],
)
def test_gemma_scope_1_of_another_hook_is_not_read(tmp_path, repo, what):
    """All four kinds of repository have one layout: only its name tells them apart."""
    gemma_1(repo, tmp_path)
    with pytest.raises(InputError, match=rf"holds no SAE of the residual stream, but {what}"):
        load_saes(tmp_path / repo, MODEL)
    gemma_1("gemma-scope-2b-pt-res", tmp_path)
    assert all(load_saes(tmp_path / "gemma-scope-2b-pt-res", MODEL)[1:])
    (tmp_path / repo / "qkattr.toml").write_text('hook = "resid_post"\n')
    assert all(load_saes(tmp_path / repo, MODEL)[1:])


def sparsify(root):
    for layer in (0, 1):
        for below in ("", ".mlp", ".attention"):
            layouts.sparsify(root, RNG(layer), hookpoint=f"layers.{layer}{below}")
    return "2 of layers.N.attention (attention), 2 of layers.N.mlp (the MLP)"


def saelens(root):
    for layer in (0, 1):
        for hook in ("hook_resid_post", "hook_mlp_out", "attn.hook_z"):
            layouts.saelens(root, RNG(layer), hook=f"blocks.{layer}.{hook}")
        layouts.saelens(root, RNG(layer), at=f"t{layer}", architecture="transcoder")
    return (
        "2 of blocks.N.attn.hook_z (attention), 2 of blocks.N.hook_mlp_out (the MLP), 2 transcoders"
    )


def gemma_2(root):
    for layer in (0, 1):
        layouts.gemma_scope_2(root, RNG(layer), layer=layer)
        point = f"model.layers.{layer}.self_attn.o_proj.input"
        layouts.gemma_scope_2(root, RNG(layer), layer=layer, site="attn_out_all",
                              hf_hook_point_in=point, hf_hook_point_out=point)  # fmt: skip
        point = f"model.layers.{layer}.pre_feedforward_layernorm.output"
        layouts.gemma_scope_2(root, RNG(layer), layer=layer, site="transcoder_all",
                              type="transcoder", hf_hook_point_in=point)  # fmt: skip
    return "2 of model.layers.N.self_attn.o_proj.input (attention), 2 transcoders"


def gemma_2_without_configs(root):
    for layer in (0, 1):
        for site in ("resid_post_all", "attn_out_all", "mlp_out_all", "transcoder_all"):
            layouts.gemma_scope_2(root, RNG(layer), layer=layer, site=site, config=False)
    return "2 of blocks.N.attn (attention), 2 of blocks.N.mlp (the MLP), 2 transcoders"


def dictionary_learning(root):
    for layer in (0, 1):
        for site in ("resid_out", "mlp_out", "attn_out"):
            layouts.dictionary_learning(
                root, RNG(layer), "AutoEncoder", at=f"{site}_layer{layer}/10_32768",
                layer=layer, submodule_name=None,
            )  # fmt: skip
    return "2 of blocks.N.attn (attention), 2 of blocks.N.mlp (the MLP)"


def llama_scope(root):
    for layer in (0, 1):
        at = f"blocks.{layer}.hook"
        sites = {"R": (f"{at}_resid_post", None), "M": (f"{at}_mlp_out", None),
                 "A": (f"{at}_attn_out", None),
                 "TC": (f"{at}_resid_mid", f"{at}_mlp_out")}  # fmt: skip
        for site, (into, out) in sites.items():
            layouts.llama_scope(root, RNG(layer), site=site, layer=layer, into=into, out=out)
    return (
        "2 of blocks.N.hook_attn_out (attention), 2 of blocks.N.hook_mlp_out (the MLP), "
        "2 transcoders"
    )


MIXED = (sparsify, saelens, gemma_2, gemma_2_without_configs, dictionary_learning, llama_scope)


@pytest.mark.parametrize("write", MIXED)
def test_saes_of_other_hooks_are_left_out_and_counted(tmp_path, write):
    left_out = write(tmp_path)
    found = find_saes(tmp_path)
    number = sum(int(part.split()[0]) for part in left_out.split(", "))
    assert found.notes == (f"{number} SAEs of other hooks left out: {left_out}",)
    assert sorted(found.headers) == [1, 2]
    assert [sae is not None for sae in load_saes(tmp_path, MODEL)] == [False, True, True]


def test_what_is_left_out_is_a_note_of_the_bundle_and_of_a_command(tmp_path, capsys):
    left_out = sparsify(tmp_path / "saes")
    folders.write_model(tmp_path / "model", d=layouts.D)
    bundle = qkattr.load(tmp_path / "model", tmp_path / "saes")
    assert bundle.notes == (f"4 SAEs of other hooks left out: {left_out}",)
    saes = f"{tmp_path / 'saes'}:/layers.?"
    assert qkattr.load(tmp_path / "model", saes).notes == ()
    command = ["trace", "5,9,7", "--ids", "-m", str(tmp_path / "model"), "--json"]
    assert main([*command, "-s", str(tmp_path / "saes")]) == 0
    assert capsys.readouterr().err == f"qkattr: note: {bundle.notes[0]}\n"


@pytest.mark.parametrize("write", MIXED)
def test_a_set_without_the_residual_stream_says_what_it_has(tmp_path, write):
    left_out = write(tmp_path / "all")
    for header in find_saes(tmp_path / "all").headers.values():
        for file in header.files:
            file.unlink()
    with pytest.raises(InputError) as caught:
        find_saes(tmp_path / "all")
    assert f"holds no SAE of the residual stream, but {left_out}; expected" in str(caught.value)


def test_a_pattern_without_the_residual_stream_says_what_it_matches(tmp_path):
    sparsify(tmp_path)
    with pytest.raises(InputError, match=r":mlp holds no SAE .*, but 2 of layers.N.mlp \(the MLP"):
        find_saes(f"{tmp_path}:mlp")


@pytest.mark.parametrize(
    "pattern, matched",
    [
        ("/layers.?", 2),
        ("/layers.[01]", 2),
        ("/layers.1", 1),
        ("/layers.*", 6),
        ("layers.?", 6),
        ("layers.0", 3),
        ("/layers.?@5", 2),
    ],
)
def test_after_a_slash_a_pattern_is_the_whole_path(tmp_path, pattern, matched):
    sparsify(tmp_path)
    found = find_saes(f"{tmp_path}:{pattern}")
    left_out = sum(int(note.split()[0]) for note in found.notes)
    assert len(found.headers) + left_out == matched


def test_one_trainer_of_many(tmp_path):
    for trainer in (3, 30):
        at = f"resid_post_layer_1/trainer_{trainer}"
        layouts.dictionary_learning(tmp_path, RNG(0), "AutoEncoder", at=at)
    (header,) = find_saes(f"{tmp_path}:/*/trainer_3").headers.values()
    assert header.folder.name == "trainer_3"
    with pytest.raises(InputError, match="are both for boundary 2"):
        find_saes(f"{tmp_path}:trainer_3")


def test_a_folder_that_is_an_sae_itself_can_have_a_pattern(tmp_path):
    layouts.sparsify(tmp_path, RNG(0))
    assert list(find_saes(f"{tmp_path / 'layers.1'}:*").headers) == [2]


EMBEDDED = ("sparsify", "hook_embed")


@pytest.mark.parametrize("kind", EMBEDDED)
@pytest.mark.parametrize(
    "family, fits",
    [("gpt2", ()), ("gemma2", ("hook_embed",)), ("gemma3_text", EMBEDDED), ("gpt_neox", EMBEDDED)],
)
def test_the_embedding_is_boundary_0_only_where_nothing_comes_after_it(
    tmp_path, kind, family, fits
):
    config = dataclasses.replace(MODEL, family=family)
    if kind == "sparsify":
        layouts.sparsify(tmp_path, RNG(0), hookpoint="embed_tokens")
    else:
        layouts.saelens(tmp_path, RNG(0), hook="hook_embed")
    if kind in fits:
        assert load_saes(tmp_path, config, missing="raw")[0] is not None
        return
    with pytest.raises(InputError, match=f"at the embedding, which in {family} models is not bou"):
        load_saes(tmp_path, config, missing="raw")


def test_the_embedding_before_its_scale(tmp_path):
    """With the scale stated, an SAE of the module's output computes what it did there."""
    pipeline = layouts.sparsify(tmp_path, RNG(0), hookpoint="model.embed_tokens")
    (tmp_path / "qkattr.toml").write_text(f"[norm_factors]\nembed_tokens = {1 / 8**0.5}\n")
    config = dataclasses.replace(MODEL, family="gemma2")
    sae = load_saes(tmp_path, config, missing="raw")[0]
    x = np.float32(RNG(1).normal(size=(5, 8)))
    acts, rebuilt = pipeline(x)
    got_acts, got = reconstruct(sae, x * 8**0.5)
    near(got_acts, acts)
    near(got, rebuilt * 8**0.5)


@pytest.mark.parametrize(
    "at, boundary",
    [
        ("layers.1", 2),
        ("layer_1", 1),
        ("layer_0", 0),
        ("sae-SmolLM2-1.7B-layer1-32x", 2),
        ("models--EleutherAI--sae-SmolLM2-1.7B-layer1-32x/snapshots/0123abc", 2),
        ("sae-SmolLM2-1.7B-layer1-mlp", None),
        ("transcoder-SmolLM2-layer1", None),
        ("sae-SmolLM2-layer1/lm_head", None),
        ("sae-SmolLM2-layer1/layers.1.mlp", None),
        ("layers.1.post_attention_layernorm", None),
    ],
)
def test_where_sparsify_trained(tmp_path, at, boundary):
    """`layer_N` is of before it named hookpoints: entry N of the hidden states."""
    layouts.sparsify(tmp_path, RNG(0), hookpoint=at)
    if boundary is None:
        with pytest.raises(InputError, match="holds no SAE of the residual stream, but 1 "):
            find_saes(tmp_path)
    else:
        assert list(find_saes(tmp_path).headers) == [boundary]
