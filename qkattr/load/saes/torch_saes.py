"""SAEs in PyTorch files: dictionary_learning's `ae.pt` with its config.json (SAEBench, andyrdt and
others save so) and Qwen Scope's `layer{L}.sae.pt`.

Of dictionary_learning: AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder,
AutoEncoderTopK, and BatchTopKSAE and MatryoshkaBatchTopKSAE, which have one threshold for all
features. Its gated and jumprelu classes give activations times decoder norm; here they are what
multiplies the decoder's row.
"""

from __future__ import annotations

import re
from pathlib import Path

from qkattr.errors import InputError, clipped
from qkattr.load.saes.header import Fields, Header, Options, Part, check_tensors, release_l0
from qkattr.load.torch_file import open_torch
from qkattr.sources.dictionary import DictionaryConfig

CONFIG, WEIGHTS = "config.json", "ae.pt"
_LINEAR = {
    "W_enc": Part("encoder.weight", transposed=True),
    "W_dec": Part("decoder.weight", transposed=True),
}
_PLAIN = {name: Part(name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
_BIAS = {"b_enc": Part("encoder.bias")}
_ONE_THRESHOLD = {"threshold": Part("threshold", scalar=True)}
_GATED = {"b_enc": "mag_bias", "b_gate": "gate_bias", "r_mag": "r_mag", "b_dec": "decoder_bias"}

#: Of each class: the activation, whether b_dec is subtracted, and where the tensors are.
_CLASSES: dict[str, tuple[str, bool, dict[str, Part]]] = {
    "AutoEncoder": ("relu", True, _LINEAR | _BIAS | {"b_dec": Part("bias")}),
    "AutoEncoderNew": ("relu", False, _LINEAR | _BIAS | {"b_dec": Part("decoder.bias")}),
    "GatedAutoEncoder": ("gated", True, _LINEAR | {n: Part(s) for n, s in _GATED.items()}),
    "JumpReluAutoEncoder": ("jumprelu", False, _PLAIN | {"threshold": Part("threshold")}),
    "AutoEncoderTopK": ("topk", True, _LINEAR | _BIAS | {"b_dec": Part("b_dec")}),
    "BatchTopKSAE": (
        "jumprelu",
        True,
        _LINEAR | _BIAS | {"b_dec": Part("b_dec")} | _ONE_THRESHOLD,
    ),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True, _PLAIN | _ONE_THRESHOLD),
}
_TRAINING = frozenset({"k", "threshold", "group_sizes", "active_groups"})
_QWEN = re.compile(r"layer(\d{1,4})\.sae\.pt")
_QWEN_K = re.compile(r".*-L0_(\d{1,5})")
_QWEN_PARTS = {
    "W_enc": Part("W_enc", transposed=True),
    "W_dec": Part("W_dec", transposed=True),
    "b_enc": Part("b_enc"),
    "b_dec": Part("b_dec"),
}


def read(folder: Path, options: Options) -> list[Header]:
    """One SAE of dictionary_learning, everything but its weights."""
    fields = Fields(folder, CONFIG, nested="trainer")
    name = fields.typed(str, "dict_class")
    if name not in _CLASSES:
        raise fields.refuse(
            f"dict_class {clipped(repr(name), 40)} is not implemented; known are "
            f"{', '.join(_CLASSES)}"
        )
    activation, subtract, parts = _CLASSES[name]
    d_sae, k = fields.size("dict_size"), fields.get("k")
    config = DictionaryConfig(
        activation=activation,
        k=fields.k(k, d_sae) if activation == "topk" else None,
        subtract_b_dec=subtract,
    )
    header = Header(
        folder=folder,
        name=f"SAE {'/'.join(folder.absolute().parts[-2:])}",
        hook=_hook(fields),
        model_name=fields.typed(str, "lm_name", default=None),
        d_in=fields.size("activation_dim"),
        d_sae=d_sae,
        config=config,
        file=open_torch(folder / WEIGHTS, f"SAE {folder.name}: {WEIGHTS}"),
        files=(folder / CONFIG, folder / WEIGHTS),
        parts=dict(parts),
        spare=_TRAINING,
        constants=release_l0(k),
        source=CONFIG,
    )
    return [check_tensors(header)]


def _hook(fields: Fields) -> str:
    """The layer's residual stream; the submodule's name, where it says so, is something else."""
    layer, module = fields.typed(int, "layer"), fields.typed(str, "submodule_name", default=None)
    side = re.search(r"resid_(pre|post)", module or "resid_post")
    return f"blocks.{layer}.hook_resid_{side[1]}" if side and layer >= 0 else str(module)


def qwen_layers(folder: Path) -> list[tuple[int, Path]]:
    """Qwen Scope's layers in a folder, and their files."""
    return [(int(m[1]), p) for p in folder.iterdir() if (m := _QWEN.fullmatch(p.name))]


def read_qwen(folder: Path, options: Options) -> list[Header]:
    """All of Qwen Scope's SAEs in a folder, everything but their weights."""
    return [_read_qwen(path, layer, options) for layer, path in sorted(qwen_layers(folder))]


def _read_qwen(path: Path, layer: int, options: Options) -> Header:
    name = f"SAE {path.name}"
    file = open_torch(path, name)
    shape = file.shapes().get("W_enc", ())
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{name} has no W_enc [d_sae, d_in]; copy it again")
    said = [m for part in path.absolute().parts if (m := _QWEN_K.fullmatch(part))]
    k = options.k if options.k is not None else int(said[-1][1]) if said else None
    if k is None or not 1 <= k <= shape[0]:
        raise InputError(
            f"{name}: its k should be in 1..{shape[0]}, got {k}; it is in the repository's name "
            "(...-L0_50): name the folder so, or give k in qkattr.toml"
        )
    header = Header(
        folder=path,
        name=name,
        hook=f"blocks.{layer}.hook_resid_post",
        model_name=None,
        d_in=shape[1],
        d_sae=shape[0],
        config=DictionaryConfig(activation="topk", k=k, subtract_b_dec=False),
        file=file,
        files=(path,),
        parts=dict(_QWEN_PARTS),
        source="the shape of W_enc",
    )
    return check_tensors(header)
