"""What configs say, what they leave out, and what qkattr.toml says in their place."""

import json

import folders
import layouts
import numpy as np
import pytest
from test_formats import MODEL, near, stream

from qkattr.errors import InputError
from qkattr.load.dictionaries import find_saes, load_saes
from qkattr.sources.dictionary import reconstruct

RNG = np.random.default_rng
HOOK = "blocks.1.hook_resid_post"


def one(root, settings=""):
    """The set's SAE at boundary 2, with settings beside it."""
    if settings:
        (root / "qkattr.toml").write_text(settings)
    return load_saes(root, MODEL, missing="raw")[2]


def refused(root, message, settings=""):
    with pytest.raises(InputError, match=message) as caught:
        one(root, settings)
    assert "\n" not in str(caught.value)


# Qwen Scope


def test_qwens_config_says_k_in_any_folder(tmp_path):
    layouts.qwen_scope(tmp_path, RNG(0), at="x-L0_3", **layouts.QWEN)
    found = find_saes(tmp_path)
    assert found.headers[2].config.k == layouts.K
    assert found.headers[2].model_name == "Qwen/Qwen3-1.7B-Base"
    assert tmp_path / "x-L0_3" / "config.json" in found.files
    assert one(tmp_path, f"k = {layouts.K}").config.k == layouts.K
    refused(tmp_path, "needs k in 1..d_sae=24, got 4, and 5|got 5, and 4 of qkattr.toml", "k = 4")


@pytest.mark.parametrize(
    "said, message",
    [
        (dict(k=99), "needs k in 1..d_sae=24, got 99"),
        (dict(k="50"), "got '50'"),
        (dict(d_sae=32), "config.json says d_sae=32, layer 1 has 24; copy the set again"),
        (dict(d_model=16), "config.json says d_model=16, layer 1 has 8"),
        (dict(num_layers=1), "layer 1 is there, num_layers is 1"),
        (dict(model_type="jumprelu_sae"), "model_type 'jumprelu_sae' is not implemented"),
        (dict(hook_point="mlp_out"), r"but 1 of blocks.N.mlp \(the MLP\);"),
        (dict(hook_point="attn_out"), r"but 1 of blocks.N.attn \(attention\);"),
        (dict(hook_point="resid_mid"), "but 1 of blocks.N.hook_resid_mid;"),
        (dict(hook_point="elsewhere"), "but 1 of elsewhere;"),
    ],
)
def test_qwens_config_is_checked(tmp_path, said, message):
    layouts.qwen_scope(tmp_path, RNG(0), **layouts.QWEN | said)
    refused(tmp_path, message)


def test_qwens_hook_may_be_before_the_block(tmp_path):
    layouts.qwen_scope(tmp_path, RNG(0), **layouts.QWEN | dict(hook_point="resid_pre"))
    assert list(find_saes(tmp_path).headers) == [1]


def test_a_models_config_beside_qwens_files_says_nothing(tmp_path):
    layouts.qwen_scope(tmp_path, RNG(0), model_type="qwen3", hidden_size=8, num_hidden_layers=1)
    assert find_saes(tmp_path).headers[2].config.k == layouts.K


# dictionary_learning


def forget(root, *names):
    path = next(root.rglob("config.json"))
    said = json.loads(path.read_text())
    for name in names:
        said["trainer"].pop(name)
    path.write_text(json.dumps(said))


ALONE = [c for c in layouts.CLASSES if c not in ("AutoEncoderTopK", "BatchTopKSAE")]


@pytest.mark.parametrize("kind", layouts.CLASSES)
def test_a_class_may_follow_from_the_trainer_or_the_tensors(tmp_path, kind):
    pipeline = layouts.CASES[f"dictionary_learning, {kind}"](tmp_path, RNG(0))
    forget(tmp_path, "dict_class", "k", "activation_dim", "dict_size", "layer", "submodule_name")
    if kind not in ALONE:  # both have the same tensors
        refused(tmp_path, "has no dict_class, .* give dict_class in qkattr.toml, such as AutoEnc")
        (tmp_path / "qkattr.toml").write_text(f'dict_class = "{kind}"\n')
    acts, rebuilt = pipeline(stream())
    got_acts, got = reconstruct(one(tmp_path), np.float32(stream()))
    near(got_acts, acts)
    near(got, rebuilt)


TRAINERS = {
    "StandardTrainer": "AutoEncoder",
    "StandardTrainerAprilUpdate": "AutoEncoder",
    "PAnnealTrainer": "AutoEncoder",
    "PAnnealTrainerNew": "AutoEncoderNew",
    "GatedSAETrainer": "GatedAutoEncoder",
    "GdmTrainer": "GatedAutoEncoder",
    "JumpReluTrainer": "JumpReluAutoEncoder",
    "TopKTrainer": "AutoEncoderTopK",
    "TrainerTopK": "AutoEncoderTopK",
    "BatchTopKTrainer": "BatchTopKSAE",
    "MatryoshkaBatchTopKTrainer": "MatryoshkaBatchTopKSAE",
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_trainers_and_their_classes(tmp_path, trainer):
    case = f"dictionary_learning, {TRAINERS[trainer]}"
    layouts.CASES[case](tmp_path / "said", RNG(0))
    layouts.dictionary_learning(tmp_path / "meant", RNG(0), TRAINERS[trainer], dict_class=None,
                                trainer_class=trainer)  # fmt: skip
    assert one(tmp_path / "meant").config == one(tmp_path / "said").config


@pytest.mark.parametrize(
    "said, hook",
    [
        (dict(submodule_name="resid_post"), HOOK),
        (dict(submodule_name="residual"), HOOK),
        (dict(submodule_name="residual", layer=None), HOOK),
        (dict(submodule_name="resid_pre"), "blocks.1.hook_resid_pre"),
        (dict(submodule_name="model.layers.1"), HOOK),
        (dict(submodule_name=None), HOOK),
        (dict(submodule_name=None, at="resid_pre_layer_1/t"), "blocks.1.hook_resid_pre"),
        (dict(submodule_name=None, layer=None, at="resid_out_layer1/10_32768"), HOOK),
        (dict(submodule_name=None, layer=None, at="embed/10_32768"), "embed_tokens"),
    ],
)
def test_hooks_of_dictionary_learning(tmp_path, said, hook):
    layouts.dictionary_learning(tmp_path, RNG(0), "AutoEncoder", **said)
    (header,) = find_saes(tmp_path).headers.values()
    assert header.hook == hook


@pytest.mark.parametrize(
    "said, message",
    [
        (dict(submodule_name="somewhere"), "but 1 of somewhere;"),
        (dict(submodule_name="attn_1"), r"but 1 of blocks.N.attn \(attention\);"),
        (dict(submodule_name="resid_post", layer=None, at="x/y"), "has no layer, nor has a folder"),
        (dict(submodule_name=None, layer=None, at="x/y"), "has no submodule_name, nor do the fol"),
        (dict(submodule_name=None, at="x/y"), 'give hook = "resid_post" in qkattr.toml if that is'),
        (dict(submodule_name=3), "submodule_name should be str, got 3"),
        (dict(layer="1"), "layer should be int, got '1'"),
        (dict(trainer_class="CrossCoderTrainer", dict_class=None), "but 1 crosscoder;"),
        (dict(dict_class="VanillaSAE"), "dict_class 'VanillaSAE' is not implemented; known are"),
    ],
)
def test_dictionary_learning_that_is_refused(tmp_path, said, message):
    layouts.dictionary_learning(tmp_path, RNG(0), "AutoEncoder", **said)
    refused(tmp_path, message)


def test_a_submodule_may_be_stated(tmp_path):
    layouts.dictionary_learning(tmp_path, RNG(0), "AutoEncoder", submodule_name=None, at="x/y")
    (tmp_path / "qkattr.toml").write_text('hook = "resid_pre"\n')
    assert list(find_saes(tmp_path).headers) == [1]
    assert one(tmp_path, 'hook = "resid_post"\n') is not None


# Two linear layers in a file


def test_a_single_file_says_its_layer(tmp_path):
    layouts.two_layers(tmp_path, RNG(0))
    layouts.two_layers(tmp_path, RNG(1), name="DeepSeek-R1-Distill-Llama-8B-SAE-l0.pt", tail="")
    assert [sae is not None for sae in load_saes(tmp_path, MODEL)] == [False, True, True]
    assert list(find_saes(f"{tmp_path}:Llama-3.1*").headers) == [2]
    refused(tmp_path / "none", "no such folder")


def test_few_layers_are_for_missing_raw(tmp_path):
    layouts.two_layers(tmp_path, RNG(0))
    with pytest.raises(InputError, match="no SAE for boundary 1; .*--missing raw"):
        load_saes(tmp_path, MODEL)


# SAELens


@pytest.mark.parametrize(
    "said, hook",
    [
        (dict(hook="model.layers.1", model_class_name="AutoModelForCausalLM"), HOOK),
        (dict(hook="transformer.h.1"), HOOK),
        (dict(hook="gpt_neox.layers.1"), HOOK),
        (dict(hook="model.language_model.layers.1"), HOOK),
        (dict(hook="model.layers.1.output"), HOOK),
        (dict(hook="gpt_neox.embed_in"), "embed_tokens"),
        (dict(metadata=dict(hf_hook_name="model.layers.1")), HOOK),
        (dict(metadata={}, at="blocks.1.hook_resid_post"), HOOK),
        (dict(metadata=dict(hook_name=HOOK, hook_name_out=HOOK)), HOOK),
    ],
)
def test_hooks_of_saelens(tmp_path, said, hook):
    layouts.saelens(tmp_path, RNG(0), **said)
    (header,) = find_saes(tmp_path).headers.values()
    assert header.hook == hook


def test_thresholds_of_checkpoints_before_6_48(tmp_path):
    layouts.saelens(tmp_path, RNG(0), architecture="jumprelu")
    w = layouts.weights(RNG(0))
    stored = dict(w, log_threshold=np.log(w.pop("threshold")))
    stored.pop("threshold", None)
    layouts.put(tmp_path / HOOK, "sae_weights.safetensors", stored)
    expected = np.exp(stored["log_threshold"])
    np.testing.assert_allclose(one(tmp_path).threshold_M, expected, rtol=1e-6)


def skipping(root):
    w = layouts.weights(RNG(0))
    w.pop("threshold")
    w["W_skip"] = np.eye(layouts.D, dtype=np.float32)
    layouts.put(root / HOOK, "sae_weights.safetensors", w)


def test_a_skip_connection_is_a_transcoders(tmp_path):
    layouts.saelens(tmp_path, RNG(0))
    skipping(tmp_path)
    refused(tmp_path, "holds W_skip, which only a transcoder has")


# OpenMOSS


def test_what_the_defaults_of_llamascopium_leave_over_is_not_said(tmp_path):
    """Its top_k is 50 in every jumprelu config; nothing says whether text had a BOS."""
    layouts.r1_distill(tmp_path, RNG(0))
    path = next(tmp_path.rglob("config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(top_k=50)))
    sae = one(tmp_path)
    assert sae.l0 is None and sae.config.prepend_bos is None
    layouts.llama_scope(tmp_path / "1", RNG(0))
    first = one(tmp_path / "1")
    assert float(first.l0) == 50 and first.config.prepend_bos is True


def test_topks_of_llamascopium_say_their_l0(tmp_path):
    layouts.llamascopium(tmp_path, RNG(0), act="topk", norm="token-wise")
    assert find_saes(tmp_path).headers[2].l0 == layouts.K


# sparsify


def test_a_config_of_another_program_is_refused(tmp_path):
    for said in (dict(hook_name="blocks.1.hook_resid_post"), dict(apply_b_dec_to_input=False)):
        layouts.sparsify(tmp_path, RNG(0), **said)
        refused(tmp_path, "has SAELens's fields and the weights are sparsify's; the two disagree")


def test_a_misleading_folder_may_be_overruled(tmp_path):
    root = tmp_path / "transcoders"
    layouts.sparsify(root, RNG(0), transcode=None)
    refused(root, "but 1 transcoder;")
    assert one(root, 'hook = "resid_post"\n') is not None


# Normalisation that only a registry knows

AVERAGE = 'normalize_activations = "expected_average_only_in"\n'
FACTOR = f'[norm_factors]\n"{HOOK}" = 0.5\n'


@pytest.mark.parametrize("case", ["saelens", "sparsify", "gemma scope 2", "goodfire"])
@pytest.mark.parametrize("settings", [AVERAGE + FACTOR, FACTOR,
                                      FACTOR.replace(HOOK, "model.layers.1")])  # fmt: skip
def test_a_factor_is_stated(tmp_path, case, settings):
    pipeline = layouts.CASES[case](tmp_path, RNG(0))
    acts, rebuilt = pipeline(stream() * 0.5)
    got_acts, got = reconstruct(one(tmp_path, settings), np.float32(stream()))
    near(got_acts, acts)
    near(got, rebuilt / 0.5)


def test_a_norm_per_token_is_stated(tmp_path):
    """As the registry of SAELens does for the SAEs of Mistral, whose configs say none."""
    pipeline = layouts.saelens(tmp_path, RNG(0))
    sae = one(tmp_path, 'normalize_activations = "constant_norm_rescale"\n')
    scale = np.linalg.norm(stream(), axis=1, keepdims=True) / np.sqrt(layouts.D)
    acts, rebuilt = pipeline(stream() / scale)
    got_acts, got = reconstruct(sae, np.float32(stream()))
    near(got_acts, acts)
    near(got, rebuilt * scale)


def test_a_scale_in_the_config_may_be_stated_away(tmp_path):
    layouts.saelens(tmp_path, RNG(0), normalize_activations="expected_average_only_in")
    refused(tmp_path, "whose factor is not in the file; give it in norm_factors")
    assert one(tmp_path, 'normalize_activations = "none"\n').factor is None
    assert float(one(tmp_path, FACTOR).factor) == 0.5


@pytest.mark.parametrize(
    "settings, message",
    [
        (AVERAGE, "whose factor is not in the file"),
        ('normalize_activations = "layer_norm"\n' + FACTOR, "norm factor 0.5 and normalisation l"),
        (FACTOR.replace("0.5", "0.0"), "has norm factor 0.0"),
        (FACTOR.replace("0.5", "inf"), "has norm factor inf"),
        (FACTOR.replace("0.5", "nan"), "has norm factor nan"),
        (FACTOR.replace("1", "0"), "norm_factors has blocks.0.hook_resid_post, where no SAE was"),
        ('normalize_activations = "mean"\n', "qkattr.toml: Invalid enum value 'mean'"),
        ('hook = "resid_mid"\n', "qkattr.toml: Invalid enum value 'resid_mid'"),
    ],
)
def test_normalisations_that_are_refused(tmp_path, settings, message):
    layouts.saelens(tmp_path, RNG(0))
    refused(tmp_path, message, settings)


# Dictionaries that are no SAEs


@pytest.mark.parametrize(
    "files, kind",
    [
        (("config.yaml", "layer_0.safetensors", "layer_1.safetensors"), "transcoder"),
        (("config.yaml", "W_enc_0.safetensors", "W_dec_0.safetensors"), "cross-layer transcoder"),
        (("clt/width_262k_l0_big/params_layer_0.safetensors",), "cross-layer transcoder"),
        (("crosscoder/layer_5_9/params_layer_0.safetensors",), "crosscoder"),
        (("layer_12/temporal/conf.yaml", "layer_12/temporal/latest_ckpt.safetensors"),
         "temporal SAE"),
    ],
)  # fmt: skip
def test_what_is_no_sae_is_called_by_its_name(tmp_path, files, kind):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    refused(tmp_path, f"holds no SAE of the residual stream, but 1 {kind};")
    with pytest.raises(InputError, match=f"holds a {kind}; load SAEs"):
        folders.load_sae((tmp_path / files[0]).parent)
    layouts.saelens(tmp_path, RNG(0))
    assert find_saes(tmp_path).notes == (f"1 SAE of other hooks left out: 1 {kind}",)
