"""Llama Scope and what followed it (OpenMOSS): three layouts of one kind of SAE.

    hyperparams.json, checkpoints/final.safetensors                      Llama Scope
    config.json, sae_weights.safetensors (encoder.weight, ...)           its R1-distill SAEs
    config.json, sae_weights.safetensors (W_E, b_E, W_D, b_D)            llamascopium

    y = x * sqrt(d) / norm       norm: of the token (token-wise), or the data set's average
    p = y @ W_E + b_E            minus b_D first, only with apply_decoder_bias_to_pre_encoder
    a = p where p * |W_D| > threshold      |W_D| only with sparsity_include_decoder_norm

Llama Scope's one threshold t is in units of the output: its authors fold the norms into the weights
and the norms of the decoder's rows into the encoder, and only then turn a topk SAE into a jumprelu
one. So threshold is t * sqrt(d) / norm. SAELens has the same number and leaves |W_D| out, as
`Options.llama_scope_threshold = "saelens"` does. Thresholds of single features are those of
training, in units of y.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from qkattr.errors import InputError, clipped
from qkattr.load.dictionaries.header import (
    Folder,
    Found,
    Header,
    Options,
    Part,
    SaeFields,
    check_tensors,
    exponential,
    release_l0,
)
from qkattr.load.dictionaries.hooks import canonical
from qkattr.load.tensors.mapped import MappedTensors, open_mapped
from qkattr.sources.dictionary import DictionaryConfig

HYPERPARAMS, FINAL = "hyperparams.json", "checkpoints/final.safetensors"
CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
_NORM = "dataset_average_activation_norm"
_KINDS = ("relu", "jumprelu", "topk")
_LINEAR = {
    "W_enc": Part("encoder.weight", transposed=True),
    "W_dec": Part("decoder.weight", transposed=True),
    "b_enc": Part("encoder.bias"),
    "b_dec": Part("decoder.bias"),
}
_PLAIN = {"W_enc": Part("W_E"), "W_dec": Part("W_D"), "b_enc": Part("b_E"), "b_dec": Part("b_D")}
_LOG_THRESHOLDS = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")


#: Of `sae_type`, what is no SAE.
_OTHERS = {"clt": "cross-layer transcoder", "lorsa": "Lorsa", "crosscoder": "crosscoder"}


def _hook(fields: SaeFields) -> str:
    """Where it was trained, as the config says; or what it is instead of an SAE."""
    kind = fields.typed(str, "sae_type", default="sae")
    if kind in _OTHERS:
        return _OTHERS[kind]
    point = fields.typed(str, "hook_point_in", default="")
    return "transcoder" if fields.typed(str, "hook_point_out", default=point) != point else point


def _activation(fields: SaeFields) -> str:
    """The activation; refuses by name what computes something else."""
    if (kind := fields.get("sae_type", default="sae")) != "sae":
        raise fields.refuse(f"sae_type {clipped(repr(kind), 40)} is not implemented; known is sae")
    if fields.get("use_glu_encoder", default=False) is not False:
        raise fields.refuse("use_glu_encoder is not implemented; load SAEs without it")
    activation = fields.typed(str, "act_fn", default="relu")
    if activation not in _KINDS:
        raise fields.refuse(
            f"act_fn {activation!r:.40} is not implemented (batchtopk depends on the batch: "
            f"convert it to jumprelu); known are {', '.join(_KINDS)}"
        )
    return activation


def _normalisation(fields: SaeFields) -> str:
    kind = fields.typed(str, "norm_activation", default="dataset-wise")
    if kind not in ("token-wise", "dataset-wise", "inference"):
        raise fields.refuse(
            f"norm_activation {kind!r:.40} is not implemented (batch-wise depends on what else is "
            "in the batch); known are token-wise, dataset-wise and inference"
        )
    return kind


def _config(
    fields: SaeFields, *, subtract: bool, by_norm: bool, prepend_bos: bool | None
) -> DictionaryConfig:
    activation = _activation(fields)
    k = None
    if activation == "topk":
        k = fields.k(fields.typed(int, "top_k"), _width(fields))
    return DictionaryConfig(
        activation=activation,
        k=k,
        subtract_b_dec=subtract,
        normalize="constant_norm_rescale" if _normalisation(fields) == "token-wise" else "none",
        rescale_by_decoder_norm=by_norm and activation != "relu",
        prepend_bos=prepend_bos,
    )


def _width(fields: SaeFields) -> int:
    """d_sae, said or by the expansion factor."""
    if fields.get("d_sae") is not None:
        return fields.size("d_sae")
    width = fields.size("d_model") * fields.positive("expansion_factor")
    return round(fields.within("d_model * expansion_factor", width))


def _norm_factor(fields: SaeFields, norm: Any, options: Options) -> dict[str, Any]:
    """sqrt(d) / norm as a constant, where the SAE has a data set's average norm."""
    if _normalisation(fields) != "dataset-wise":
        return {}
    given = options.factor(_hook(fields))
    if given is None and not (isinstance(norm, int | float) and 0 < norm < 1e30):
        raise fields.refuse(
            f"{_NORM} should be a number above 0, got {clipped(repr(norm), 40)}; restore its own "
            "files, or give sqrt(d) / norm in norm_factors (qkattr.toml)"
        )
    factor = given if given is not None else math.sqrt(fields.size("d_model")) / norm
    return {"factor": np.float32(factor)}


def find_1(at: Folder, options: Options) -> list[Found]:
    """Llama Scope, one scalar threshold for all features."""
    fields = SaeFields(at.path, HYPERPARAMS)
    return [Found(at.path, canonical(_hook(fields)), partial(_read_1, fields, options))]


def find_2(at: Folder, options: Options) -> list[Found]:
    """R1-distill and llamascopium: a threshold for each feature, in logarithms."""
    fields = SaeFields(at.path, CONFIG)
    return [Found(at.path, canonical(_hook(fields)), partial(_read_2, fields, options))]


def _read_1(fields: SaeFields, options: Options) -> Header:
    folder = fields.folder
    if not (folder / FINAL).is_file():
        raise InputError(f"{folder} has no {FINAL}; copy it whole")
    norms = fields.get(_NORM, default={})
    norm_in, norm_out = (
        norms.get(side) if isinstance(norms, dict) else norms for side in ("in", "out")
    )
    if norm_out is not None and norm_out != norm_in:
        raise fields.refuse(
            f"{_NORM} differs between in and out: a transcoder, which is not implemented; load SAEs"
        )
    saelens = options.llama_scope_threshold == "saelens"
    if not saelens and options.llama_scope_threshold != "openmoss":
        raise fields.refuse(
            f"llama_scope_threshold is {options.llama_scope_threshold!r:.40}, "
            "expected openmoss or saelens"
        )
    config = _config(
        fields,
        subtract=fields.typed(bool, "apply_decoder_bias_to_pre_encoder", default=False),
        by_norm=not saelens and fields.typed(bool, "sparsity_include_decoder_norm", default=True),
        prepend_bos=True,
    )
    constants = _norm_factor(fields, norm_in, options) | release_l0(fields.get("top_k"))
    if config.activation == "jumprelu":
        threshold = fields.positive("jump_relu_threshold") * float(constants.get("factor", 1.0))
        constants["threshold_M"] = np.full(_width(fields), threshold, np.float32)
    file = open_mapped(folder / FINAL, where=f"SAE {folder.name}: {FINAL}")
    return _header(fields, config, file, HYPERPARAMS, FINAL, dict(_LINEAR), constants)


def _read_2(fields: SaeFields, options: Options) -> Header:
    folder = fields.folder
    file = open_mapped(folder / WEIGHTS, where=f"SAE {folder.name}: {WEIGHTS}")
    found = file.shapes()
    parts = dict(_PLAIN if "W_E" in found else _LINEAR)
    if not fields.typed(bool, "use_decoder_bias", default=True):
        parts.pop("b_dec")
    config = _config(
        fields,
        subtract=fields.typed(bool, "apply_decoder_bias_to_pre_encoder", default=False),
        by_norm=fields.typed(bool, "sparsity_include_decoder_norm", default=True),
        prepend_bos=None,
    )
    if config.activation == "jumprelu":
        name = next((n for n in _LOG_THRESHOLDS if n in found), _LOG_THRESHOLDS[-1])
        parts["threshold"] = Part(name, apply=exponential)
    constants = _norm_factor(fields, _stored_norm(fields, file), options)
    return _header(fields, config, file, CONFIG, WEIGHTS, parts, constants)


def _stored_norm(fields: SaeFields, file: MappedTensors) -> float | None:
    """The average norm at the input's hook: a tensor of the file, or in the config."""
    hook = fields.typed(str, "hook_point_in", default="")
    for name in (f"{_NORM}.{hook}", f"{_NORM}.in"):
        if file.shapes().get(name) in ((), (1,)):
            return float(np.asarray(file.read(name), np.float32).reshape(()))
    said = fields.get(_NORM, default={})
    return said.get(hook, said.get("in")) if isinstance(said, dict) else said


def _header(fields, config, file, config_name, weights, parts, constants) -> Header:
    spare = frozenset(name for name in file.shapes() if name.startswith(_NORM))
    return check_tensors(
        Header(
            folder=fields.folder,
            name=f"SAE {fields.folder.name}",
            hook=canonical(_hook(fields)),
            model_name=fields.typed(str, "model_name", default=None),
            d_in=fields.size("d_model"),
            d_sae=_width(fields),
            config=config,
            file=file,
            files=(fields.folder / config_name, fields.folder / weights),
            parts=parts,
            spare=spare,
            constants=constants,
            source=config_name,
        )
    )
