"""Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors`): JumpReLU SAEs without a config.

    layer_{L}/width_{W}/average_l0_{N}/params.npz           resid_post of block L
    embedding/width_{W}/average_l0_{N}/params.npz           the embedding
    resid_post_all/layer_{L}_width_{W}_l0_{S}/params.safetensors, config.json (may be absent)

Nothing is subtracted or normalised. The embedding's SAE was trained on embeddings that Gemma has
not yet multiplied by sqrt(d): the input is divided by it and the decoder's rows are multiplied, as
SAELens does, which leaves `b_dec` as it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from qkattr.errors import InputError
from qkattr.load.mapped import open_mapped
from qkattr.load.npz import open_npz
from qkattr.load.saes.header import (
    Fields,
    Header,
    Options,
    Part,
    Tensors,
    check_tensors,
    release_l0,
)
from qkattr.sources.dictionary import DictionaryConfig

NPZ, SAFETENSORS = "params.npz", "params.safetensors"
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_LAYER = re.compile(r"layer_(\d{1,4})(?:_.*)?")
_L0 = re.compile(r"average_l0_(\d{1,6})")
_OUTPUT = re.compile(r"model\.(?:language_model\.)?layers\.(\d{1,4})\.output")
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
    name, parts = f"SAE {'/'.join(folder.absolute().parts[-3:])}", _parts(file)
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


def read_1(folder: Path, options: Options) -> list[Header]:
    """Gemma Scope 1."""
    path, layer = folder / NPZ, _layer(folder)
    file = open_npz(path, f"SAE {folder.name}: {NPZ}")
    l0 = _L0.fullmatch(folder.absolute().name)
    hook = "" if layer is None else f"blocks.{layer}.hook_resid_post"
    embedding = "embedding" in folder.absolute().parts[-3:]
    header = _header(folder, file, "hook_embed" if embedding else hook, (path,))
    header.constants.update(release_l0(int(l0[1]) if l0 else None))
    if embedding:
        root = header.d_in**0.5
        header.constants["factor"] = np.float32(1 / root)
        header.parts["b_dec"] = Part(
            header.parts["b_dec"].name, apply=lambda b: np.asarray(b, np.float32) / root
        )
    return [check_tensors(header)]


def read_2(folder: Path, options: Options) -> list[Header]:
    """Gemma Scope 2."""
    path, files = folder / SAFETENSORS, ()
    hook, rest = _hook_of_path(folder), {}
    if (folder / "config.json").is_file():
        fields, files = Fields(folder, "config.json"), (folder / "config.json",)
        architecture = fields.typed(str, "architecture", default="jump_relu")
        if architecture != "jump_relu":
            raise fields.refuse(
                f"architecture {architecture!r:.40} is not implemented; known is jump_relu"
            )
        point = fields.typed(str, "hf_hook_point_in", default=None)
        if point is not None:
            match = _OUTPUT.fullmatch(point)
            hook = f"blocks.{match[1]}.hook_resid_post" if match else point
        rest = dict(
            model_name=fields.typed(str, "model_name", default=None),
            constants=release_l0(fields.get("l0")),
        )
    file = open_mapped(path, where=f"SAE {folder.name}: {SAFETENSORS}")
    return [check_tensors(_header(folder, file, hook, (*files, path), **rest))]


def _hook_of_path(folder: Path) -> str:
    site, layer = folder.absolute().parent.name, _layer(folder)
    if layer is None:
        return ""
    return f"blocks.{layer}.hook_resid_post" if site.startswith("resid_post") else site
