"""EleutherAI sparsify: one folder a hookpoint with `cfg.json` and `sae.safetensors`.

    a = the k largest of relu((x - b_dec) @ encoder.weight^T + encoder.bias)
    x^ = a @ W_dec + b_dec

as sparsify itself computes it (SAELens's loader transposes W_dec and may leave b_dec in).
`layers.N` and `h.N` are the outputs of blocks, `embed_tokens` the embedding; submodules such as
`layers.N.mlp` are no residual stream. Before it named hookpoints, sparsify saved `layer_N`, trained
on entry N of the model's hidden states: the stream before block N. A single SAE in the root of a
repository has its block in the repository's name.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from qkattr.errors import clipped
from qkattr.load.dictionaries.header import (
    Folder,
    Found,
    Header,
    Options,
    Part,
    SaeFields,
    check_tensors,
)
from qkattr.load.dictionaries.hooks import by_names, canonical, layer_in, other_by_names, own_name
from qkattr.load.tensors.mapped import open_mapped
from qkattr.sources.dictionary import DictionaryConfig

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_PARTS = {
    "W_enc": Part("encoder.weight", transposed=True),
    "W_dec": Part("W_dec"),
    "b_enc": Part("encoder.bias"),
    "b_dec": Part("b_dec"),
}
_HOOKPOINT = re.compile(r"(?:.*\.)?(?:layers|h)\.\d{1,4}(?:\..*)?")
_BEFORE_HOOKPOINTS = re.compile(r"layer_(\d{1,4})")
#: Options that change what is computed.
_REFUSED = ("transcode", "skip_connection", "embed_skip", "gram_lookup", "signed")


def find(at: Folder, options: Options) -> list[Found]:
    """The SAE of a hookpoint, its config and names looked at."""
    fields = SaeFields(at.path, CONFIG)
    hook = _other(fields, options) or _hook(at.path, options)
    return [Found(at.path, hook, partial(_read, fields, hook, options))]


def _hook(folder: Path, options: Options) -> str:
    """The hookpoint that the folder is named after; or else what its name, or that of the
    repository whose root it is, says."""
    name = own_name(folder)
    if match := _BEFORE_HOOKPOINTS.fullmatch(name):
        return f"blocks.{int(match[1])}.hook_resid_pre"
    layer = None if _HOOKPOINT.fullmatch(name) else layer_in(name)
    if layer is None:
        return canonical(name)
    return by_names(folder, layer, stated=options.hook) or canonical(name)


def _other(fields: SaeFields, options: Options) -> str | None:
    """What it is instead of an SAE; configs before `transcode` leave that to the set's name."""
    said = [fields.get(name) for name in ("transcode", "skip_connection")]
    if any(value is True for value in said):
        return "transcoder"
    known = said[0] is False or options.hook is not None
    return None if known else other_by_names(fields.folder)


def _read(fields: SaeFields, hook: str, options: Options) -> Header:
    """Everything but the weights, checked."""
    folder = fields.folder
    activation = fields.get("activation", default="topk")
    if activation != "topk":
        raise fields.refuse(
            f"activation {clipped(repr(activation), 40)} is not implemented; known is topk"
        )
    if used := [name for name in _REFUSED if fields.get(name, default=False) is not False]:
        raise fields.refuse(
            f"{used[0]} is not implemented; load SAEs that reconstruct what they read"
        )
    if fields.get("hook_name", "apply_b_dec_to_input") is not None:
        raise fields.refuse(
            f"{CONFIG} has SAELens's fields and the weights are sparsify's; the two disagree on "
            f"when b_dec is subtracted; restore its own {CONFIG}"
        )
    d_in = fields.size("d_in")
    d_sae = fields.get("num_latents", default=0)
    d_sae = fields.size("num_latents") if d_sae else d_in * fields.size("expansion_factor")
    header = Header(
        folder=folder,
        name=f"SAE {folder.name}",
        hook=hook,
        model_name=None,
        d_in=d_in,
        d_sae=d_sae,
        config=DictionaryConfig(activation="topk", k=fields.k(fields.get("k"), d_sae, options)),
        file=open_mapped(folder / WEIGHTS, where=f"SAE {folder.name}: {WEIGHTS}"),
        files=(folder / CONFIG, folder / WEIGHTS),
        parts=dict(_PARTS),
        source=CONFIG,
    )
    return check_tensors(header)
