"""GGUF files of every architecture that is read, written as llama.cpp's converter writes them, and
how they can be wrong. The names of the tensors are those of the gguf package."""

from __future__ import annotations

import dataclasses

import families
import folders
import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from families import LOGITS, MODELS, Made
from tiny import within

from qkattr.errors import InputError
from qkattr.load.models.gguf import half_split, open_gguf
from qkattr.load.models.hf import read_config
from qkattr.load.models.weights import read_params
from qkattr.load.opening import load
from qkattr.load.text.gguf_tokenizer import tokenizer_from_gguf
from qkattr.model.transformer import forward


def changed(name: str, **options) -> Made:
    return dataclasses.replace(MODELS[name], options=MODELS[name].options | options)


WINDOWS = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
#: Options that no metadata carries have the value that llama.cpp gives them.
FILES = {
    "llama": changed("llama2", num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "llama-tied": changed("llama2", tie_word_embeddings=True),
    "qwen2": MODELS["qwen2"],
    "qwen3": MODELS["qwen3"],
    "qwen3-biased": MODELS["qwen3-biased"],
    "gemma2": changed("gemma2", query_pre_attn_scalar=10),
    "gemma2-27b": changed("gemma2", num_hidden_layers=46, query_pre_attn_scalar=8, head_dim=6),
    "gemma3": changed(
        "gemma3-text", num_hidden_layers=7, layer_types=WINDOWS, query_pre_attn_scalar=10
    ),
}


def architecture(name: str) -> str:
    return name.partition("-")[0]


@pytest.fixture(scope="module", params=list(FILES))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    """A model as a Hugging Face folder and, in it, as m.gguf."""
    return write(FILES[name], tmp_path_factory.mktemp(name), architecture(name))


def write(made: Made, folder, kind="llama", edit=lambda writer: None):
    model = families.build(made)
    model.save_pretrained(folder)
    write_gguf(folder / "m.gguf", model, kind, edit)
    return folder


def interleave(w, heads):
    """Rows of each head as pairs (first half, second half): GGUF's order, by a plain loop."""
    out, h = np.empty_like(w), len(w) // heads
    for n in range(heads):
        for pair in range(h // 2):
            out[n * h + 2 * pair] = w[n * h + pair]
            out[n * h + 2 * pair + 1] = w[n * h + h // 2 + pair]
    return out


def write_gguf(path, model, kind="llama", edit=lambda writer: None):
    """The metadata and the tensors of llama.cpp's converter."""
    c, writer = model.config, gguf.GGUFWriter(path, kind)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    head_dim = getattr(c, "head_dim", c.hidden_size // c.num_attention_heads)
    if kind in ("qwen3", "gemma2", "gemma3"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if kind in ("gemma2", "gemma3"):
        writer.add_sliding_window(c.sliding_window)
    if kind == "gemma3":
        writer.add_rope_freq_base(1e6)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    edit(writer)
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == kind), c.num_hidden_layers
    )
    tied = {"lm_head.weight"} if c.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        w, there = tensor.numpy(), names.get_name(name, try_suffixes=(".weight", ".bias"))
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(
            name.split(".")[-2]
        )
        if kind == "llama" and heads:
            w = interleave(w, heads)
        if kind in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            w = w + 1
        if name not in tied:
            writer.add_tensor(there, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_equals_the_hf_folder(folder):
    config, params = folders.load_hf(folder)
    bundle = load(folder / "m.gguf")
    assert bundle.tokenizer is None
    assert bundle.config == config
    assert jax.tree.structure(bundle.params) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(bundle.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-7)  # 1 + w, less 1, is rounded twice


#: `transformers` reads no more of Gemma's metadata than this: the rest is as in every release.
RELEASED = dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
THEIRS = {
    "qwen2": FILES["qwen2"],
    "gemma2": changed("gemma2", head_dim=256, query_pre_attn_scalar=256, **RELEASED),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_equals_transformers_reading_the_same_file(kind, tmp_path):
    """Which reads GGUF with a program of its own."""
    folder = write(THEIRS[kind], tmp_path, kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="m.gguf", attn_implementation="eager"
    )
    with torch.no_grad():
        expected = theirs(torch.tensor(families.PROMPT)[None].long()).logits[0].numpy()
    bundle = load(folder / "m.gguf")
    logits, _ = forward(bundle.params, families.PROMPT, cfg=bundle.config, capture=())
    within(f"{kind}: logits of a GGUF file", logits, expected, LOGITS)


def test_llama3_rotary_factors(tmp_path):
    llama3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    rope = dict(rope_type="llama3", rope_theta=5e5, original_max_position_embeddings=8192, **llama3)
    made = changed("llama2", rope_parameters=rope)
    wavelength = 2 * np.pi * 5e5 ** (np.arange(0, 6, 2) / 6)
    smooth = np.clip((8192 / wavelength - 1) / (4 - 1), 0, 1)
    factors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)

    def given(tensor):
        return lambda w: (w.add_rope_freq_base(5e5), w.add_tensor("rope_freqs.weight", tensor))

    write(made, tmp_path, edit=given(factors))
    assert open_gguf(tmp_path / "m.gguf").config.rotary == read_config(tmp_path).rotary
    write(made, tmp_path, edit=given(factors[::-1].copy()))
    with pytest.raises(InputError, match="rope_freqs.weight is not Llama 3's"):
        open_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", [(gguf.RopeScalingType.LINEAR,), ()])
def test_linear_rotary_scaling(tmp_path, kind):
    """What llama.cpp takes a factor without a type to be, too."""

    def edit(writer):
        [writer.add_rope_scaling_type(k) for k in kind]
        writer.add_rope_scaling_factor(4.0)

    write(MODELS["qwen3"], tmp_path, "qwen3", edit)
    assert open_gguf(tmp_path / "m.gguf").config.rotary.linear == 4.0


@pytest.mark.parametrize(
    "kind, edit, message",
    [
        (
            "llama",
            lambda w: w.add_sliding_window(4),
            "llama.attention.sliding_window=4 in its metadata is not implemented",
        ),
        (
            "llama",
            lambda w: w.add_value_length(4),
            "llama.attention.value_length is 4, its heads have 6",
        ),
        (
            "llama",
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            "rope type 'yarn' is not implemented",
        ),
        (
            "llama",
            lambda w: w.add_tensor("blk.0.other.weight", np.ones(2, np.float32)),
            "holds blk.0.other.weight",
        ),
        (
            "llama",
            lambda w: w.add_tensor("blk.0.attn_q_norm.weight", np.ones(6, np.float32)),
            "holds blk.0.attn_q_norm.weight",
        ),
        ("qwen2", lambda w: w.add_expert_count(8), "qwen2.expert_count=8 in its metadata"),
        (
            "gemma3",
            lambda w: w.add_attn_logit_softcapping(50.0),
            "gemma3.attn_logit_softcapping=50.0 in its metadata",
        ),
        (
            "gemma3",
            lambda w: w.kv_data[0].pop("gemma3.attention.sliding_window"),
            "has no gemma3.attention.sliding_window",
        ),
    ],
)
def test_what_is_not_implemented(tmp_path, kind, edit, message):
    write(FILES[kind if kind != "llama" else "llama-tied"], tmp_path, kind, edit)
    with pytest.raises(InputError, match=message):
        file = open_gguf(tmp_path / "m.gguf")
        read_params(file, file.config)


def test_broken_files(tmp_path):
    write(FILES["llama-tied"], tmp_path)
    path = tmp_path / "m.gguf"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"llama", b"mamba"))
    with pytest.raises(
        InputError, match="architecture is 'mamba'; .* reads llama, qwen2, qwen3, g"
    ):
        open_gguf(path)
    with pytest.raises(InputError, match="no such file"):
        open_gguf(tmp_path / "absent.gguf")
    for part in (b"", b"GGUF", whole[:200], whole[:-500], b"XXXX" + whole[4:]):
        (tmp_path / "part.gguf").write_bytes(part)
        with pytest.raises(InputError, match="part.gguf is not a whole GGUF file"):
            open_gguf(tmp_path / "part.gguf")


def test_half_split_undoes_the_interleaving():
    w = np.arange(24.0).reshape(12, 2)
    np.testing.assert_array_equal(half_split(interleave(w, 2), 2), w)


KINDS = gguf.GGUFValueType
VALUES = [
    (-1, KINDS.INT32), (2**32 - 1, KINDS.UINT32), (float("nan"), KINDS.FLOAT32),
    ("x", KINDS.STRING), (True, KINDS.BOOL), ([1, 2], None), (["a"], None), ([0.5], None),
]  # fmt: skip
VOCABULARY = dict(
    model="llama", tokens=["<unk>", "a", "b", "ab"], scores=[0.0, -1.0, -2.0, -3.0],
    token_type=[2, 1, 1, 1], merges=["a b"],
)  # fmt: skip


def test_any_value_of_any_metadata_is_read_or_refused(tmp_path):
    """Nothing but `InputError` may come of it."""
    keys, path = [], tmp_path / "m.gguf"
    model = families.build(FILES["llama-tied"])
    write_gguf(path, model, edit=lambda w: keys.extend(w.kv_data[0]))
    more = ("model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id")
    keys += ["llama.rope.scaling.factor", *(f"tokenizer.ggml.{key}" for key in more)]
    for key in keys:
        for value, kind in VALUES:

            def edit(writer, key=key, value=value, kind=kind):
                for name, own in VOCABULARY.items():
                    add = writer.add_array if isinstance(own, list) else writer.add_string
                    add(f"tokenizer.ggml.{name}", own)
                writer.kv_data[0].pop(key, None)
                if kind is None:
                    writer.add_array(key, value)
                else:
                    writer.add_key_value(key, value, kind)

            write_gguf(path, model, edit=edit)
            try:
                file = open_gguf(path)
                if tokenizer := tokenizer_from_gguf(file.reader):
                    tokenizer.encode("ab a")
            except InputError as e:
                assert "\n" not in str(e) and len(str(e)) < 500
