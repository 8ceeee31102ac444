"""EleutherAI sparsify: one folder a hookpoint with `cfg.json` and `sae.safetensors`.

    a = the k largest of relu((x - b_dec) @ encoder.weight^T + encoder.bias)
    x^ = a @ W_dec + b_dec

as sparsify itself computes it (SAELens's loader transposes W_dec and may leave b_dec in).
`layers.N` and `h.N` are the outputs of blocks, `embed_tokens` the embedding; submodules such as
`layers.N.mlp` are no residual stream.
"""

from __future__ import annotations

import re
from pathlib import Path

from qkattr.errors import clipped
from qkattr.load.mapped import open_mapped
from qkattr.load.saes.header import Fields, Header, Options, Part, check_tensors
from qkattr.sources.dictionary import DictionaryConfig

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_BLOCK = re.compile(r"(?:\w+\.)*(?:layers|h)\.(\d{1,4})")
_EMBEDDING = re.compile(r"(?:\w+\.)*(?:embed_tokens|embed_in|wte)")
_PARTS = {
    "W_enc": Part("encoder.weight", transposed=True),
    "W_dec": Part("W_dec"),
    "b_enc": Part("encoder.bias"),
    "b_dec": Part("b_dec"),
}
#: Options that change what is computed.
_REFUSED = ("transcode", "skip_connection", "embed_skip", "gram_lookup", "signed")


def read(folder: Path, options: Options) -> list[Header]:
    """Read and check everything but the weights."""
    fields = Fields(folder, CONFIG)
    activation = fields.get("activation", default="topk")
    if activation != "topk":
        raise fields.refuse(
            f"activation {clipped(repr(activation), 40)} is not implemented; known is topk"
        )
    if used := [name for name in _REFUSED if fields.get(name, default=False) is not False]:
        raise fields.refuse(
            f"{used[0]} is not implemented; load SAEs that reconstruct what they read"
        )
    d_in = fields.size("d_in")
    d_sae = fields.get("num_latents", default=0)
    d_sae = fields.size("num_latents") if d_sae else d_in * fields.size("expansion_factor")
    header = Header(
        folder=folder,
        name=f"SAE {folder.name}",
        hook=_hook(folder.absolute().name),
        model_name=None,
        d_in=d_in,
        d_sae=d_sae,
        config=DictionaryConfig(activation="topk", k=fields.k(fields.get("k"), d_sae)),
        file=open_mapped(folder / WEIGHTS, where=f"SAE {folder.name}: {WEIGHTS}"),
        files=(folder / CONFIG, folder / WEIGHTS),
        parts=dict(_PARTS),
        source=CONFIG,
    )
    return [check_tensors(header)]


def _hook(hookpoint: str) -> str:
    if match := _BLOCK.fullmatch(hookpoint):
        return f"blocks.{match[1]}.hook_resid_post"
    return "hook_embed" if _EMBEDDING.fullmatch(hookpoint) else hookpoint
