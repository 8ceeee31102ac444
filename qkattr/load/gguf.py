"""GGUF files of Llama-family models, seen as a checkpoint in Hugging Face names and layout.

GGUF keeps the rows of each query and key head interleaved for its rotary convention,
`(pair, half)`; ours is half-split, `(half, pair)`. Quantised tensors are dequantised one at a time,
exactly as the gguf package defines them. Llama 3 files carry their rotary scaling as a tensor of
factors; it is accepted when it is what Llama 3's formula gives.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qkattr.config import ModelConfig, Rotary
from qkattr.errors import InputError
from qkattr.load.families import from_hf

_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3 = (
    1.0,
    4.0,
    8192,
)  # low and high frequency factor, and original context, of every Llama 3 release
_FACTOR_RTOL = 1e-4  # float32 factors, computed by another program

# Metadata (below the prefix "llama.") and the attribute of a Hugging Face config that it is.
_ATTRIBUTES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_OPTIONAL = {"attention.head_count_kv", "attention.key_length", "rope.freq_base"}
_HEAD_SIZES = ("rope.dimension_count", "attention.value_length")  # must equal the head size
_INERT = {
    "vocab_size": None,
    "tensor_data_layout": None,
    "rope.scaling.type": "none",
    "expert_count": 0,
}

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
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def import_gguf() -> ModuleType:
    """The gguf package, or an `InputError` that says how to get it."""
    try:
        import gguf
    except ImportError as e:
        raise InputError(
            "reading GGUF files needs the package gguf; pip install 'qkattr[gguf]'"
        ) from e
    return gguf


@dataclasses.dataclass(frozen=True)
class GGUF:
    """An open GGUF file: its config, and its tensors as a `weights.Checkpoint`."""

    path: Path
    reader: Any  # gguf.GGUFReader
    config: ModelConfig

    @property
    def where(self) -> str:
        return self.path.name

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        return {_hf_name(t.name): t for t in self.reader.tensors if t.name != _ROPE_FACTORS}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: _shape(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32, its rows in Hugging Face order."""
        tensor = self._tensors[name]
        try:
            weight = import_gguf().dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as e:
            kind = tensor.tensor_type.name
            raise InputError(
                f"{self.where}: {tensor.name} is {kind}, which the gguf package cannot dequantise"
            ) from e
        heads = {"q_proj": self.config.n_heads, "k_proj": self.config.n_kv_heads}.get(
            name.split(".")[-2]
        )
        return half_split(weight, heads) if heads else weight


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection from `(head, pair, half)` to `(head, half, pair)`."""
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; other names stay."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _MODULES:
        return f"model.layers.{parts[1]}.{_MODULES[parts[2]]}.{parts[3]}"
    return _OUTSIDE.get(name, name)


def open_gguf(path: str | Path) -> GGUF:
    """Open a GGUF file and read its config; no weights are read.

    Raises:
      InputError: there is no such file, it is damaged, its architecture is not llama, or its
        metadata says something that qkattr does not implement.
    """
    path, gguf = Path(path), import_gguf()
    if not path.is_file():
        raise InputError(f"no such file: {path}; give a GGUF file")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, LookupError, TypeError, OverflowError, OSError, MemoryError) as e:
        raise InputError(
            f"{path.name} is not a whole GGUF file ({e}); copy or download it again"
        ) from e
    return GGUF(path, reader, _config(reader, path.name))


def contents(reader: Any, key: str, default: Any = None) -> Any:
    """One value of an open file's metadata."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _config(reader: Any, where: str) -> ModelConfig:
    raw = _attributes(reader, where)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise InputError(f"{where} holds no token_embd.weight; it is not a whole model")
    raw |= {
        "model_type": "llama",
        "vocab_size": _shape(tensors["token_embd.weight"])[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "bos_token_id": contents(reader, "tokenizer.ggml.bos_token_id"),
    }
    try:
        config = from_hf(raw)
    except InputError as e:
        raise InputError(f"{where}, its metadata written as a Hugging Face config: {e}") from e
    for key in _HEAD_SIZES:
        if (size := contents(reader, f"llama.{key}")) not in (None, config.head_dim):
            raise InputError(
                f"{where}: llama.{key} is {size}, its heads have {config.head_dim}; not implemented"
            )
    if _ROPE_FACTORS in tensors:
        factors = import_gguf().dequantize(
            tensors[_ROPE_FACTORS].data, tensors[_ROPE_FACTORS].tensor_type
        )
        return dataclasses.replace(config, rotary=_llama3(config.rotary, factors, where))
    return config


def _attributes(reader: Any, where: str) -> dict[str, Any]:
    """The metadata as attributes of a Hugging Face config; whatever is not known is refused."""
    if (architecture := contents(reader, "general.architecture")) != "llama":
        raise InputError(
            f"{where}: its architecture is {architecture!r}; of GGUF files qkattr reads only "
            "'llama'"
        )
    found = {
        key.removeprefix("llama."): contents(reader, key)
        for key in reader.fields
        if key.startswith("llama.")
    }
    for key in [key for key in _ATTRIBUTES if key not in found and key not in _OPTIONAL]:
        raise InputError(f"{where} has no llama.{key} in its metadata; it is not a whole model")
    for key, value in found.items():
        inert = key in _INERT and _INERT[key] in (None, value)
        if key not in _ATTRIBUTES and key not in _HEAD_SIZES and not inert:
            raise InputError(
                f"{where}: llama.{key}={value!r:.40} in its metadata is not implemented; use "
                "another file"
            )
    return {_ATTRIBUTES[key]: _decimal(value) for key, value in found.items() if key in _ATTRIBUTES}


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
