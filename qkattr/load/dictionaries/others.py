"""Files of dictionaries that are no SAEs, recognised so that they can be refused by what they are.

config.yaml, layer_0.safetensors           transcoders of circuit-tracer
W_enc_0.safetensors                        its cross-layer transcoders
params_layer_0.safetensors                 Gemma Scope 2, below clt/ or crosscoder/
conf.yaml, latest_ckpt.safetensors         temporal SAEs
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from qkattr.errors import InputError
from qkattr.load.dictionaries.header import Found, Header, Options
from qkattr.load.dictionaries.hooks import other_by_names

_GEMMA_SCOPE_2 = "params_layer_0.safetensors"
#: The files of a folder, and what it holds then.
_FILES = (
    (("config.yaml", "layer_0.safetensors"), "transcoder"),
    (("W_enc_0.safetensors",), "cross-layer transcoder"),
    ((_GEMMA_SCOPE_2,), "cross-layer transcoder"),
    (("conf.yaml", "latest_ckpt.safetensors"), "temporal SAE"),
)


def kind_of(folder: Path) -> str | None:
    """The word of `hooks.OTHERS` for what a folder holds; None where it holds none of these."""
    for files, kind in _FILES:
        if all((folder / name).is_file() for name in files):
            return (other_by_names(folder) or kind) if files == (_GEMMA_SCOPE_2,) else kind
    return None


def find(folder: Path, options: Options) -> list[Found]:
    """What lies in a folder; it cannot be read."""
    kind = kind_of(folder)
    return [Found(folder, kind, partial(_refuse, folder, kind))] if kind else []


def _refuse(folder: Path, kind: str) -> Header:
    raise InputError(f"{folder} holds a {kind}; load SAEs, which reconstruct what they read")
