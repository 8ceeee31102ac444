"""Configs of every family: old and new spellings, what is refused and why, and hostile values."""

from __future__ import annotations

import copy
import json
import shutil
import tracemalloc

import families
import folders
import jax
import numpy as np
import pytest
import torch
from families import LOGITS
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny import within

from qkattr.api import trace
from qkattr.errors import InputError
from qkattr.export.graph_json import graph_json
from qkattr.export.html import page
from qkattr.kinds import NO_WINDOW
from qkattr.load.models.families import FAMILIES, from_hf
from qkattr.load.models.families.refused import REFUSED
from qkattr.load.opening import load
from qkattr.model.transformer import forward

WINDOWED, GLOBAL = "sliding_attention", "full_attention"


def raw(name: str) -> dict:
    """The config that `transformers` saved."""
    return json.loads((families.saved(name) / "config.json").read_text())


# Spellings ----------------------------------------------------------------------------------------


def older(config: dict) -> dict:
    """A config as `transformers` 4 wrote it."""
    config = copy.deepcopy(config)
    if "text_config" in config:
        return config | {"text_config": older(config["text_config"])}
    config["torch_dtype"] = config.pop("dtype", "float32")
    rope, family = config.pop("rope_parameters", None), config["model_type"]
    if family.startswith("gemma3"):
        config["rope_local_base_freq"] = rope[WINDOWED]["rope_theta"]
        config["sliding_window_pattern"] = 2
        config.pop("_sliding_window_pattern", None)
        rope = rope[GLOBAL]
    config.pop("layer_types", None)
    if rope is None:
        return config
    neox, share = family == "gpt_neox", rope.pop("partial_rotary_factor", 1.0)
    config["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
    if neox or share != 1.0:
        config["rotary_pct" if neox else "partial_rotary_factor"] = share
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    return config


@pytest.mark.parametrize("name", families.MODELS)
def test_older_spellings_say_the_same(name):
    assert from_hf(older(raw(name))) == from_hf(raw(name))


#: What published configs leave to the defaults of their family, in their own spelling.
PUBLISHED = {
    "gpt2": (
        """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024,
        "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
        "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
        "summary_type": "cls_index", "summary_use_proj": true, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}}""",
        dict(d_mlp=3072, head_dim=64, tied=True, attention_bias=False),
    ),
    "pythia": (
        """{"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0,
        "hidden_act": "gelu", "hidden_size": 512, "initializer_range": 0.02,
        "intermediate_size": 2048, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
        "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": false,
        "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": true,
        "use_parallel_residual": true, "vocab_size": 50304}""",
        dict(head_dim=64, tied=False, attention_bias=True),
    ),
    "qwen2.5": (
        """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896,
        "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": true,
        "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}""",
        dict(head_dim=64, windows=(NO_WINDOW,) * 24, attention_bias=True),
    ),
    "gemma3-4b": (
        """{"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
        "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
        "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"}}""",
        dict(
            n_heads=8, n_kv_heads=4, head_dim=256, vocab=262208, tied=True,
            windows=tuple(NO_WINDOW if (b + 1) % 6 == 0 else 1024 for b in range(34)),
        ),
    ),
    "gemma2-2b": (
        """{"architectures": ["Gemma2ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2,
        "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0,
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2",
        "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32",
        "transformers_version": "4.42.4", "use_cache": true, "vocab_size": 256000}""",
        dict(final_softcap=30.0, windows=(4096, NO_WINDOW) * 13, tied=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_in_the_form_of_published_ones(name):
    text, expected = PUBLISHED[name]
    config = from_hf(json.loads(text))
    assert {field: getattr(config, field) for field in expected} == expected
    if name == "gemma3-4b":
        assert (config.rotary.base, config.rotary.linear) == (1e6, 8.0)
        assert config.local_rotary is not None
        assert (config.local_rotary.base, config.local_rotary.linear) == (1e4, 1.0)


# Names of tensors ---------------------------------------------------------------------------------


def renamed(folder, target, rename, extra=()):
    """A copy of a model folder under other tensor names, with tensors added."""
    shutil.copytree(folder, target)
    tensors = {rename(n): w for n, w in load_file(folder / "model.safetensors").items()}
    save_file(tensors | dict(extra), target / "model.safetensors")
    return target


def assert_equal(folder, other):
    for ours, theirs in zip(
        *map(jax.tree.leaves, (folders.load_hf(folder), folders.load_hf(other))), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_gpt2_names_without_their_prefix_and_with_masks(tmp_path):
    folder, mask = families.saved("gpt2"), np.ones((1, 1, 4, 4), np.float32)
    extra = {"h.0.attn.bias": mask, "h.1.attn.masked_bias": mask[0, 0, 0, :1]}
    bare = renamed(folder, tmp_path / "m", lambda n: n.removeprefix("transformer."), extra.items())
    assert_equal(folder, bare)


def test_neox_buffers_are_ignored(tmp_path):
    folder, mask = families.saved("pythia"), np.ones((1, 1, 4, 4), np.float32)
    at = "gpt_neox.layers.1.attention"
    extra = {f"{at}.bias": mask, f"{at}.masked_bias": mask, f"{at}.rotary_emb.inv_freq": mask}
    assert_equal(folder, renamed(folder, tmp_path / "m", lambda n: n, extra.items()))


@pytest.mark.parametrize("stem", ["model.language_model.", "language_model.model."])
def test_both_prefixes_of_multimodal_gemma(tmp_path, stem):
    def rename(name):
        for prefix in ("model.language_model.", "language_model.model."):
            if name.startswith(prefix):
                return stem + name.removeprefix(prefix)
        return name

    folder = families.saved("gemma3")
    names = load_file(folder / "model.safetensors")
    assert any("vision_tower" in n for n in names) and any("projector" in n for n in names)
    assert_equal(folder, renamed(folder, tmp_path / "m", rename))


def test_text_and_multimodal_gemma_are_one_model(tmp_path):
    """The text part under the names and the config of a text model gives the same logits."""
    folder = families.saved("gemma3")
    names = load_file(folder / "model.safetensors")
    stem = next(n for n in names if n.endswith("embed_tokens.weight")).removesuffix(
        "embed_tokens.weight"
    )
    text = {"model." + n.removeprefix(stem): w for n, w in names.items() if n.startswith(stem)}
    (tmp_path / "config.json").write_text(json.dumps(raw("gemma3")["text_config"]))
    save_file(text, tmp_path / "model.safetensors")
    config, params = folders.load_hf(tmp_path)
    logits, _ = forward(params, families.PROMPT, cfg=config, capture=())
    within("text of gemma3", logits, families.reference("gemma3").logits, LOGITS)


def test_a_tensor_that_the_family_does_not_have_is_named(tmp_path):
    folder = families.saved("qwen2")
    extra = {"model.layers.0.self_attn.o_proj.bias": np.ones(36, np.float32)}
    with pytest.raises(InputError, match=r"holds model\.layers\.0\.self_attn\.o_proj\.bias"):
        folders.load_hf(renamed(folder, tmp_path / "m", lambda n: n, extra.items()))


def test_the_scale_of_gemmas_embedding_is_rounded_to_the_type_of_the_weights():
    for dtype, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        scale = folders.load_hf(families.saved("gemma2"), dtype)[1].embed_scale
        assert float(scale) == torch.tensor(40**0.5).to(kind).item()


# Without effect -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, change",
    [
        ("gemma2", dict(sliding_window_size=4096, hidden_act="relu", use_bfloat16=False)),
        ("gpt2", dict(n_special=0, predict_special_tokens=True, _num_labels=1, output_past=True)),
        ("llama2", dict(torchscript=True, bad_words_ids=None, forced_bos_token_id=None)),
        ("llama2", dict(num_return_sequences=3, no_repeat_ngram_size=2, suppress_tokens=[1])),
        ("pythia", dict(partial_rotary_factor=0.9, attention_probs_dropout_prob=0.5)),
        ("qwen3", dict(a_dropout_of_its_own=0.25, path_pdrop=1)),
        ("mistral", dict(something_new=None)),
        ("llama2", dict(activation_function="silu", n_embd=36, hidden_activation="silu")),
        ("gpt2", dict(hidden_size=36, n_vocab=50, num_attention_heads=6)),
    ],
)
def test_what_changes_nothing_is_passed_over(name, change):
    """By the table, because it is null, a dropout rate, or says the same once more."""
    assert from_hf(raw(name) | change) == from_hf(raw(name))


@pytest.mark.parametrize(
    "name, absent",
    [
        ("llama2", dict(max_position_embeddings=("context", 2048))),
        ("gpt2", dict(n_positions=("context", 1024), n_layer=("n_blocks", 12))),
        ("qwen2", dict(max_position_embeddings=("context", 32768), vocab_size=("vocab", 151936))),
        ("gemma2", dict(head_dim=("head_dim", 256), num_key_value_heads=("n_kv_heads", 4))),
        ("phi3", dict(intermediate_size=("d_mlp", 8192), tie_word_embeddings=("tied", False))),
    ],
)
def test_an_absent_attribute_has_the_default_of_transformers(name, absent):
    config = {k: v for k, v in raw(name).items() if k not in absent}
    config |= dict(num_attention_heads=4) if name == "gemma2" else {}
    read = from_hf(config)
    for ours, value in absent.values():
        assert getattr(read, ours) == value


def test_an_accepted_attribute_is_passed_over_and_named(tmp_path):
    config = raw("llama2") | dict(novel=3, quantization_config={"bits": 4})
    assert from_hf(config, ["novel", "quantization_config"]) == from_hf(raw("llama2"))
    with pytest.raises(InputError, match="quantization_config is .*--accept quantization_config"):
        from_hf(config, ["novel"])
    with pytest.raises(InputError, match="novel=3.*--accept novel"):
        from_hf(config, ["quantization_config"])
    with pytest.raises(InputError, match="accept names 'other', which config.json does not have"):
        from_hf(config, ["novel", "quantization_config", "other"])
    folder = shutil.copytree(families.saved("gemma3"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["novel"] = [1]
    (folder / "config.json").write_text(json.dumps(config))
    bundle = load(folder, accept=["novel"])
    assert bundle.accepted == ("novel",)
    (note,) = bundle.notes
    assert note.startswith("config.json has novel=[1], which qkattr does not implement")
    result = trace(bundle, [1, 2, 3], qk=0)
    header = graph_json(result)["qkattr"]["settings"]
    assert header["accepted"] == ["novel"] and header["notes"] == [note]
    assert f"Note: <bdi>{note}</bdi>" in page(result)


# Refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_families_without_a_qk_score_or_with_experts_are_refused_by_name(family):
    assert family not in FAMILIES
    with pytest.raises(InputError, match=f"model_type '{family}' is refused: .*(QK score|expert)"):
        from_hf({"model_type": family})


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("llama2", dict(model_type="gpt9"), "model_type is 'gpt9'; qkattr implements gemma2"),
        ("llama2", dict(model_type=["x"]), "model_type is \\['x'\\]"),
        ("llama2", dict(novel=3), "has novel=3, which qkattr does not know"),
        (
            "llama2",
            dict(partial_rotary_factor=0.5),
            "partial_rotary_factor is .*which qkattr does not implement",
        ),
        ("llama2", dict(hidden_act="xielu"), "hidden_act 'xielu' is not implemented"),
        ("llama2", dict(head_dim=7), "heads of 7 dimensions cannot be turned in pairs"),
        ("llama2", dict(num_key_value_heads=4), "6 heads over 4 key/value heads"),
        ("llama2", dict(rms_norm_eps=-1), "rms_norm_eps should be a positive number"),
        ("llama2", dict(rope_scaling=dict(type="yarn", factor=4.0)), "and they differ"),
        ("llama2", dict(rope_parameters=dict(rope_type="yarn")), "rope type 'yarn' is not impl"),
        ("llama2", dict(rope_parameters=dict(factor=2.0)), "parameters factor are not known"),
        ("llama2", dict(rope_parameters=dict(rope_type="linear", factor="x")), "be a number"),
        ("llama3.2", dict(rope_parameters=dict(rope_type="llama3")), "factor should be a number"),
        (
            "llama2",
            dict(quantization_config={}),
            "quantization_config is .*which qkattr does not implement",
        ),
        ("llama2", dict(sliding_window=4), "sliding_window is 4"),
        ("pythia", dict(num_key_value_heads=2), "has num_key_value_heads=2"),
        (
            "gpt2",
            dict(add_cross_attention=True),
            "add_cross_attention is .*which qkattr does not implement",
        ),
        ("qwen2", dict(layer_types=["linear_attention"] * 2), "no QK score that it knows"),
        ("qwen2", dict(layer_types=[WINDOWED] * 2), "there is no sliding_window"),
        ("qwen2", dict(layer_types=[GLOBAL] * 3), "has 3 entries for 2 blocks"),
        ("qwen2", dict(layer_types=[["x"]] * 2), "layer_types holds"),
        (
            "gemma2",
            dict(sliding_window_pattern=3),
            "sliding_window_pattern is .*which qkattr does not implement",
        ),
        ("gemma2", dict(sliding_window=None), "has no sliding_window"),
        (
            "gemma3-text",
            dict(attn_logit_softcapping=9.0),
            "attn_logit_softcapping is .*which qkattr does not implement",
        ),
        ("gemma3-text", dict(use_bidirectional_attention=True), "use_bidirectional_attention is"),
        ("gemma3-text", dict(rope_parameters={GLOBAL: 3}), "should be an object"),
        ("gemma3", dict(text_config=dict(model_type="llama")), "text_config is of type 'llama'"),
        ("gemma3", dict(tie_word_embeddings=False), "differs from that of text_config"),
        ("phi3", dict(rope_parameters=dict(rope_type="longrope")), "rope type 'longrope' is not"),
        ("phi3", dict(attention_bias=True), "attention_bias is .*not implement"),
    ],
)
def test_what_is_refused_is_named(name, change, message):
    with pytest.raises(InputError, match=message) as error:
        from_hf(raw(name) | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gpt2", "pythia", "llama2", "gemma3"])
@pytest.mark.parametrize("blocks", [10**6, 10**30, 0, -1])
def test_a_million_blocks_are_one_line_and_no_memory(name, blocks):
    config = raw(name)
    inner = config.get("text_config", config)
    key = "n_layer" if name == "gpt2" else "num_hidden_layers"
    inner[key] = blocks
    tracemalloc.start()
    with pytest.raises(InputError, match=f"{key} should lie in 1..4096, got {blocks}"):
        from_hf(config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


SCALARS = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text()
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_value_of_any_attribute_is_read_or_refused(data):
    """Nothing but `InputError` may come of a wrong config."""
    config = raw(data.draw(st.sampled_from(sorted(families.MODELS))))
    target = config
    if nested := [k for k in config if isinstance(config[k], dict) and config[k]]:
        if data.draw(st.booleans()):
            target = config[data.draw(st.sampled_from(nested))]
    inside = [k for k in target if isinstance(target[k], dict) and target[k]]
    if inside and data.draw(st.booleans()):
        target = target[data.draw(st.sampled_from(inside))]
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(JSON)
    try:
        from_hf(config)
    except InputError as e:
        assert "\n" not in str(e) and len(str(e)) < 500
