"""Tiny random `transformers` models of every family, saved as folders and read by the loader.

Sizes are odd on purpose: heads are not d_model / heads wide where the family allows it, three query
heads share a key head or all do, windows are shorter than the prompt. Nothing is left at the value
it is initialised to, so that a bias or a `1 + w` that is passed over shows.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import transformers

from qkattr.load.opening import load

LOGITS = 1e-4  # float32 against float32, three blocks, logits of order 10

#: Longer than every window below.
PROMPT = np.random.default_rng(5).integers(1, 50, 11).astype(np.int32)
V = 50

_SIZES = dict(
    hidden_size=36,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=V,
    max_position_embeddings=32,
    pad_token_id=None,
    bos_token_id=1,
    eos_token_id=2,
)
_GPT2 = dict(
    n_embd=36,
    n_head=6,
    n_layer=2,
    n_positions=32,
    vocab_size=V,
    n_inner=44,
    bos_token_id=1,
    eos_token_id=2,
)
_GEMMA3 = dict(
    num_hidden_layers=6,
    head_dim=10,
    query_pre_attn_scalar=7,
    sliding_window=4,
    layer_types=["sliding_attention", "full_attention"] * 3,
    rope_parameters=dict(
        full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
        sliding_attention=dict(rope_type="default", rope_theta=1e4),
    ),
)
_VISION = dict(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)


@dataclasses.dataclass(frozen=True)
class Made:
    """How a `transformers` model is made: the names of its classes, the options of its config."""

    config: str
    model: str
    options: dict[str, Any]


def _made(name: str, model: str = "ForCausalLM", /, **options: Any) -> Made:
    return Made(f"{name}Config", f"{name.removesuffix('Text')}{model}", _SIZES | options)


def _gpt2(**options: Any) -> Made:
    return Made("GPT2Config", "GPT2LMHeadModel", _GPT2 | options)


def _neox(share: float, **options: Any) -> Made:
    rope = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=share)
    sizes = {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}
    return Made("GPTNeoXConfig", "GPTNeoXForCausalLM", sizes | dict(rope_parameters=rope) | options)


MODELS = {
    "gpt2": _gpt2(),
    "gpt2-by-depth": _gpt2(
        num_hidden_layers=3, scale_attn_by_inverse_layer_idx=True
    ),
    "gpt2-unscaled-relu": _gpt2(
        scale_attn_weights=False, activation_function="relu", n_inner=None, n_head=4
    ),
    "pythia": _neox(0.5),
    "neox-sequential": _neox(
        1.0, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True
    ),
    "llama2": _made("Llama", num_key_value_heads=6),
    "llama3.2": _made("Llama", head_dim=10, rope_parameters=_LLAMA3, tie_word_embeddings=True),
    "mistral": _made("Mistral", head_dim=8, num_key_value_heads=1, sliding_window=5),
    "qwen2": _made("Qwen2", tie_word_embeddings=True),
    "qwen2-windowed": _made(
        "Qwen2",
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    ),
    "qwen3": _made("Qwen3", head_dim=10, num_key_value_heads=3),
    "qwen3-biased": _made("Qwen3", head_dim=6, num_key_value_heads=1, attention_bias=True),
    "gemma2": _made(
        "Gemma2",
        hidden_size=40,
        num_attention_heads=5,
        num_key_value_heads=5,
        num_hidden_layers=3,
        head_dim=10,
        query_pre_attn_scalar=5,
        sliding_window=4,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3-text": _made("Gemma3Text", **_GEMMA3),
    "gemma3": Made(
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        dict(text_config=_SIZES | _GEMMA3, vision_config=_VISION, mm_tokens_per_image=4,
             image_token_index=3, boi_token_index=4, eoi_token_index=5),
    ),
    "olmo2": _made("Olmo2", num_attention_heads=3, num_key_value_heads=3),
    "olmo2-grouped": _made("Olmo2", num_key_value_heads=2, attention_bias=True),
    "phi3": _made("Phi3", sliding_window=4),
    "phi3-partial": _made(
        "Phi3",
        num_attention_heads=3,
        num_key_value_heads=1,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.75),
    ),
}  # fmt: skip


def build(made: Made, seed: int = 0) -> torch.nn.Module:
    """A model in eager attention, with everything in it random."""
    torch.manual_seed(seed)
    config = getattr(transformers, made.config)(**made.options)
    config._attn_implementation = "eager"
    model = getattr(transformers, made.model)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@functools.cache
def random_model(name: str) -> torch.nn.Module:
    return build(MODELS[name], sorted(MODELS).index(name))


@functools.cache
def saved(name: str) -> Path:
    """The folder of a family's model. Not to be written to: copy it."""
    folder = Path(tempfile.mkdtemp(prefix=name))
    random_model(name).save_pretrained(folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Reference:
    """What `transformers` computes in float32.

    logits: `[T, V]`. patterns, scores: `[L, N, T, S]`, scores after the scale, before the softcap.
    """

    logits: np.ndarray
    patterns: np.ndarray
    scores: np.ndarray


@functools.cache
def reference(name: str) -> Reference:
    """The prompt through the family's own code; scores of the queries and keys it attends with."""
    model, scores = random_model(name), []
    source: Any = sys.modules[type(model).__module__]

    def keep_scores(module, query, key, value, mask, **options):
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores.append((query @ keys.mT)[0].numpy() * options["scaling"])
        return eager(module, query, key, value, mask, **options)

    eager, source.eager_attention_forward = source.eager_attention_forward, keep_scores
    try:
        with torch.no_grad():
            ids = torch.tensor(PROMPT)[None].long()
            out = model.forward(ids, output_attentions=True)
    finally:
        source.eager_attention_forward = eager
    patterns = np.stack([a[0].numpy() for a in out.attentions])
    return Reference(out.logits[0].numpy(), patterns, np.stack(scores))


@functools.cache
def case(name: str) -> tiny.Case:
    """The model as the loader reads it, with a prompt that went through it, and random
    dictionaries at every other boundary."""
    bundle = load(saved(name))
    d, n_blocks = bundle.config.d_model, bundle.config.n_blocks
    saes = [
        tiny.dictionary(b, activation="topk", d=d) if b % 2 else None for b in range(n_blocks + 1)
    ]
    return tiny.case_of(bundle.params, bundle.config, PROMPT, tuple(saes))
