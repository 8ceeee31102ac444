"""The published SAE sets written with small random weights: what each SAE is taken for, or the line
that refuses it.

Names of files, folders and tensors and all keys of configs are the published ones, also of configs
of which a part was seen; only the sizes are others. Expected values are written out here, from the
facts beside.
"""

import json
import math
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from test_published_saes import BARE, SETS, filled, weights, whole

from qkattr.errors import InputError
from qkattr.load.dictionaries import find_saes
from qkattr.sources.dictionary import reconstruct

D, M = 8, 256
TYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}

#: Boundary, activation, k, normalisation, whether b_dec is subtracted, whether text had a BOS.
READ = {
    "deepseek-r1-qresearch": (20, "relu", None, "none", False, None),
    "gemma-2b-it-res-jb": (13, "relu", None, "none", False, True),
    "gemma-scope-2-resid-post": (18, "jumprelu", None, "none", False, True),
    "gemma-scope-2-resid-post-all": (18, "jumprelu", None, "none", False, True),
    "gemma-scope-27b-pt-res": (11, "jumprelu", None, "none", False, True),
    "gemma-scope-2b-pt-res": (1, "jumprelu", None, "none", False, True),
    "gemma-scope-9b-pt-res": (1, "jumprelu", None, "none", False, True),
    "goodfire-llama-3.1-8b": (20, "relu", None, "none", False, None),
    "gpt2-small-res-jb": (8, "relu", None, "none", True, True),
    "gpt2-small-res-jb-feature-splitting": (8, "relu", None, "none", True, True),
    "gpt2-small-res-jb-v5": (1, "relu", None, "none", True, True),
    "gpt2-small-resid-post-v5-32k": (12, "topk", 32, "layer_norm", True, False),
    "llama-3.1-8b-instruct-andyrdt": (4, "jumprelu", None, "none", True, None),
    "llama-scope-lxr-32x": (25, "jumprelu", None, "none", False, True),
    "llama-scope-lxr-8x": (14, "jumprelu", None, "none", False, True),
    "llama-scope-r1-distill": (13, "jumprelu", None, "none", False, None),
    "mistral-7b-layer16-tylercosgrove": (16, "topk", 128, "layer_norm", True, False),
    "mistral-7b-res-wg": (8, "relu", None, "none", True, True),
    "qwen-coder-32b-adamkarvonen": (51, "jumprelu", None, "none", True, None),
    "qwen-scope": (1, "topk", 50, "none", False, None),
    "sae-llama-3-8b-32x": (1, "topk", 192, "none", True, None),
    "sae-pythia-160m-32k": (1, "topk", 32, "none", True, None),
    "sae-pythia-70m-32k": (1, "topk", 16, "none", True, None),
    "saebench-gemma-2-2b-topk": (13, "topk", 20, "none", True, None),
    "saelens-4-standard": (7, "relu", None, "none", False, True),
    "saelens-6-jumprelu": (23, "jumprelu", None, "none", True, True),
    "saelens-on-transformers": (8, "relu", None, "none", True, True),
}
#: Sets of whose config too little was seen.
LITTLE = {"llama-3-8b-it-res-jh", "pythia-410m-batchtopk-sgovil5"}
NONE = "holds no SAE of the residual stream, but "
MLP, ATTENTION = r"\(the MLP\)", r"\(attention\)"
REFUSED = {
    "clt-llama-3.2-1b-524k": NONE + "1 cross-layer transcoder;",
    "dictionary-learning-diff": "has no submodule_name, nor do the folders' names",
    "dictionary-learning-mlp-unsaid": "has no submodule_name, nor do the folders' names",
    "dictionary-learning-no-submodule": 'give hook = "resid_post" in qkattr.toml if that is so',
    "gemma-scope-2-attn-out": NONE + f"1 of model.layers.N.self_attn.o_proj.input {ATTENTION};",
    "gemma-scope-2-clt": NONE + "1 cross-layer transcoder;",
    "gemma-scope-2-crosscoder": NONE + "1 crosscoder;",
    "gemma-scope-2-mlp-out":
        NONE + f"1 of model.layers.N.post_feedforward_layernorm.output {MLP};",
    "gemma-scope-2-transcoder": NONE + "1 transcoder;",
    "gemma-scope-2b-pt-att": NONE + f"1 of blocks.N.attn {ATTENTION};",
    "gemma-scope-2b-pt-mlp": NONE + f"1 of blocks.N.mlp {MLP};",
    "gemma-scope-2b-pt-transcoders": NONE + "1 transcoder;",
    "gpt2-small-attn-out-v5-128k": NONE + f"1 of blocks.N.hook_attn_out {ATTENTION};",
    "gpt2-small-hook-z-kk": "holds no SAE",
    "gpt2-small-mlp-tm": NONE + f"1 of blocks.N.hook_mlp_out {MLP};",
    "gpt2-small-resid-mid-v5-32k": NONE + "1 of blocks.N.hook_resid_mid;",
    "llama-scope-2-transcoder": NONE + "1 transcoder;",
    "llama-scope-lxa": NONE + f"1 of blocks.N.hook_attn_out {ATTENTION};",
    "llama-scope-lxm": NONE + f"1 of blocks.N.hook_mlp_out {MLP};",
    "llama-scope-lxtc": NONE + "1 transcoder;",
    "pythia-70m-deduped-att-sm": NONE + f"1 of blocks.N.hook_attn_out {ATTENTION};",
    "sae-llama-3.2-1b-32x-huypn16": "cfg.json has SAELens's fields and the weights are sparsify's",
    "saelens-4-topk-mlp-out": NONE + f"1 of blocks.N.hook_mlp_out {MLP};",
    "saelens-6-standard-mlp-out": NONE + f"1 of blocks.N.hook_mlp_out {MLP};",
    "saelens-arena-transcoder": NONE + "1 of blocks.N.ln2.hook_normalized;",
    "saelens-expected-average": "whose factor is not in the file; give it in norm_factors",
    "skip-transcoder-llama-3.2-1b-131k": NONE + "1 transcoder;",
    "transcoders-llama-3.2-1b-mntss": NONE + "1 transcoder;",
    "transcoders-qwen3-mwhanna": NONE + "1 transcoder;",
}  # fmt: skip


def seen(facts):
    """Configs by path, those of which a part was seen too, if there are no whole ones."""
    some = {path.split(" (")[0]: config for path, config in facts["config"].items()}
    return whole(facts) or some


WRITTEN = sorted(
    name
    for name, facts in SETS.items()
    if weights(facts) and (seen(facts) or facts["format"] in BARE)
)


def sizes(facts):
    """The published widths and what stands for them here."""
    shapes = [shape for tensors in weights(facts).values() for _, shape in tensors.values()]
    wide = max(size for shape in shapes for size in shape)
    narrow = {size for shape in shapes for size in shape} - {wide}
    return {wide: M} | dict.fromkeys(narrow, D)


def shrunk(value, known):
    if isinstance(value, dict):
        fewer = {"expansion_factor": M // D}
        return {n: fewer[n] if n in fewer else shrunk(v, known) for n, v in value.items()}
    return known.get(value, value) if type(value) is int else value


def put_tensors(path, tensors, known, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {}
    for name, (kind, shape) in tensors.items():
        shape = [known[size] for size in shape]
        if kind == "I64":
            made[name] = np.full(shape, 3)
            continue
        values = 0.3 * rng.normal(size=shape)
        if "threshold" in name and "log" not in name or name.startswith("dataset_average"):
            values = 0.5 + abs(values)
        made[name] = np.asarray(values, TYPES[kind])
    if path.suffix == ".safetensors":
        save_file({n: np.ascontiguousarray(t).reshape(t.shape) for n, t in made.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **made)
    else:
        torch.save({n: torch.tensor(np.asarray(t)) for n, t in made.items()}, path)


def write(root, facts):
    known, rng = sizes(facts), np.random.default_rng(0)
    for path, config in (seen(facts) or {facts["files"][0]: None}).items():
        folder, _, name = path.rpartition("/")
        beside = facts["other_hooks"] if facts["expect"] == "reads" and "{L}" in path else ()
        for template in (folder, *beside):
            at = root / filled(template, facts)
            for file, tensors in weights(facts).items():
                file = filled(re.sub(r"\{\d\.\.\d\}", "0", file), facts)
                put_tensors(at / file, tensors, known, rng)
            if config is not None:
                (at / name).write_text(json.dumps(shrunk(config, known)))
    return root


@pytest.fixture
def root(name, tmp_path):
    facts = SETS[name]
    return write(tmp_path / (facts["set"] or name).split("/")[-1], facts)


def test_every_set_that_can_be_written_is_expected():
    assert set(WRITTEN) == {*READ, *REFUSED, *LITTLE}
    assert all(SETS[name]["expect"] == "reads" for name in READ)
    assert all(SETS[name]["expect"] == "refused" for name in REFUSED)


@pytest.mark.parametrize("name", READ)
def test_what_is_read(name, root):
    facts, found = SETS[name], find_saes(root)
    boundary, activation, k, normalize, subtract, bos = READ[name]
    header = found.headers[boundary]
    config = header.config
    got = (config.activation, config.k, config.normalize, config.subtract_b_dec, config.prepend_bos)
    assert got == (activation, k, normalize, subtract, bos)
    assert (header.d_in, header.d_sae) == (D, M)
    assert bos is None or facts["prepend_bos"] in (None, bos)
    assert header.model_name in (None, *str(facts["model"]).split(), *models(facts))
    left_out = [hook for hook in facts["other_hooks"] if "{L}" in str(list(seen(facts)))]
    assert len(found.notes) == bool(left_out)
    assert all(note.startswith(f"{len(left_out)} SAE") for note in found.notes)
    sae = found.read(boundary)[boundary]
    acts, rebuilt = reconstruct(sae, np.random.default_rng(1).normal(size=(5, D)).astype("f4"))
    assert np.isfinite(acts).all() and np.isfinite(rebuilt).all()
    active = (np.asarray(acts) > 0).sum(1)
    assert active.any() and (k is None or active.max() <= k)


def models(facts):
    """What the configs call the model."""
    text = json.dumps(seen(facts))
    return re.findall(r'"(?:model_name|lm_name|base_model)": "([^"]*)"', text)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, root):
    with pytest.raises(InputError, match=REFUSED[name]) as caught:
        find_saes(root)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["llama-scope-lxr-8x", "llama-scope-lxr-32x"])
def test_llama_scopes_threshold_is_of_what_a_feature_writes(name, root):
    (said,) = whole(SETS[name]).values()
    header = next(iter(find_saes(root).headers.values()))
    norm = said["dataset_average_activation_norm"]["in"]
    np.testing.assert_allclose(header.constants["factor"], math.sqrt(D) / norm, rtol=1e-6)
    threshold = said["jump_relu_threshold"] * math.sqrt(D) / norm
    np.testing.assert_allclose(header.constants["threshold_M"], threshold, rtol=1e-6)
    assert header.config.rescale_by_decoder_norm and header.l0 == 50


@pytest.mark.parametrize("name", ["saelens-expected-average"])
def test_a_factor_that_only_a_registry_has_may_be_stated(name, root):
    settings = '[norm_factors]\n"blocks.1.hook_resid_post" = 0.3\n'
    (root / "qkattr.toml").write_text(settings)
    assert float(find_saes(root).read(2)[2].factor) == np.float32(0.3)


@pytest.mark.parametrize("name", ["mistral-7b-res-wg"])
def test_a_normalisation_that_only_a_registry_has_may_be_stated(name, root):
    (root / "qkattr.toml").write_text(
        f'normalize_activations = "{SETS[name]["settings"]["normalize"]}"\n'
    )
    assert find_saes(root).headers[8].config.normalize == "constant_norm_rescale"


@pytest.mark.parametrize("name", ["dictionary-learning-no-submodule"])
def test_a_hook_that_no_file_says_may_be_stated(name, root):
    (root / "qkattr.toml").write_text('hook = "resid_post"\n')
    assert list(find_saes(root).headers) == [2]
