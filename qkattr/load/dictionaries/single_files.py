"""SAEs of which each is one PyTorch file, whose name says the layer; several may lie in a folder.

    layer{L}.sae.pt, config.json      Qwen Scope: topk. W_enc, W_dec, b_enc, b_dec
    {name}-SAE-l{L}.pt or .pth        Goodfire (encoder_linear, decoder_linear) and qresearch
                                      (encoder, decoder): relu, weights and biases of two layers

Nothing is subtracted or normalised. Qwen Scope's k and widths are in its config.json; where that is
missing, k is in the repository's name (...-L0_50).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from qkattr.errors import InputError
from qkattr.load.dictionaries.header import (
    Folder,
    Found,
    Header,
    Options,
    Part,
    SaeFields,
    check_tensors,
)
from qkattr.load.dictionaries.hooks import by_name, by_names
from qkattr.load.tensors.archive import Archive
from qkattr.load.tensors.torch_file import open_torch
from qkattr.sources.dictionary import DictionaryConfig

CONFIG = "config.json"
_QWEN = re.compile(r"layer(\d{1,4})\.sae\.pt")
_LINEAR = re.compile(r".*-SAE-l(\d{1,4})\.pth?", re.IGNORECASE)
_QWEN_K = re.compile(r".*-L0_(\d{1,5})")
_QWEN_PARTS = {
    "W_enc": Part("W_enc", transposed=True),
    "W_dec": Part("W_dec", transposed=True),
    "b_enc": Part("b_enc"),
    "b_dec": Part("b_dec"),
}


def qwen_files(at: Folder) -> list[tuple[int, Path]]:
    """Qwen Scope's layers in a folder, and their files."""
    return _files(at, _QWEN)


def linear_files(at: Folder) -> list[tuple[int, Path]]:
    """The layers of Goodfire's or qresearch's SAEs in a folder, and their files."""
    return _files(at, _LINEAR)


def _files(at: Folder, pattern: re.Pattern) -> list[tuple[int, Path]]:
    return sorted((int(m[1]), at.path / n) for n in at.names if (m := pattern.fullmatch(n)))


def find_qwen(at: Folder, options: Options) -> list[Found]:
    """All of Qwen Scope's SAEs in a folder, its config looked at."""
    fields, found = _config(at), []
    for layer, path in qwen_files(at):
        hook = _qwen_hook(fields, path, layer, options)
        found.append(Found(path, hook, partial(_read_qwen, path, hook, layer, fields, options)))
    return found


def _config(at: Folder) -> SaeFields | None:
    """The config of the set; None where there is none, or it is of something else."""
    if not at.has(CONFIG):
        return None
    fields = SaeFields(at.path, CONFIG)
    return None if fields.get("k", "d_sae", "hook_point") is None else fields


def _qwen_hook(fields: SaeFields | None, path: Path, layer: int, options: Options) -> str:
    point = fields and fields.typed(str, "hook_point", default=None)
    if not point:
        return by_names(path, layer, stated=options.hook) or ""
    return by_name(point, layer) or point


def _read_qwen(
    path: Path, hook: str, layer: int, fields: SaeFields | None, options: Options
) -> Header:
    file, name = open_torch(path, f"SAE {path.name}"), f"SAE {path.name}"
    d_sae, d_in = _shape(file, "W_enc")
    if fields is not None:
        _check(fields, layer, {"d_model": d_in, "d_sae": d_sae})
    return check_tensors(
        Header(
            folder=path,
            name=name,
            hook=hook,
            model_name=fields and fields.typed(str, "base_model", default=None),
            d_in=d_in,
            d_sae=d_sae,
            config=DictionaryConfig(
                activation="topk", k=_k(path, d_sae, fields, options), subtract_b_dec=False
            ),
            file=file,
            files=(path,) if fields is None else (path.parent / CONFIG, path),
            parts=dict(_QWEN_PARTS),
            source="the shape of W_enc",
        )
    )


def _check(fields: SaeFields, layer: int, sizes: Mapping[str, int]) -> None:
    """The config, which is one for all layers, against a file."""
    if (kind := fields.typed(str, "model_type", default="topk_sae")) != "topk_sae":
        raise fields.refuse(f"model_type {kind!r:.40} is not implemented; known is topk_sae")
    layers = fields.typed(int, "num_layers", default=layer + 1)
    if layer >= layers:
        raise fields.refuse(f"layer {layer} is there, num_layers is {layers}; copy the set again")
    for name, size in sizes.items():
        if (said := fields.typed(int, name, default=size)) != size:
            raise fields.refuse(
                f"{fields.config} says {name}={said}, layer {layer} has {size}; copy the set again"
            )


def _k(path: Path, d_sae: int, fields: SaeFields | None, options: Options) -> int:
    """k as the config says, or else the user, or else the name of the repository."""
    if fields is not None and fields.get("k") is not None:
        return fields.k(fields.get("k"), d_sae, options)
    said = [m for part in path.absolute().parts if (m := _QWEN_K.fullmatch(part))]
    k = options.k if options.k is not None else int(said[-1][1]) if said else None
    if k is None or not 1 <= k <= d_sae:
        raise InputError(
            f"SAE {path.name}: its k should be in 1..{d_sae}, got {k}; it is in the repository's "
            f"{CONFIG} and name (...-L0_50): copy that, or give k in qkattr.toml"
        )
    return k


def _shape(file: Archive, name: str) -> tuple[int, int]:
    """`(d_sae, d_in)` of an encoder."""
    shape = file.shapes().get(name, ())
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{file.where} has no {name} [d_sae, d_in]; copy it again")
    return shape[0], shape[1]


def find_linear(at: Folder, options: Options) -> list[Found]:
    """The SAEs of a folder that are two linear layers each."""
    return [
        Found(path, f"blocks.{layer}.hook_resid_post", partial(_read_linear, path, layer))
        for layer, path in linear_files(at)
    ]


def _read_linear(path: Path, layer: int) -> Header:
    file = open_torch(path, f"SAE {path.name}")
    tail = "_linear" if "encoder_linear.weight" in file.shapes() else ""
    encoder, decoder = f"encoder{tail}", f"decoder{tail}"
    d_sae, d_in = _shape(file, f"{encoder}.weight")
    return check_tensors(
        Header(
            folder=path,
            name=f"SAE {path.name}",
            hook=f"blocks.{layer}.hook_resid_post",
            model_name=None,
            d_in=d_in,
            d_sae=d_sae,
            config=DictionaryConfig(activation="relu", subtract_b_dec=False),
            file=file,
            files=(path,),
            parts={
                "W_enc": Part(f"{encoder}.weight", transposed=True),
                "W_dec": Part(f"{decoder}.weight", transposed=True),
                "b_enc": Part(f"{encoder}.bias"),
                "b_dec": Part(f"{decoder}.bias"),
            },
            source=f"the shape of {encoder}.weight",
        )
    )
