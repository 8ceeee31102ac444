"""The real model's prompts, and an independent copy of the model in `transformers`."""

from __future__ import annotations

import functools

import gguf
import numpy as np
import tiny
import torch
import transformers

PROMPTS = {
    "sally": "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt",
    "mary": "Is it so?\n\nWhen Mary and John went to the store, John gave a drink to",
}


@functools.cache
def case(bundle, name: str) -> tiny.Case:
    ids = np.asarray(bundle.tokenize(PROMPTS[name])[0], np.int32)
    return tiny.case_of(bundle.params, bundle.config, ids, bundle.dictionaries)


def _half_split(w: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the rotary pairs of a head: its row 2i is row i of the checkpoint,
    2i + 1 is row i + size/2.
    """
    size = w.shape[0] // heads
    out = np.empty_like(w)
    for head in range(heads):
        rows = w[head * size : (head + 1) * size]
        out[head * size : head * size + size // 2] = rows[0::2]
        out[head * size + size // 2 : (head + 1) * size] = rows[1::2]
    return out


@functools.cache
def transformers_model() -> transformers.LlamaForCausalLM:
    """The model as `transformers` computes it, its weights read from the GGUF
    without the library's reader.
    """
    from qkattr.load.smollm2 import cached_file  # only where the file is

    names = dict(
        attn_norm="input_layernorm", ffn_norm="post_attention_layernorm", attn_q="self_attn.q_proj",
        attn_k="self_attn.k_proj", attn_v="self_attn.v_proj", attn_output="self_attn.o_proj",
        ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj",
    )  # fmt: skip
    state = {}
    for tensor in gguf.GGUFReader(cached_file()).tensors:
        w = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        parts = tensor.name.removesuffix(".weight").split(".")
        if parts[-1] in ("attn_q", "attn_k"):
            w = _half_split(w, 9 if parts[-1] == "attn_q" else 3)
        where = {"token_embd": "embed_tokens", "output_norm": "norm"}.get(parts[0])
        where = where or f"layers.{parts[1]}.{names[parts[2]]}"
        state[f"model.{where}.weight"] = torch.from_numpy(w)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=100000.0), attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(
        config
    )  # its buffer is not in a state dict
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()
