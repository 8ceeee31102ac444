"""Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors`): JumpReLU SAEs without a config.

    layer_{L}/width_{W}/average_l0_{N}/params.npz           block L, in a -res repository
    embedding/width_{W}/average_l0_{N}/params.npz           the embedding
    resid_post_all/layer_{L}_width_{W}_l0_{S}/params.safetensors, config.json (may be absent)

Nothing is subtracted or normalised. The embedding's SAE was trained on embeddings that Gemma has
not yet multiplied by sqrt(d): the input is divided by it and the decoder's rows are multiplied, as
SAELens does, which leaves `b_dec` as it is.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qkattr.errors import InputError
from qkattr.load.dictionaries.header import (
    Folder,
    Found,
    Header,
    Options,
    Part,
    SaeFields,
    Tensors,
    check_tensors,
    release_l0,
)
from qkattr.load.dictionaries.hooks import by_names, canonical, own_name
from qkattr.load.tensors.mapped import open_mapped
from qkattr.load.tensors.npz import open_npz
from qkattr.sources.dictionary import DictionaryConfig

NPZ, SAFETENSORS, CONFIG = "params.npz", "params.safetensors", "config.json"
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_LAYER = re.compile(r"layer_(\d{1,4})(?:_.*)?")
_L0 = re.compile(r"average_l0_(\d{1,6})")
_CONFIG = DictionaryConfig(activation="jumprelu", subtract_b_dec=False, prepend_bos=True)


def _sizes(file: Tensors, parts: dict[str, Part], name: str) -> tuple[int, int]:
    shape = file.shapes().get(parts["W_enc"].name, ())
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{name}: {file.where} has no W_enc [d_in, d_sae]; copy it again")
    return shape[0], shape[1]


def _parts(file: Tensors) -> dict[str, Part]:
    """Some files have lowercase names."""
    found = file.shapes()
    return {n: Part(n.lower() if n.lower() in found else n) for n in _NAMES}


def _header(folder: Path, file: Tensors, hook: str, files: tuple[Path, ...], **rest: Any) -> Header:
    name, parts = f"SAE {own_name(folder, 3)}", _parts(file)
    d_in, d_sae = _sizes(file, parts, name)
    return Header(
        folder=folder,
        name=name,
        hook=hook,
        model_name=rest.get("model_name"),
        d_in=d_in,
        d_sae=d_sae,
        config=_CONFIG,
        file=file,
        files=files,
        parts=parts,
        spare=frozenset({"scaling_factor"}),
        constants=dict(rest.get("constants", {})),
        source="the shape of W_enc",
    )


def _layer(folder: Path) -> int | None:
    """The block that the path names, the innermost."""
    found = [match for part in folder.absolute().parts if (match := _LAYER.fullmatch(part))]
    return int(found[-1][1]) if found else None


def find_1(at: Folder, options: Options) -> list[Found]:
    """Gemma Scope 1: the same layout at every hook, which only the repository's name tells."""
    folder = at.path
    if "embedding" in folder.absolute().parts[-3:]:
        hook = "hook_embed"
    else:
        hook = by_names(folder, _layer(folder), stated=options.hook)
    assert hook is not None  # there is a default
    return [Found(folder, hook, partial(_read_1, folder, hook))]


def _read_1(folder: Path, hook: str) -> Header:
    path, l0 = folder / NPZ, _L0.fullmatch(folder.absolute().name)
    file = open_npz(path, f"SAE {folder.name}: {NPZ}")
    header = _header(folder, file, hook, (path,))
    header.constants.update(release_l0(int(l0[1]) if l0 else None))
    if hook == "hook_embed":
        root = header.d_in**0.5
        header.constants["factor"] = np.float32(1 / root)
        header.parts["b_dec"] = Part(
            header.parts["b_dec"].name, apply=lambda b: np.asarray(b, np.float32) / root
        )
    return check_tensors(header)


def find_2(at: Folder, options: Options) -> list[Found]:
    """Gemma Scope 2: the hook is in config.json, or else in the folders' names."""
    folder = at.path
    fields = SaeFields(folder, CONFIG) if at.has(CONFIG) else None
    hook = (fields and _hook(fields)) or by_names(folder, _layer(folder), stated=options.hook)
    assert hook is not None  # there is a default
    return [Found(folder, hook, partial(_read_2, folder, fields, hook))]


def _hook(fields: SaeFields) -> str | None:
    """What the config says of the hook, if it says anything."""
    kind = fields.typed(str, "type", default="sae")
    if kind != "sae":
        return {"clt": "cross-layer transcoder"}.get(kind, kind)
    point = fields.typed(str, "hf_hook_point_in", default=None)
    if fields.typed(str, "hf_hook_point_out", default=point) != point:
        return "transcoder"
    return None if point is None else canonical(point)


def _read_2(folder: Path, fields: SaeFields | None, hook: str) -> Header:
    path, files, rest = folder / SAFETENSORS, (), {}
    if fields is not None:
        files = (folder / CONFIG,)
        architecture = fields.typed(str, "architecture", default="jump_relu")
        if architecture != "jump_relu":
            raise fields.refuse(
                f"architecture {architecture!r:.40} is not implemented; known is jump_relu"
            )
        rest = dict(
            model_name=fields.typed(str, "model_name", default=None),
            constants=release_l0(fields.get("l0")),
        )
    file = open_mapped(path, where=f"SAE {folder.name}: {SAFETENSORS}")
    return check_tensors(_header(folder, file, hook, (*files, path), **rest))
