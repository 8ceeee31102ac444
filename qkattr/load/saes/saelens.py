"""SAELens folders: `cfg.json` and `sae_weights.safetensors`.

Read: architectures standard, gated, topk and jumprelu (BatchTopK and Matryoshka SAEs are saved as
jumprelu), with the configs of SAELens 6 (nested metadata) and of the versions before it (flat, with
other names). Whatever changes what an SAE computes and is not implemented is refused by name.
Arrays stay memory-mapped in the file's own type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qkattr.errors import InputError, clipped
from qkattr.load.mapped import open_mapped
from qkattr.load.saes.header import Fields, Header, Options, Part, check_tensors
from qkattr.sources.dictionary import DictionaryConfig

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_ACTIVATIONS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
_PER_TOKEN = ("none", "constant_norm_rescale", "layer_norm")
_AVERAGE = "expected_average_only_in"


def _architecture(fields: Fields) -> str:
    """Before version 6 a TopK SAE was a "standard" one whose activation function is "topk"."""
    architecture = fields.typed(str, "architecture", default="standard")
    activation = fields.get("activation_fn_str", "activation_fn", default="relu")
    if architecture == "standard" and activation == "topk":
        return "topk"
    if architecture not in _ACTIVATIONS:
        raise fields.refuse(
            f"architecture {clipped(repr(architecture), 40)} is not implemented; known are "
            f"{', '.join(_ACTIVATIONS)} (batchtopk and matryoshka as save_inference_model saves "
            "them)"
        )
    if activation not in ("relu", architecture):
        raise fields.refuse(
            f"activation function {clipped(repr(activation), 40)} is not implemented; known are "
            "relu and topk"
        )
    return architecture


def _k(fields: Fields) -> int:
    arguments = fields.get("activation_fn_kwargs", default={})
    k = fields.get("k", default=arguments.get("k") if isinstance(arguments, dict) else None)
    return fields.k(k, fields.size("d_sae"))


def _normalisation(fields: Fields) -> str:
    kind = fields.get("normalize_activations", default="none")
    if isinstance(kind, bool):
        kind = _AVERAGE if kind else "none"
    if kind not in (*_PER_TOKEN, _AVERAGE):
        raise fields.refuse(
            f"normalize_activations {clipped(repr(kind), 40)} is not implemented; known are "
            f"{', '.join((*_PER_TOKEN, _AVERAGE))}"
        )
    return kind


def _factor(fields: Fields, hook: str, options: Options) -> float:
    """What `expected_average_only_in` multiplies the input by; SAELens keeps it elsewhere."""
    factor = options.norm_factors.get(hook)
    if factor is None:
        raise fields.refuse(
            f"normalize_activations is {_AVERAGE}, whose factor is not in the file; give it in "
            "norm_factors (qkattr.toml), or fold it into the weights with SAELens "
            "(fold_activation_norm_scaling_factor) and save again"
        )
    if not 0 < factor < float("inf"):
        raise fields.refuse(f"the norm factor should be above 0, got {factor}; see norm_factors")
    return factor


def _centred(fields: Fields, options: Options) -> bool:
    """Whether it was trained on a model that TransformerLens had centred."""
    if options.centre is not None:
        return options.centre
    loaded = fields.get("model_from_pretrained_kwargs", default={})
    return isinstance(loaded, dict) and loaded.get("center_writing_weights") is True


def _dictionary_config(fields: Fields, options: Options) -> DictionaryConfig:
    if (reshape := fields.get("reshape_activations", default="none")) != "none":
        raise fields.refuse(
            f"reshape_activations is {clipped(repr(reshape), 40)}; only SAEs over the residual "
            "stream itself are read"
        )
    if (head := fields.get("hook_head_index")) is not None:
        raise fields.refuse(
            f"it reads head {head!r:.10} alone (hook_head_index); load SAEs of the whole residual "
            "stream"
        )
    architecture, kind = _architecture(fields), _normalisation(fields)
    before_v6 = "metadata" not in fields.flat
    return DictionaryConfig(
        activation=_ACTIVATIONS[architecture],
        k=_k(fields) if architecture == "topk" else None,
        subtract_b_dec=fields.typed(bool, "apply_b_dec_to_input", default=True),
        normalize="none" if kind == _AVERAGE else kind,
        centre=_centred(fields, options),
        rescale_by_decoder_norm=architecture == "topk"
        and fields.typed(bool, "rescale_acts_by_decoder_norm", default=False),
        prepend_bos=fields.typed(bool, "prepend_bos", default=True if before_v6 else None),
    )


def _parts(activation: str) -> dict[str, Part]:
    names = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
    if activation == "jumprelu":
        names["threshold"] = "threshold"
    if activation == "gated":
        names |= {"b_enc": "b_mag", "b_gate": "b_gate", "r_mag": "r_mag"}
    return {name: Part(stored) for name, stored in names.items()}


def read(folder: Path, options: Options) -> list[Header]:
    """Read and check everything but the weights."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}; give a folder that SAELens saved an SAE to")
    fields = Fields(folder, CONFIG, nested="metadata")
    config = _dictionary_config(fields, options)
    hook = fields.typed(str, "hook_name", "hook_point", default="")
    file = open_mapped(folder / WEIGHTS, where=f"SAE {folder.name}: {WEIGHTS}")
    constants: dict[str, Any] = {}
    if _normalisation(fields) == _AVERAGE:
        constants["factor"] = np.float32(_factor(fields, hook, options))
    header = Header(
        folder=folder,
        name=f"SAE {folder.name}",
        hook=hook,
        model_name=fields.typed(str, "model_name", default=None),
        d_in=fields.size("d_in"),
        d_sae=fields.size("d_sae"),
        config=config,
        file=file,
        files=(folder / CONFIG, folder / WEIGHTS),
        parts=_parts(config.activation),
        spare=frozenset({"scaling_factor"}),
        constants=constants,
        source=CONFIG,
    )
    return [check_tensors(header)]
