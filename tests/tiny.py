"""Small random models and dictionaries: Hugging Face folders, and "houses",
one for each way of building a block.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import folders
import jax
import numpy as np
import torch
import transformers

from qkattr.config import BlockConfig, ModelConfig, Rotary
from qkattr.kinds import NO_WINDOW
from qkattr.model.transformer import forward
from qkattr.sources.components import Components
from qkattr.sources.dictionary import Dictionary, DictionaryConfig
from qkattr.sources.prompt import decompose_prompt
from qkattr.types import BlockWeights, Norm, Params, Trace

# Head size is not d_model / heads, and no two sizes are equal, so that a mixed-up axis cannot go
# unseen.
D, N, K, H, F, V, L, T = 20, 4, 2, 6, 28, 24, 3, 9

_log = logging.getLogger("figures")


def within(what: str, actual, expected, tolerance: float, scale=1.0) -> None:
    """Assert that |actual - expected| <= tolerance * scale everywhere,
    and log the worst (see with --log-file).
    """
    error = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    worst = float(np.max(error / np.maximum(scale, 1e-30), initial=0.0))
    _log.info("%s: worst %.2e, allowed %.0e", what, worst, tolerance)
    assert worst <= tolerance, f"{what}: worst relative error {worst:.3e}, allowed {tolerance:.0e}"


#: Options of `transformers` configs, by what they exercise.
HF_MODELS = {
    "mha": dict(num_key_value_heads=4),
    "gqa": dict(num_key_value_heads=2),
    "mqa": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "head_dim": dict(head_dim=10),
    "biases": dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama3": dict(
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=10000.0,
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        )
    ),
    "mistral": dict(family="mistral", sliding_window=4),
    "mistral_global": dict(family="mistral", sliding_window=None),
}


def hf_model(name: str):
    """A random `transformers` model in which nothing is left at the value it is initialised to."""
    options = dict(HF_MODELS[name])
    mistral = options.pop("family", "llama") == "mistral"
    config_class = transformers.MistralConfig if mistral else transformers.LlamaConfig
    model_class = transformers.MistralForCausalLM if mistral else transformers.LlamaForCausalLM
    sizes = dict(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=L,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=V,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = model_class(
        config_class(**(sizes | options | dict(attn_implementation="eager")))
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def hf_params(name: str, folder) -> tuple[torch.nn.Module, ModelConfig, Params]:
    """The model, and what the library's loader makes of it."""
    model = hf_model(name)
    model.save_pretrained(folder)
    return model, *folders.load_hf(folder)


@dataclasses.dataclass(frozen=True)
class House:
    """How a family builds its block; the names follow `BlockWeights` and `BlockConfig`."""

    norm: str = "rms"
    pre: bool = True
    post: bool = False
    qk_norm: bool | str = False  # "wide": of all heads together
    bias: bool = False
    gated: bool = True
    activation: str = "silu"
    softcap: float | None = None
    parallel: bool = False
    rotary: int = H // 2
    windows: tuple[int, ...] = (NO_WINDOW,) * L
    positions: bool = False
    tied: bool = True
    kv_heads: int = K


HOUSES = {
    "llama": House(),
    "mha_biases": House(bias=True, kv_heads=N, tied=False),
    "mqa_ungated_relu": House(gated=False, activation="relu", kv_heads=1, windows=(3,) * L),
    "gpt2": House(
        norm="layer", bias=True, gated=False, activation="gelu_tanh", rotary=0, positions=True,
        kv_heads=N,
    ),
    "neox": House(
        norm="layer", bias=True, gated=False, activation="gelu", rotary=1, parallel=True, tied=False
    ),
    "gemma2": House(
        post=True, activation="gelu_tanh", softcap=2.0, windows=(NO_WINDOW, 4, NO_WINDOW)
    ),
    "qwen3": House(qk_norm=True),
    "olmo2": House(pre=False, post=True, qk_norm="wide", tied=False),
    "everything": House(
        norm="layer", post=True, qk_norm=True, bias=True, activation="gelu_tanh", softcap=3.0,
        rotary=2, windows=(NO_WINDOW, 4, 2), positions=True, tied=False,
    ),
    "everything_parallel_ungated": House(
        norm="layer", post=True, qk_norm="wide", bias=True, gated=False, parallel=True, tied=False
    ),
}  # fmt: skip


@functools.cache
def house(name: str) -> tuple[Params, ModelConfig]:
    """Random weights, of a size at which attention is neither flat nor one-hot."""
    h = HOUSES[name]
    rng = np.random.default_rng(sorted(HOUSES).index(name))

    def random(*shape, scale=1.0, mean=0.0):
        return np.asarray(mean + scale * rng.normal(size=shape), np.float32)

    def norm(exists, *lead):
        bias = random(*lead, D, scale=0.3) if h.norm == "layer" else None
        return Norm(weight=random(*lead, D, scale=0.3, mean=1.0), bias=bias) if exists else None

    def bias(*shape):
        return random(*shape, scale=0.3) if h.bias else None

    def qk_norm(heads):
        lead = (L, heads) if h.qk_norm == "wide" else (L,)
        return random(*lead, H, scale=0.3, mean=1.0) if h.qk_norm else None

    k = h.kv_heads
    blocks = BlockWeights(
        wq_DNH=random(L, D, N, H, scale=D**-0.5 * 1.5),
        wk_DKH=random(L, D, k, H, scale=D**-0.5 * 1.5),
        wv_DKH=random(L, D, k, H, scale=D**-0.5),
        wo_NHD=random(L, N, H, D, scale=(N * H) ** -0.5),
        w_up_DF=random(L, D, F, scale=D**-0.5),
        w_down_FD=random(L, F, D, scale=F**-0.5),
        inv_freq=np.broadcast_to(
            np.float32(0.7) ** np.arange(h.rotary, dtype=np.float32), (L, h.rotary)
        ),
        window=np.asarray(h.windows, np.int32),
        w_gate_DF=random(L, D, F, scale=D**-0.5) if h.gated else None,
        norm_attn=norm(h.pre, L),
        norm_mlp=norm(h.pre, L),
        norm_attn_post=norm(h.post, L),
        norm_mlp_post=norm(h.post, L),
        norm_q=qk_norm(N),
        norm_k=qk_norm(k),
        bq_NH=bias(L, N, H),
        bk_KH=bias(L, k, H),
        bv_KH=bias(L, k, H),
        bo_D=bias(L, D),
        b_up_F=bias(L, F),
        b_gate_F=bias(L, F) if h.gated else None,
        b_down_D=bias(L, D),
    )
    params = Params(
        embed_VD=random(V, D),
        blocks=blocks,
        norm_final=norm(True),
        unembed_DV=None if h.tied else random(D, V),
        unembed_bias_V=None if h.tied else random(V, scale=0.3),
        position_PD=random(2 * T, D, scale=0.5) if h.positions else None,
    )
    config = ModelConfig(
        family=name, n_blocks=L, d_model=D, n_heads=N, n_kv_heads=k, head_dim=H, d_mlp=F,
        vocab=V, context=2 * T,
        block=BlockConfig(
            scale=H**-0.5, norm=h.norm, activation=h.activation, softcap=h.softcap,
            parallel=h.parallel,
        ),
        rotary=Rotary(base=1e4, dims=2 * h.rotary), windows=h.windows, tied=h.tied,
    )  # fmt: skip
    return jax.tree.map(jax.numpy.asarray, params), config


def block_weights(params: Params, b: int) -> BlockWeights:
    return jax.tree.map(lambda a: a[b], params.blocks)


def tokens(n: int = T, seed: int = 0) -> np.ndarray:
    """A prompt in which the first token comes once more: a component that is active at two keys."""
    ids = np.random.default_rng(seed).integers(1, V, n).astype(np.int32)
    ids[-1] = ids[n // 2]
    return ids


def dictionary(seed: int, *, activation: str, d: int = D, width: int = 40, **options) -> Dictionary:
    """A random SAE whose activations are sparse: topk of 5, or a threshold about as strict."""
    rng = np.random.default_rng(seed)
    w_dec = rng.normal(size=(width, d))
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    config = DictionaryConfig(
        activation=activation, k=5 if activation == "topk" else None, **options
    )
    return Dictionary(
        w_enc_DM=np.asarray(w_dec.T + 0.1 * rng.normal(size=(d, width)), np.float32),
        w_dec_MD=np.asarray(w_dec, np.float32),
        b_enc_M=np.asarray(0.1 * rng.normal(size=width), np.float32),
        b_dec_D=np.asarray(0.2 * rng.normal(size=d), np.float32),
        threshold_M=np.full(width, 1.0, np.float32) if activation == "jumprelu" else None,
        config=config,
    )


def dictionaries(d: int = D) -> tuple[Dictionary | None, ...]:
    """None at boundary 0 and at boundary 2; elsewhere kinds and widths differ."""
    made: list[Dictionary | None] = [None] * (L + 1)
    made[1] = dictionary(1, activation="topk", d=d)
    made[3] = dictionary(3, activation="jumprelu", d=d, width=56)
    return tuple(made)


@dataclasses.dataclass(frozen=True)
class Case:
    """A house with a prompt that went through it."""

    params: Params
    cfg: ModelConfig
    tokens: np.ndarray
    logits: jax.Array
    trace: Trace
    components: Components

    def block(self, b: int) -> tuple[BlockWeights, jax.Array, Components]:
        """Weights, the residual stream that the block reads, and its components."""
        parts = jax.tree.map(lambda a: a[b], self.components)
        return block_weights(self.params, b), self.trace.boundaries[b], parts


def case_of(params, cfg, ids, saes, **options) -> Case:
    logits, trace = forward(params, ids, cfg=cfg)
    options = dict(n_real=len(ids)) | options
    components = decompose_prompt(params, saes, trace.boundaries, ids, **options)
    return Case(params, cfg, ids, logits, trace, components)


@functools.cache
def case(name: str) -> Case:
    """A house with topk, jumprelu and missing dictionaries, sinks included."""
    params, cfg = house(name)
    return case_of(params, cfg, tokens(), dictionaries())
