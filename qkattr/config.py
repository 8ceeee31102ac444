"""Model configuration: what `forward` and the linear block need to know,
and how to read it from a Hugging Face config.

`from_hf` reads every attribute of `config.json`, or refuses the config by naming the one it does
not handle: an attribute that is passed over in silence is a model that computes something else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qkattr.errors import InputError
from qkattr.types import NO_WINDOW


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What a block's arithmetic needs beyond its weights. Sizes are read off the weights.

    scale: multiplies q . k. softcap: `c * tanh(score / c)` after it. parallel: the MLP reads the
    block's input, not the stream after attention (GPT-NeoX).
    """

    scale: float
    norm: str = "rms"  # "rms" or "layer"
    eps: float = 1e-5
    activation: str = "silu"  # a key of `model.layers.ACTIVATIONS`
    softcap: float | None = None
    parallel: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary embedding of the first `dims` of each head.
    llama3: (factor, low_freq, high_freq, original context).
    """

    base: float
    dims: int
    llama3: tuple[float, float, float, int] | None = None

    def inv_freq(self) -> np.ndarray:
        """`[dims/2]` radians per position, in float32 as the checkpoints' own
        code computes them.
        """
        exponent = np.arange(0, self.dims, 2, dtype=np.float32) / np.float32(self.dims)
        inv = (np.float32(1.0) / np.float32(self.base) ** exponent).astype(np.float32)
        if self.llama3 is None:
            return inv
        factor, low_factor, high_factor, original = self.llama3
        wavelength = 2 * math.pi / inv
        smooth = (original / wavelength - low_factor) / (high_factor - low_factor)
        blended = (1 - smooth) * inv / factor + smooth * inv
        scaled = np.where(wavelength > original / low_factor, inv / factor, blended)
        return np.where(wavelength < original / high_factor, inv, scaled).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Hashable: it is a static argument of the jitted functions."""

    family: str
    n_blocks: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    vocab: int
    context: int
    block: BlockConfig
    rotary: Rotary
    windows: tuple[int, ...]  # per block; NO_WINDOW where it sees everything
    attention_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    bos_id: int | None = None

    @property
    def head_grid(self) -> tuple[int, int]:
        """L blocks and N heads: the shape of whatever has one value a head."""
        return self.n_blocks, self.n_heads


# Attributes of a Hugging Face config that change nothing a forward pass computes.
_INERT = frozenset(
    """architectures attention_dropout bos_token_id eos_token_id pad_token_id unk_token_id
    sep_token_id decoder_start_token_id initializer_range torch_dtype dtype transformers_version
    use_cache _name_or_path name_or_path _attn_implementation _attn_implementation_autoset
    attn_implementation auto_map tokenizer_class task_specific_params problem_type id2label
    label2id num_labels finetuning_task return_dict output_attentions output_hidden_states
    transformers.js_config is_llama_config unsloth_version unsloth_fixed max_window_layers
    temperature top_p top_k typical_p repetition_penalty length_penalty num_beams do_sample
    max_length min_length chunk_size_feed_forward is_decoder is_encoder_decoder
    add_cross_attention cross_attention_hidden_size tie_encoder_decoder prefix model_max_length
    gradient_checkpointing""".split()
)

# Attributes that are handled only at the one value at which they do nothing.
_FIXED = {
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "partial_rotary_factor": (1, 1.0, None),
}


class _Fields:
    """A config as it is being read: what is left at the end was not handled."""

    def __init__(self, raw: Mapping[str, Any]):
        self.left = dict(raw)
        self.family = self.left.pop("model_type", None)

    def take(self, name: str, kind: type, default: Any = ...) -> Any:
        value = self.left.pop(name, None)
        if value is None:
            if default is ...:
                raise InputError(
                    f"config.json has no {name}; it is not a complete {self.family} config"
                )
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind:
            raise InputError(
                f"config.json: {name} should be {kind.__name__}, got {value!r}; "
                f"restore the model's own config.json"
            )
        return value

    def size(self, name: str, default: Any = ..., most: int = 2**24) -> int:
        value = self.take(name, int, default)
        if not 1 <= value <= most:
            raise InputError(
                f"config.json: {name} should lie in 1..{most}, got {value}; "
                f"restore the model's own config"
            )
        return value

    def refuse_the_rest(self) -> None:
        for name, allowed in _FIXED.items():
            if name in self.left and self.left.pop(name) not in allowed:
                raise InputError(
                    f"config.json: {name} is set and qkattr does not implement it "
                    f"for {self.family} models"
                )
        unknown = sorted(set(self.left) - _INERT)
        if unknown:
            raise InputError(
                f"config.json has {', '.join(f'{n}={self.left[n]!r:.40}' for n in unknown)}, "
                f"which qkattr does not know; "
                f"remove it if it changes nothing that the model computes"
            )


def _rotary(fields: _Fields, head_dim: int, context: int) -> Rotary:
    """Read either spelling: rope_theta with rope_scaling, or rope_parameters (transformers 5)."""
    theta = fields.take("rope_theta", float, None)
    scaling = fields.left.pop("rope_scaling", None) or {}
    rope = dict(fields.left.pop("rope_parameters", None) or scaling)
    theta = rope.pop("rope_theta", theta)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            "config.json: partial_rotary_factor below 1 is not implemented for this family"
        )
    base = 10000.0 if theta is None else float(theta)
    if kind == "default":
        llama3 = None
    elif kind == "llama3":
        try:
            llama3 = (
                float(rope.pop("factor")),
                float(rope.pop("low_freq_factor")),
                float(rope.pop("high_freq_factor")),
                int(rope.pop("original_max_position_embeddings", context)),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise InputError(
                f"config.json: rope type llama3 lacks or has a bad {e}; "
                f"restore the model's own config"
            ) from e
    else:
        raise InputError(
            f"config.json: rope type {kind!r} is not implemented; known are default and llama3"
        )
    if rope:
        raise InputError(
            f"config.json: rope parameters {sorted(rope)} are not known for rope type {kind!r}"
        )
    return Rotary(base=base, dims=head_dim, llama3=llama3)


def _llama(fields: _Fields) -> ModelConfig:
    """Llama 2 and 3, SmolLM2, Mistral: RMSNorm, rotary, grouped-query attention, gated MLP."""
    n_heads = fields.size("num_attention_heads")
    d_model = fields.size("hidden_size")
    n_kv_heads = fields.size("num_key_value_heads", 8 if fields.family == "mistral" else n_heads)
    n_blocks = fields.size("num_hidden_layers", most=4096)
    context = fields.size("max_position_embeddings")
    head_dim = fields.size("head_dim", d_model // n_heads)
    if n_heads % n_kv_heads or head_dim % 2:
        raise InputError(
            f"config.json: {n_heads} heads over {n_kv_heads} key/value heads of {head_dim}: "
            f"the first must be a multiple of the second, and the size even"
        )
    if (activation := fields.take("hidden_act", str, "silu")) != "silu":
        raise InputError(
            f"config.json: hidden_act {activation!r} is not a Llama-family activation; "
            f"expected 'silu'"
        )
    window = NO_WINDOW
    if fields.family == "mistral":
        fields.left.setdefault("sliding_window", 4096)  # absent means 4096 there, null means none
        window = fields.size("sliding_window", NO_WINDOW, NO_WINDOW)
    return ModelConfig(
        family=fields.family,
        n_blocks=n_blocks,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_mlp=fields.size("intermediate_size"),
        vocab=fields.size("vocab_size"),
        context=context,
        block=BlockConfig(scale=head_dim**-0.5, eps=fields.take("rms_norm_eps", float, 1e-6)),
        rotary=_rotary(fields, head_dim, context),
        windows=(window,) * n_blocks,
        attention_bias=fields.family == "llama" and fields.take("attention_bias", bool, False),
        mlp_bias=fields.family == "llama" and fields.take("mlp_bias", bool, False),
        tied=fields.take("tie_word_embeddings", bool, False),
        bos_id=fields.left["bos_token_id"]
        if isinstance(fields.left.get("bos_token_id"), int)
        else None,
    )


_FAMILIES = {"llama": _llama, "mistral": _llama}


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face `config.json`.

    Raises:
      InputError: the family is not known, an attribute is missing or of the wrong type, or one is
        not handled.
    """
    fields = _Fields(raw)
    if fields.family not in _FAMILIES:
        raise InputError(
            f"config.json: model_type is {fields.family!r}; "
            f"qkattr implements {', '.join(sorted(_FAMILIES))}"
        )
    config = _FAMILIES[fields.family](fields)
    fields.refuse_the_rest()
    return config
