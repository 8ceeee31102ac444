"""Sets of SAEs: recognised by what lies there, one chosen of several, some missing."""

import json

import folders
import layouts
import numpy as np
import pytest
from test_formats import MODEL

from qkattr.errors import InputError
from qkattr.load.dictionaries import Options, find_saes, load_saes, recognise
from qkattr.load.fingerprint import fingerprint

RNG = np.random.default_rng


def gemma(root, *paths):
    for seed, path in enumerate(paths):
        layouts.gemma_scope(root, RNG(seed), at=path)
    return root


@pytest.mark.parametrize(
    "case, name",
    [
        ("gemma scope", "Gemma Scope"),
        ("gemma scope 2", "Gemma Scope 2"),
        ("llama scope", "Llama Scope"),
        ("r1 distill", "llamascopium"),
        ("llamascopium", "llamascopium"),
        ("sparsify", "sparsify"),
        ("dictionary_learning, AutoEncoder", "dictionary_learning"),
        ("qwen scope", "Qwen Scope"),
    ],
)
def test_a_folder_is_recognised_by_its_files(tmp_path, case, name):
    layouts.CASES[case](tmp_path, RNG(0))
    (header,) = find_saes(tmp_path).headers.values()
    folder = header.folder if header.folder.is_dir() else header.folder.parent
    assert recognise(folders.listed(folder)).name == name
    assert recognise(folders.listed(tmp_path)) is None
    folders.load_sae(folder)


def test_formats_may_be_mixed(tmp_path):
    gemma(tmp_path, "layer_0/width_16k/average_l0_12")
    layouts.sparsify(tmp_path / "theirs", RNG(1))
    assert [sae is not None for sae in load_saes(tmp_path, MODEL)] == [False, True, True]


L0S = {0: (20, 70), 1: (35, 90)}
TREE = [
    f"layer_{layer}/width_{width}/average_l0_{l0}"
    for layer, l0s in L0S.items()
    for width in ("16k", "65k")
    for l0 in l0s
]


def chosen(root, pattern):
    headers = find_saes(f"{root}:{pattern}").headers
    return {b: h.folder.relative_to(root).as_posix() for b, h in headers.items()}


def test_several_saes_of_a_boundary_are_named(tmp_path):
    gemma(tmp_path, *TREE)
    named = r"average_l0_20, .* and 1 more are all for boundary 1, expected one; choose with "
    with pytest.raises(InputError, match=named + "a pattern, as in '.*:layer_1/width"):
        load_saes(tmp_path, MODEL)


def test_patterns_choose(tmp_path):
    gemma(tmp_path, *TREE)
    at_70 = {1: "layer_0/width_65k/average_l0_70", 2: "layer_1/width_65k/average_l0_90"}
    assert chosen(tmp_path, "width_65k@75") == at_70
    assert chosen(tmp_path, "65k/*_[79]0") == at_70
    assert chosen(tmp_path, "width_16k@1") == {
        1: "layer_0/width_16k/average_l0_20", 2: "layer_1/width_16k/average_l0_35"
    }  # fmt: skip
    saes = load_saes(f"{tmp_path}:width_65k@75", MODEL)
    assert [float(sae.l0) for sae in saes[1:]] == [70, 90]
    by_options = load_saes(tmp_path, MODEL, options=Options(pattern="width_65k@75"))
    np.testing.assert_array_equal(by_options[1].w_enc_DM, saes[1].w_enc_DM)
    with pytest.raises(InputError, match="no SAE below .* matches 'width_1m'; there are layer_0/"):
        load_saes(f"{tmp_path}:width_1m", MODEL)
    with pytest.raises(InputError, match="are both for boundary 1"):
        load_saes(f"{tmp_path}:width_16k", MODEL)
    with pytest.raises(InputError, match="no such folder"):
        load_saes(f"{tmp_path}/absent:width_16k", MODEL)


def test_copies_that_say_no_l0_are_passed_over(tmp_path):
    """As Gemma Scope's `canonical` folders, beside those that they are copies of."""
    copies = [f"layer_{layer}/width_65k/canonical" for layer in L0S]
    gemma(tmp_path, *TREE, *copies)
    at_70 = {1: "layer_0/width_65k/average_l0_70", 2: "layer_1/width_65k/average_l0_90"}
    assert chosen(tmp_path, "width_65k@75") == at_70
    assert set(chosen(tmp_path, "65k/canonical").values()) == set(copies)
    with pytest.raises(InputError, match="does not say its L0, so that @75 cannot choose"):
        chosen(tmp_path, "65k/canonical@75")


def test_hidden_folders_are_passed_over(tmp_path):
    """As macOS and the hub's downloads leave them."""
    gemma(tmp_path, TREE[0])
    for name in ("._saes/resid_post_layer_3/trainer_0", ".cache/huggingface/download"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "cfg.json").write_bytes(b"\0\5\x16\7")
    assert list(find_saes(tmp_path).headers) == [1]
    hidden = gemma(tmp_path / ".mine", TREE[0])
    assert list(find_saes(hidden).headers) == [1]


def test_a_folder_with_a_colon_is_a_folder(tmp_path):
    root = gemma(tmp_path / "a:width_1m", *TREE[:1])
    assert 1 in find_saes(root).headers


def test_an_l0_that_is_not_said_chooses_nothing(tmp_path):
    layouts.dictionary_learning(tmp_path, RNG(0), kind="AutoEncoder")
    config = next(tmp_path.rglob("config.json"))
    said = json.loads(config.read_text())
    said["trainer"].pop("k")
    config.write_text(json.dumps(said))
    with pytest.raises(InputError, match="does not say its L0"):
        find_saes(f"{tmp_path}:trainer_0@9")


def test_the_fingerprint_is_of_what_was_chosen(tmp_path):
    gemma(tmp_path, *TREE)
    sets = [find_saes(f"{tmp_path}:width_{p}") for p in ("16k@1", "16k@99", "65k@1")]
    assert len({fingerprint(s.root, s.files) for s in sets}) == 3
    (tmp_path / "qkattr.toml").write_text("centre = true\n")
    again = find_saes(f"{tmp_path}:width_16k@1")
    assert fingerprint(again.root, again.files) != fingerprint(sets[0].root, sets[0].files)


def test_boundaries_without_an_sae(tmp_path):
    gemma(tmp_path, TREE[0])
    for function in (load_saes, folders.check_saes):
        with pytest.raises(InputError, match=r"no SAE for boundary 2; .*--missing raw"):
            function(tmp_path, MODEL)
        with pytest.raises(InputError, match="missing is 'zero', expected error or raw"):
            function(tmp_path, MODEL, missing="zero")
    saes = load_saes(tmp_path, MODEL, missing="raw")
    assert [sae is not None for sae in saes] == [False, True, False]


@pytest.mark.parametrize(
    "text, message",
    [
        ("centred = true", "has centred, which is not known"),
        ("centre = 3", "Expected `bool"),
        ("k = 'five'", "Expected `int"),
        ("centre = ", "is not TOML"),
        ('norm_factors = {"blocks.0.hook_resid_post" = "x"}', "Expected `float"),
        ('llama_scope_threshold = "theirs"', "expected openmoss or saelens"),
    ],
)
def test_settings_that_are_refused(tmp_path, text, message):
    layouts.llama_scope(tmp_path, RNG(0))
    (tmp_path / "qkattr.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_saes(tmp_path, MODEL, missing="raw")


def test_centre_and_k_may_be_given(tmp_path):
    layouts.put_json(tmp_path / "sae", "cfg.json", dict(
        d_in=layouts.D, d_sae=layouts.M, hook_point="blocks.1.hook_resid_pre",
        model_from_pretrained_kwargs={"center_writing_weights": True},
    ))  # fmt: skip
    w = layouts.weights(RNG(0))
    w.pop("threshold")
    layouts.put(tmp_path / "sae", "sae_weights.safetensors", w)
    assert folders.load_sae(tmp_path / "sae").config.centre is True
    assert folders.load_sae(tmp_path / "sae", Options(centre=False)).config.centre is False
    at = tmp_path / "qwen"
    layouts.qwen_scope(at, RNG(0))
    next(at.rglob("SAE-Res*")).rename(at / "here")
    with pytest.raises(InputError, match="its k should be in 1..24, got None"):
        load_saes(at, MODEL, missing="raw")
    (at / "qkattr.toml").write_text("k = 4\n")
    assert load_saes(at, MODEL, missing="raw")[2].config.k == 4


def edit(root, name, **fields):
    path = next(root.rglob(name))
    said = json.loads(path.read_text())
    path.write_text(json.dumps({n: v for n, v in (said | fields).items() if v is not None}))


@pytest.mark.parametrize(
    "case, name, fields, message",
    [
        ("gemma scope 2", "config.json", dict(architecture="gated"), "'gated' is not implemented"),
        ("gemma scope 2", "config.json", dict(type="crosscoder"), "but 1 crosscoder;"),
        ("gemma scope 2", "config.json", dict(type="clt"), "but 1 cross-layer transcoder;"),
        ("gemma scope 2", "config.json", dict(hf_hook_point_in="model.layers.1.mlp.input"),
         "but 1 transcoder;"),
        ("gemma scope 2", "config.json", dict(type="new"), "but 1 of new;"),
        ("gemma scope 2", "config.json",
         dict(hf_hook_point_in="model.layers.1.mlp.output", hf_hook_point_out=None),
         r"1 of model.layers.N.mlp.output \(the MLP\)"),
        ("llama scope", "hyperparams.json", dict(hook_point_out="blocks.1.hook_mlp_out"),
         "but 1 transcoder;"),
        ("llama scope", "hyperparams.json",
         dict(dataset_average_activation_norm={"in": 2.0, "out": 3.0}), "a transcoder"),
        ("llama scope", "hyperparams.json", dict(dataset_average_activation_norm=None),
         "should be a number above 0, got None"),
        ("llama scope", "hyperparams.json", dict(jump_relu_threshold=None),
         "has no jump_relu_threshold"),
        ("llama scope", "hyperparams.json", dict(norm_activation="batch-wise"),
         "depends on what else is in the batch"),
        ("llama scope", "hyperparams.json", dict(use_glu_encoder=True), "use_glu_encoder"),
        ("llamascopium", "config.json", dict(sae_type="crosscoder"), "but 1 crosscoder;"),
        ("llamascopium", "config.json", dict(act_fn="batchtopk"), "batchtopk depends on the batch"),
        ("sparsify", "cfg.json", dict(transcode=True), "but 1 transcoder;"),
        ("sparsify", "cfg.json", dict(skip_connection=True), "but 1 transcoder;"),
        ("sparsify", "cfg.json", dict(activation="groupmax"), "'groupmax' is not implemented"),
        ("sparsify", "cfg.json", dict(k=99), r"needs k in 1..d_sae=24, got 99"),
        ("dictionary_learning, AutoEncoder", "config.json", dict(dict_class="CrossCoder"),
         "but 1 crosscoder;"),
        ("dictionary_learning, AutoEncoder", "config.json", dict(submodule_name="mlp_out_layer_1"),
         r"but 1 of blocks.N.mlp \(the MLP\)"),
        ("dictionary_learning, AutoEncoder", "config.json", dict(activation_dim=9),
         r"encoder.weight has shape \[24, 8\], config.json \(d_in=9"),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_named(tmp_path, case, name, fields, message):
    layouts.CASES[case](tmp_path, RNG(0))
    edit(tmp_path, name, **fields)
    with pytest.raises(InputError, match=message):
        load_saes(tmp_path, MODEL, missing="raw")


def test_submodules_are_no_residual_stream(tmp_path):
    layouts.sparsify(tmp_path, RNG(0), hookpoint="layers.1.mlp")
    with pytest.raises(
        InputError, match=r"holds no SAE of the residual stream, but 1 of layers.N.mlp \(the MLP\);"
    ):
        load_saes(tmp_path, MODEL, missing="raw")
