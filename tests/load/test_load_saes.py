"""SAELens folders: what they compute against plain NumPy, and every reason to refuse one."""

import dataclasses
import json

import folders
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qkattr.config import BlockConfig, ModelConfig, Rotary
from qkattr.errors import InputError
from qkattr.kinds import NO_WINDOW
from qkattr.load.dictionaries import find_saes, load_saes
from qkattr.load.fingerprint import fingerprint
from qkattr.sources.dictionary import activations, encode

D, M, T = 6, 16, 5
TOLERANCE = dict(rtol=2e-5, atol=2e-5)  # float32 sums of 6 terms in another order
MODEL = ModelConfig(
    family="llama",
    n_blocks=2,
    d_model=D,
    n_heads=1,
    n_kv_heads=1,
    head_dim=D,
    d_mlp=4,
    vocab=8,
    context=8,
    block=BlockConfig(scale=1.0),
    rotary=Rotary(base=1e4, dims=D),
    windows=(NO_WINDOW,) * 2,
)


def tensors(architecture="standard", dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D, M), "W_dec": (M, D), "b_enc": (M,), "b_dec": (D,)}
    made = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    if architecture == "jumprelu":
        made["threshold"] = np.full(M, 0.7, dtype)
    return made


def v6(hook="blocks.0.hook_resid_post", architecture="standard", metadata=None, **options):
    config = {"architecture": architecture, "d_in": D, "d_sae": M, "dtype": "float32"}
    if architecture == "topk":
        config["k"] = 3
    return (
        config
        | options
        | {"metadata": {"hook_name": hook, "model_name": "tiny"} | (metadata or {})}
    )


def write(folder, config=None, weights=None):
    config = v6() if config is None else config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(
        tensors(config.get("architecture")) if weights is None else weights,
        folder / "sae_weights.safetensors",
    )
    return folder


def reference(weights, x, *, kind, k=None, subtract=True, rescale=False, normalise="none"):
    """`(activations, reconstruction)` in float64, by SAELens's definitions, a token at a time."""
    w = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    acts, outs = [], []
    for row in x.astype(np.float64):
        mean, gain = 0.0, 1.0
        if normalise == "layer_norm":
            mean, gain = row.mean(), 1 / (row.std(ddof=1) + 1e-5)
        elif normalise == "constant_norm_rescale":
            gain = np.sqrt(D) / np.linalg.norm(row)
        y = (row - mean) * gain
        pre = (y - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"]
        norm = np.linalg.norm(w["W_dec"], axis=1) if rescale else np.ones(M)
        if kind == "topk":
            keep = np.argsort(-pre * norm)[:k]
            act = np.zeros(M)
            act[keep] = np.maximum(pre[keep], 0)
        else:
            act = np.maximum(pre, 0) * (pre > w["threshold"] if kind == "jumprelu" else 1)
        acts.append(act)
        outs.append((act @ w["W_dec"] + w["b_dec"]) / gain + mean)
    return np.array(acts), np.array(outs)


def check_against_reference(dictionary, weights, **how):
    x = np.random.default_rng(7).normal(size=(T, D)).astype(np.float32) * 3 + 1
    acts, outs = reference(weights, x, **how)
    np.testing.assert_allclose(activations(dictionary, x), acts, **TOLERANCE)
    encoding = encode(dictionary, x, slots=M)
    rows = np.asarray(dictionary.w_dec_MD, np.float32)[np.asarray(encoding.index)]
    rebuilt = np.einsum("TA,TAD->TD", encoding.coefficient, rows) + encoding.bias
    np.testing.assert_allclose(rebuilt, outs, rtol=1e-4, atol=1e-4)  # sums of 16 features


@pytest.mark.parametrize(
    "architecture, kind", [("standard", "relu"), ("topk", "topk"), ("jumprelu", "jumprelu")]
)
@pytest.mark.parametrize("normalise", ["none", "constant_norm_rescale", "layer_norm"])
def test_version_6_formats(tmp_path, architecture, kind, normalise):
    weights = tensors(architecture)
    config = v6(
        architecture=architecture, normalize_activations=normalise, apply_b_dec_to_input=False
    )
    dictionary = folders.load_sae(write(tmp_path, config, weights))
    check_against_reference(
        dictionary, weights, kind=kind, k=3, subtract=False, normalise=normalise
    )


def test_topk_with_decoder_norms(tmp_path):
    dictionary = folders.load_sae(
        write(tmp_path, v6(architecture="topk", rescale_acts_by_decoder_norm=True))
    )
    check_against_reference(dictionary, tensors(), kind="topk", k=3, rescale=True)


@pytest.mark.parametrize("activation", ["activation_fn_str", "activation_fn"])
def test_flat_configs_from_before_version_6(tmp_path, activation):
    flat = {
        "hook_point": "blocks.0.hook_resid_pre",
        "d_in": D,
        "d_sae": M,
        "normalize_activations": False,
    }
    relu = folders.load_sae(write(tmp_path / "relu", flat | {activation: "relu"}))
    check_against_reference(relu, tensors(), kind="relu")
    assert relu.config.prepend_bos is True  # SAELens's default of that time
    kwargs = {"activation_fn_kwargs": {"k": 2}}
    topk = folders.load_sae(
        write(tmp_path / "topk", flat | kwargs | {activation: "topk", "prepend_bos": False})
    )
    check_against_reference(topk, tensors(), kind="topk", k=2)
    assert topk.config.k == 2 and topk.config.prepend_bos is False


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_stays_in_the_file(tmp_path, dtype):
    weights = tensors(dtype=dtype)
    dictionary = folders.load_sae(write(tmp_path, v6(dtype="float16"), weights))
    assert dictionary.w_enc_DM.dtype == dtype
    base = dictionary.w_enc_DM
    while isinstance(base, np.ndarray):
        assert not base.flags.owndata
        base = base.base
    check_against_reference(dictionary, weights, kind="relu")


def test_prepend_bos_is_read(tmp_path):
    said = [
        folders.load_sae(
            write(tmp_path / str(b), v6(metadata={"prepend_bos": b}))
        ).config.prepend_bos
        for b in (True, None)
    ]
    assert said == [True, None]


@pytest.mark.parametrize(
    "config, message",
    [
        (
            v6(architecture="abstopk"),
            "architecture 'abstopk' is not implemented; known are standard, topk, jumprelu, gated",
        ),
        (v6(architecture="matching_pursuit"), "architecture 'matching_pursuit' is not implemented"),
        (v6(architecture="temporal"), "no SAE of the residual stream, but 1 temporal SAE;"),
        (v6(architecture="skip_transcoder"), "no SAE of the residual stream, but 1 transcoder;"),
        (v6(architecture="jumprelu_transcoder"), "but 1 transcoder;"),
        (
            v6(metadata={"hook_name_out": "blocks.0.hook_mlp_out"}),
            "but 1 transcoder;",
        ),
        (
            v6(normalize_activations="constant_scalar_rescale"),
            "normalize_activations 'constant_scalar_rescale' is not implemented",
        ),
        (v6(activation_fn="tanh-relu"), "activation function 'tanh-relu' is not implemented"),
        (v6(normalize_activations="expected_average_only_in"), "whose factor is not in the file"),
        (v6(normalize_activations=True), "whose factor is not in the file"),
        (v6(normalize_activations="whiten"), "normalize_activations 'whiten' is not implemented"),
        (v6(reshape_activations="hook_z"), "reshape_activations is 'hook_z'"),
        (v6(metadata={"hook_head_index": 3}), "it reads head 3 alone"),
        (v6(architecture="topk", k=0), "needs k in 1..d_sae=16, got 0"),
        (v6(architecture="topk", k=M + 1), "needs k in 1..d_sae=16, got 17"),
        (v6(d_in="6"), "d_in should be int, got '6'"),
        (v6(d_sae=-1), "d_sae should lie in 1..16777216, got -1"),
        (
            v6(d_sae=M + 1),
            r"W_enc has shape \[6, 16\], cfg.json \(d_in=6, d_sae=17\) calls for \[6, 17\]",
        ),
        (v6(apply_b_dec_to_input="yes"), "apply_b_dec_to_input should be bool"),
        ({"architecture": "standard", "hook_name": "hook_embed"}, "cfg.json has no d_in"),
    ],
)
def test_configs_that_are_refused(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        load_saes(write(tmp_path, config, tensors()), MODEL, missing="raw")


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop("b_dec"), "lacks b_dec, which a relu SAE needs"),
        (lambda t: t.update(r_mag=t["b_enc"]), "holds r_mag, for which a relu SAE has no use"),
        (lambda t: t.update(W_dec=t["W_enc"]), r"W_dec has shape \[6, 16\]"),
        (lambda t: t["W_enc"].__setitem__((0, 0), np.nan), "W_enc holds NaN or infinite"),
        (
            lambda t: t.update(scaling_factor=np.full(M, 2, np.float32)),
            "scaling_factor other than one",
        ),
        (
            lambda t: t.update(b_enc=np.zeros(M, np.int32)),
            "b_enc is I32, expected floats",
        ),
    ],
)
def test_tensors_that_are_refused(tmp_path, edit, message):
    weights = tensors()
    edit(weights)
    with pytest.raises(InputError, match=message):
        folders.load_sae(write(tmp_path, v6(), weights))


def test_scaling_factors_of_one_are_nothing(tmp_path):
    folders.load_sae(write(tmp_path, v6(), tensors() | {"scaling_factor": np.ones(M, np.float32)}))


@pytest.mark.parametrize("keep", [0, 5, 60, -4])
def test_truncated_weights(tmp_path, keep):
    path = write(tmp_path) / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        folders.load_sae(tmp_path)


def test_absurd_headers(tmp_path):
    path = write(tmp_path) / "sae_weights.safetensors"
    whole = path.read_bytes()
    beyond = whole.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1)
    for bad in ((2**62).to_bytes(8, "little") + whole[8:], beyond, whole + b"more"):
        path.write_bytes(bad)
        with pytest.raises(InputError, match="is not a whole safetensors file"):
            folders.load_sae(tmp_path)


def test_incomplete_folders(tmp_path):
    (write(tmp_path) / "sae_weights.safetensors").unlink()
    with pytest.raises(InputError, match="has no sae_weights.safetensors"):
        folders.load_sae(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        load_saes(tmp_path / "absent", MODEL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no SAE"):
        load_saes(tmp_path / "empty", MODEL)


def write_set(root, *hooks):
    for i, hook in enumerate(hooks):
        write(root / f"sae{i}", v6(hook), tensors(seed=i))
    return root


def test_boundaries_follow_from_the_hooks(tmp_path):
    root = write_set(tmp_path, "blocks.1.hook_resid_post", "hook_embed", "blocks.1.hook_resid_pre")
    saes = load_saes(root, MODEL)
    assert len(saes) == 3
    for boundary, seed in ((2, 0), (0, 1), (1, 2)):
        np.testing.assert_array_equal(saes[boundary].w_enc_DM, tensors(seed=seed)["W_enc"])
    assert {h.model_name for h in find_saes(root).headers.values()} == {"tiny"}


def test_boundary_0_may_be_missing(tmp_path):
    saes = load_saes(
        write_set(tmp_path, "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"), MODEL
    )
    assert saes[0] is None and saes[1] is not None and saes[2] is not None


def test_one_folder_is_a_set(tmp_path):
    one_block = dataclasses.replace(MODEL, n_blocks=1)
    assert [sae is None for sae in load_saes(write(tmp_path), one_block)] == [True, False]


@pytest.mark.parametrize(
    "hooks, message",
    [
        (["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"], "both for boundary 1"),
        (
            ["blocks.1.hook_resid_post"],
            r"no SAE for boundary 1; expected one after every block, 1\.\.2",
        ),
        (["hook_embed"], "no SAE for boundary 1, 2"),
        (["blocks.2.hook_resid_post"], "is for boundary 3, the model has 2 blocks"),
        (
            ["blocks.0.hook_mlp_out"],
            r"stream, but 1 of blocks.N.hook_mlp_out \(the MLP\); expected",
        ),
        (["blocks.0.hook_resid_mid"], "stream, but 1 of blocks.N.hook_resid_mid; expected"),
        ([""], "but 1 of a hook that it does not name"),
    ],
)
def test_sets_that_are_refused(tmp_path, hooks, message):
    write_set(tmp_path, *hooks)
    for function in (load_saes, folders.check_saes):
        with pytest.raises(InputError, match=message):
            function(tmp_path, MODEL)


def test_width_of_another_model(tmp_path):
    root = write_set(tmp_path, "blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    with pytest.raises(
        InputError,
        match="SAE at boundary 1 has d_in=6, the model has d_model=8; load the SAEs trained",
    ):
        folders.check_saes(root, dataclasses.replace(MODEL, d_model=8))


def test_checking_reads_no_weights(tmp_path):
    weights = tensors()
    weights["W_enc"][0, 0] = np.nan
    write(tmp_path, v6(), weights)
    folders.check_saes(tmp_path, dataclasses.replace(MODEL, n_blocks=1))


def test_fingerprint(tmp_path):
    roots = [
        write(tmp_path / name, weights=tensors(seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    a, b, c = (fingerprint(root, root.iterdir()) for root in roots)
    assert a == b != c
