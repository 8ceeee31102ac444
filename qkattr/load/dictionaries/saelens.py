"""SAELens folders: `cfg.json` and `sae_weights.safetensors`.

Read: architectures standard, gated, topk and jumprelu (BatchTopK and Matryoshka SAEs are saved as
jumprelu), with the configs of SAELens 6 (nested metadata) and of the versions before it (flat, with
other names). Whatever changes what an SAE computes and is not implemented is refused by name.
Arrays stay memory-mapped in the file's own type.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from qkattr.errors import InputError, clipped
from qkattr.load.dictionaries.header import (
    AVERAGE,
    NORMALISATIONS,
    Folder,
    Found,
    Header,
    Options,
    Part,
    SaeFields,
    check_tensors,
    exponential,
)
from qkattr.load.dictionaries.hooks import boundary, canonical
from qkattr.load.tensors.mapped import open_mapped
from qkattr.sources.dictionary import DictionaryConfig

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_ACTIVATIONS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
#: Dictionaries of SAELens that are no SAEs of what they read, by architecture.
_OTHERS = {
    "transcoder": "transcoder",
    "skip_transcoder": "transcoder",
    "jumprelu_transcoder": "transcoder",
    "jumprelu_skip_transcoder": "transcoder",
    "temporal": "temporal SAE",
}


def _architecture(fields: SaeFields) -> str:
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


def _k(fields: SaeFields) -> int:
    arguments = fields.get("activation_fn_kwargs", default={})
    k = fields.get("k", default=arguments.get("k") if isinstance(arguments, dict) else None)
    return fields.k(k, fields.size("d_sae"))


def _normalisation(fields: SaeFields, options: Options) -> str:
    if options.normalize_activations is not None:
        return options.normalize_activations
    kind = fields.get("normalize_activations", default="none")
    if isinstance(kind, bool):
        kind = AVERAGE if kind else "none"
    if kind not in NORMALISATIONS:
        raise fields.refuse(
            f"normalize_activations {clipped(repr(kind), 40)} is not implemented; known are "
            f"{', '.join(NORMALISATIONS)}"
        )
    return kind


def _centred(fields: SaeFields) -> bool:
    """Whether it was trained on a model that TransformerLens had centred."""
    loaded = fields.get("model_from_pretrained_kwargs", default={})
    return isinstance(loaded, dict) and loaded.get("center_writing_weights") is True


def _dictionary_config(fields: SaeFields, kind: str) -> DictionaryConfig:
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
    architecture = _architecture(fields)
    before_v6 = "metadata" not in fields.flat
    return DictionaryConfig(
        activation=_ACTIVATIONS[architecture],
        k=_k(fields) if architecture == "topk" else None,
        subtract_b_dec=fields.typed(bool, "apply_b_dec_to_input", default=True),
        normalize="none" if kind == AVERAGE else kind,
        centre=_centred(fields),
        rescale_by_decoder_norm=architecture == "topk"
        and fields.typed(bool, "rescale_acts_by_decoder_norm", default=False),
        prepend_bos=fields.typed(bool, "prepend_bos", default=True if before_v6 else None),
    )


def _parts(activation: str, found: Collection[str]) -> dict[str, Part]:
    names = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
    if activation == "gated":
        names |= {"b_enc": "b_mag", "b_gate": "b_gate", "r_mag": "r_mag"}
    parts = {name: Part(stored) for name, stored in names.items()}
    if activation == "jumprelu":
        log = "log_threshold" in found and "threshold" not in found  # a checkpoint before 6.48
        parts["threshold"] = Part("log_threshold", apply=exponential) if log else Part("threshold")
    return parts


def find(at: Folder, options: Options) -> list[Found]:
    """The SAE of a folder, its config looked at."""
    for name in (CONFIG, WEIGHTS):
        if not at.has(name):
            raise InputError(f"{at.path} has no {name}; give a folder that SAELens saved an SAE to")
    fields = SaeFields(at.path, CONFIG, nested="metadata")
    hook = _hook(fields)
    return [Found(at.path, hook, partial(_read, fields, hook, options))]


def _hook(fields: SaeFields) -> str:
    """The hook that the config names; where it names none, that of the folder's name."""
    if other := _OTHERS.get(fields.typed(str, "architecture", default="standard")):
        return other
    hook = fields.typed(str, "hook_name", "hook_point", "hf_hook_name", default="")
    if fields.typed(str, "hook_name_out", default=hook) != hook:
        return "transcoder"
    folder = canonical(fields.folder.absolute().name)
    return canonical(hook) or (folder if boundary(folder) is not None else "")


def _read(fields: SaeFields, hook: str, options: Options) -> Header:
    """Everything but the weights, checked."""
    folder, kind = fields.folder, _normalisation(fields, options)
    config = _dictionary_config(fields, kind)
    file = open_mapped(folder / WEIGHTS, where=f"SAE {folder.name}: {WEIGHTS}")
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
        parts=_parts(config.activation, file.shapes()),
        spare=frozenset({"scaling_factor"}),
        scaled=kind == AVERAGE,
        source=CONFIG,
    )
    return check_tensors(header)
