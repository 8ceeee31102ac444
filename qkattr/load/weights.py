"""From a checkpoint's tensors to `Params`: one table and one assembling path for every file format.

A `Checkpoint` gives tensors under Hugging Face names and in Hugging Face layout: a linear map is
`[out, in]`, queries and keys are half-split for rotary. Ours is `[in, out]` with the heads split,
so that every field is the transposed tensor, reshaped: `wq_DNH = q_proj.T.reshape(D, N, H)`. All
names and shapes are checked before any data is read. Blocks are copied one tensor at a time into
arrays that already have the target type: the host never holds two models.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qkattr.config import ModelConfig
from qkattr.errors import InputError
from qkattr.load.mapped import check_finite, some
from qkattr.types import BlockWeights, Norm, Params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Checkpoint(Protocol):
    """Named tensors, read one by one. `where` is how errors call it."""

    @property
    def where(self) -> str: ...

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class _Field:
    """One field of ours: the tensor it comes from (`{}`: the block), the shape there and here."""

    tensor: str
    theirs: tuple[int, ...]
    ours: tuple[int, ...]
    transposed: bool = True
    norm: bool = False


def _linear(module: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> _Field:
    return _Field(f"{module}.weight", (math.prod(outputs), math.prod(inputs)), inputs + outputs)


def _bias(module: str, *shape: int) -> _Field:
    return _Field(f"{module}.bias", (math.prod(shape),), shape)


def _norm(module: str, d_model: int) -> _Field:
    return _Field(f"{module}.weight", (d_model,), (d_model,), norm=True)


def _block_fields(config: ModelConfig) -> dict[str, _Field]:
    """The fields of `BlockWeights` that a Llama-family block has."""
    d, n, k, h, f = config.d_model, config.n_heads, config.n_kv_heads, config.head_dim, config.d_mlp
    attention, mlp = "model.layers.{}.self_attn", "model.layers.{}.mlp"
    fields = {
        "norm_attn": _norm("model.layers.{}.input_layernorm", d),
        "norm_mlp": _norm("model.layers.{}.post_attention_layernorm", d),
        "wq_DNH": _linear(f"{attention}.q_proj", (d,), (n, h)),
        "wk_DKH": _linear(f"{attention}.k_proj", (d,), (k, h)),
        "wv_DKH": _linear(f"{attention}.v_proj", (d,), (k, h)),
        "wo_NHD": _linear(f"{attention}.o_proj", (n, h), (d,)),
        "w_gate_DF": _linear(f"{mlp}.gate_proj", (d,), (f,)),
        "w_up_DF": _linear(f"{mlp}.up_proj", (d,), (f,)),
        "w_down_FD": _linear(f"{mlp}.down_proj", (f,), (d,)),
    }
    if config.attention_bias:
        fields["bq_NH"] = _bias(f"{attention}.q_proj", n, h)
        fields["bk_KH"] = _bias(f"{attention}.k_proj", k, h)
        fields["bv_KH"] = _bias(f"{attention}.v_proj", k, h)
        fields["bo_D"] = _bias(f"{attention}.o_proj", d)
    if config.mlp_bias:
        fields["b_gate_F"] = _bias(f"{mlp}.gate_proj", f)
        fields["b_up_F"] = _bias(f"{mlp}.up_proj", f)
        fields["b_down_D"] = _bias(f"{mlp}.down_proj", d)
    return fields


def _model_fields(config: ModelConfig) -> dict[str, _Field]:
    """The fields of `Params` outside the blocks."""
    table = (config.vocab, config.d_model)
    fields = {
        "embed_VD": _Field("model.embed_tokens.weight", table, table, transposed=False),
        "norm_final": _norm("model.norm", config.d_model),
    }
    if not config.tied:
        fields["unembed_DV"] = _linear("lm_head", (config.d_model,), (config.vocab,))
    return fields


def _ignored(name: str, config: ModelConfig) -> bool:
    """Tensors that old checkpoints carry and that follow from the rest."""
    return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tied)


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Compare names and shapes with what the config calls for; reads no data.

    Raises:
      InputError: a tensor is missing, is not used, or has another shape.
    """
    expected = {field.tensor: field.theirs for field in _model_fields(config).values()}
    for field in _block_fields(config).values():
        expected |= {field.tensor.format(block): field.theirs for block in range(config.n_blocks)}
    found = checkpoint.shapes()
    remedy = "the weights and the config must belong to one checkpoint"
    if missing := [name for name in expected if name not in found]:
        raise InputError(
            f"{checkpoint.where} lacks {some(missing)}, which its config calls for; {remedy}"
        )
    if extra := [name for name in found if name not in expected and not _ignored(name, config)]:
        raise InputError(
            f"{checkpoint.where} holds {some(extra)}, for which its config has no use; {remedy}"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            got, want = list(found[name]), list(shape)
            raise InputError(
                f"{checkpoint.where}: {name} has shape {got}, its config calls for {want}; {remedy}"
            )


def _copy(checkpoint: Checkpoint, name: str, field: _Field, out: np.ndarray) -> None:
    """Read one tensor into `out`, which has our shape and type."""
    tensor = checkpoint.read(name)
    check_finite(tensor, name, checkpoint.where)
    tensor = tensor.T if field.transposed else tensor
    out.reshape(tensor.shape)[...] = tensor


def _allocate(shape: tuple[int, ...], field: _Field, dtype: Any) -> np.ndarray:
    """Norm gains and biases stay float32: they are small, and rounding them would buy nothing."""
    return np.empty(shape, np.float32 if len(field.theirs) == 1 else dtype)


def _finish(field: _Field, array: np.ndarray) -> Array | Norm:
    return Norm(weight=jnp.asarray(array)) if field.norm else jnp.asarray(array)


def _read_one(checkpoint: Checkpoint, field: _Field, dtype: Any) -> Array | Norm:
    out = _allocate(field.ours, field, dtype)
    _copy(checkpoint, field.tensor, field, out)
    return _finish(field, out)


def _read_stack(checkpoint: Checkpoint, field: _Field, n_blocks: int, dtype: Any) -> Array | Norm:
    out = _allocate((n_blocks, *field.ours), field, dtype)
    for block in range(n_blocks):
        _copy(checkpoint, field.tensor.format(block), field, out[block])
    return _finish(field, out)


def read_params(checkpoint: Checkpoint, config: ModelConfig, *, dtype: str = "float32") -> Params:
    """Assemble the model: matrices in `dtype`, "float32" or "bfloat16", the rest in float32.

    Raises:
      InputError: the dtype is neither, the tensors do not fit the config, or one holds NaN or
        infinite values.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    check_tensors(checkpoint, config)
    target, n_blocks = DTYPES[dtype], config.n_blocks
    stacks: dict[str, Any] = {
        name: _read_stack(checkpoint, field, n_blocks, target)
        for name, field in _block_fields(config).items()
    }
    rest: dict[str, Any] = {
        name: _read_one(checkpoint, field, target) for name, field in _model_fields(config).items()
    }
    blocks = BlockWeights(
        inv_freq=jnp.asarray(np.tile(config.rotary.inv_freq(), (n_blocks, 1))),
        window=jnp.asarray(np.array(config.windows, np.int32)),
        **stacks,
    )
    return Params(blocks=blocks, **rest)
