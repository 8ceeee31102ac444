"""GGUF files of the Llama, Qwen and Gemma architectures, seen as a checkpoint in Hugging Face names
and layout.

For `llama`, GGUF keeps the rows of each query and key head interleaved for its rotary convention,
`(pair, half)`; ours is half-split, `(half, pair)`. For Gemma it keeps gains as they multiply,
1 + w. Quantised tensors are dequantised one at a time, exactly as the gguf package defines them.
Llama 3 files carry their rotary scaling as a tensor of factors; it is accepted when it is what
Llama 3's formula gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qkattr.config import ModelConfig, Rotary
from qkattr.errors import InputError
from qkattr.load.models.families import from_hf
from qkattr.load.tensors.gguf_container import Container, Tensor, open_container

_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3 = (
    1.0,
    4.0,
    8192,
)  # low and high frequency factor, and original context, of every Llama 3 release
_FACTOR_RTOL = 1e-4  # float32 factors, computed by another program

# Metadata (below the architecture's prefix) and the attribute of a Hugging Face config that it is.
_REQUIRED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
_HEAD_SIZES = ("rope.dimension_count", "attention.value_length")  # must equal the head size
_SCALING = ("rope.scaling.type", "rope.scaling.factor")
_INERT = {"vocab_size": None, "tensor_data_layout": None, "expert_count": 0}

_MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Architecture:
    """How the files of an architecture differ from those of the others.

    model_type: of the Hugging Face config. modules: more tensors of a block, or of another meaning.
    required, optional: more metadata. biases: of attention and MLP, which the config names.
    interleaved: rows of queries and keys are. gains: norms are stored as 1 + w. by_width: the block
    count of the one size whose scores are divided by sqrt(d_model / heads), not sqrt(head_dim);
    no metadata says so (Gemma 27B).
    """

    model_type: str
    modules: dict[str, str] = dataclasses.field(default_factory=dict)
    required: dict[str, str] = dataclasses.field(default_factory=dict)
    optional: dict[str, str] = dataclasses.field(default_factory=dict)
    biases: tuple[tuple[str, str], ...] = ()
    interleaved: bool = False
    gains: bool = False
    by_width: int | None = None


_ATTENTION_BIAS = ("attention_bias", "blk.0.attn_q.bias")
_WINDOW = {"attention.sliding_window": "sliding_window"}
_FINAL_SOFTCAP = {"final_logit_softcapping": "final_logit_softcapping"}
_ARCHITECTURES = {
    "llama": _Architecture(
        model_type="llama",
        biases=(_ATTENTION_BIAS, ("mlp_bias", "blk.0.ffn_up.bias")),
        interleaved=True,
    ),
    "qwen2": _Architecture(model_type="qwen2"),
    "qwen3": _Architecture(model_type="qwen3", modules=_QK_NORMS, biases=(_ATTENTION_BIAS,)),
    "gemma2": _Architecture(
        model_type="gemma2",
        modules=_FOUR_NORMS,
        optional=_WINDOW | _FINAL_SOFTCAP | {"attn_logit_softcapping": "attn_logit_softcapping"},
        gains=True,
        by_width=46,
    ),
    "gemma3": _Architecture(
        model_type="gemma3_text",
        modules=_FOUR_NORMS | _QK_NORMS,
        required=_WINDOW,
        optional=_FINAL_SOFTCAP | {"rope.freq_base_swa": "rope_local_base_freq"},
        gains=True,
        by_width=62,
    ),
}


@dataclasses.dataclass(frozen=True)
class GGUF:
    """An open GGUF file: its config, and its tensors as a `weights.Checkpoint`. hf_config: its
    metadata as a Hugging Face config."""

    path: Path
    reader: Container
    architecture: _Architecture
    config: ModelConfig
    hf_config: dict[str, Any]

    @property
    def where(self) -> str:
        return self.path.name

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        modules = _MODULES | self.architecture.modules
        tensors = self.reader.tensors.items()
        return {_hf_name(name, modules): t for name, t in tensors if name != _ROPE_FACTORS}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def type(self, name: str) -> str:
        """Of what `read` gives, as safetensors calls it: every tensor is dequantised."""
        return "F32"

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32, its rows and gains as Hugging Face has them."""
        weight = _dequantised(self.reader, self._tensors[name])
        if self.architecture.gains and name.endswith("norm.weight"):
            return weight - 1
        if not self.architecture.interleaved:
            return weight
        heads = {"q_proj": self.config.n_heads, "k_proj": self.config.n_kv_heads}.get(
            name.split(".")[-2]
        )
        return half_split(weight, heads) if heads else weight


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection from `(head, pair, half)` to `(head, half, pair)`."""
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _dequantised(reader: Container, tensor: Tensor) -> np.ndarray:
    """A tensor in float32, as the gguf package defines its type."""
    import gguf

    try:
        return gguf.dequantize(reader.bytes(tensor), tensor.kind)
    except NotImplementedError as e:
        raise InputError(
            f"{reader.path.name}: {tensor.name} is {tensor.kind.name}, which the gguf package "
            "cannot dequantise"
        ) from e


def _hf_name(name: str, modules: Mapping[str, str]) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; other names stay."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in modules:
        return f"model.layers.{parts[1]}.{modules[parts[2]]}.{parts[3]}"
    return _OUTSIDE.get(name, name)


def open_gguf(path: str | Path) -> GGUF:
    """Open a GGUF file and read its config; no weights are read.

    Raises:
      InputError: there is no such file, it is damaged, or its architecture or something in its
        metadata is not implemented.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}; give a GGUF file")
    reader = open_container(path)
    name = reader.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise InputError(
            f"{path.name}: its architecture is {name!r:.40}; of GGUF files qkattr reads "
            f"{', '.join(_ARCHITECTURES)}"
        )
    found = _metadata(reader, name, path.name)
    raw = _hf_config(reader, name, found, path.name)
    config = _config(reader, name, found, raw, path.name)
    return GGUF(path, reader, _ARCHITECTURES[name], config, raw)


def _hf_config(
    reader: Container, name: str, found: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The metadata as a Hugging Face config. found: see `_metadata`."""
    architecture, tensors = _ARCHITECTURES[name], reader.tensors
    if "token_embd.weight" not in tensors:
        raise InputError(f"{where} holds no token_embd.weight; it is not a whole model")
    raw = _attributes(found, architecture) | {
        "model_type": architecture.model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": reader.get("tokenizer.ggml.bos_token_id"),
    }
    return raw | {attribute: tensor in tensors for attribute, tensor in architecture.biases}


def _config(
    reader: Container, name: str, found: Mapping[str, Any], raw: dict[str, Any], where: str
) -> ModelConfig:
    """From the metadata, written as a Hugging Face config (`raw`), and from what none can say."""
    architecture, tensors = _ARCHITECTURES[name], reader.tensors
    try:
        config = from_hf(raw)
    except InputError as e:
        raise InputError(f"{where}, its metadata written as a Hugging Face config: {e}") from e
    for key in _HEAD_SIZES:
        if found.get(key) not in (None, config.head_dim):
            raise InputError(
                f"{where}: {name}.{key} is {found[key]!r:.40}, its heads have {config.head_dim}; "
                "not implemented"
            )
    if architecture.by_width is not None:
        wide = config.n_blocks == architecture.by_width
        divisor = config.d_model // config.n_heads if wide else config.head_dim
        block = dataclasses.replace(config.block, scale=divisor**-0.5)
        config = dataclasses.replace(config, block=block)
    if _ROPE_FACTORS in tensors:
        factors = _dequantised(reader, tensors[_ROPE_FACTORS])
        return dataclasses.replace(config, rotary=_llama3(config.rotary, factors, where))
    return config


def _metadata(reader: Container, name: str, where: str) -> dict[str, Any]:
    """What the file says below its architecture's name; whatever is not known is refused."""
    architecture, prefix = _ARCHITECTURES[name], f"{name}."
    found = {
        key.removeprefix(prefix): reader.get(key) for key in reader.keys() if key.startswith(prefix)
    }
    required = _REQUIRED | architecture.required
    known = {*required, *_OPTIONAL, *architecture.optional, *_HEAD_SIZES, *_SCALING}
    for key in [key for key in required if key not in found]:
        raise InputError(f"{where} has no {prefix}{key} in its metadata; it is not a whole model")
    for key, value in found.items():
        inert = key in _INERT and _INERT[key] in (None, value)
        if key not in known and not inert:
            raise InputError(
                f"{where}: {prefix}{key}={value!r:.40} in its metadata is not implemented; use "
                "another file"
            )
    return found


def _attributes(found: Mapping[str, Any], architecture: _Architecture) -> dict[str, Any]:
    """The metadata as attributes of a Hugging Face config."""
    names = _REQUIRED | _OPTIONAL | architecture.required | architecture.optional
    raw: dict[str, Any] = {"rope_theta": 10000.0}  # what llama.cpp takes where a file does not say
    raw |= {names[key]: _decimal(value) for key, value in found.items() if key in names}
    kind, factor = (found.get(key) for key in _SCALING)
    if kind != "none" and (kind or factor):  # without a type, llama.cpp takes it to be linear
        raw["rope_scaling"] = {"rope_type": kind or "linear", "factor": _decimal(factor)}
    return raw


def _decimal(value: Any) -> Any:
    """A float32 as the decimal that was meant, as in config.json: 1e-05, not 9.9999997e-06."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _llama3(rotary: Rotary, factors: np.ndarray, where: str) -> Rotary:
    """The rotary scaling that divides the frequencies by `factors`: Llama 3's, of the largest."""
    scaled = dataclasses.replace(rotary, llama3=(float(factors.max()), *_LLAMA3))
    divisors = rotary.inv_freq() / scaled.inv_freq()
    if factors.shape != divisors.shape or not np.allclose(factors, divisors, rtol=_FACTOR_RTOL):
        raise InputError(
            f"{where}: {_ROPE_FACTORS} is not Llama 3's rotary scaling; no other one is implemented"
        )
    return scaled
