"""A trained set as SAELens folders.

Inputs were scaled by c; the scale is folded, so that the SAEs read raw residual units: with
y = c x, the same features fire when b_enc, b_dec and the threshold are divided by c and the weights
are kept. Activations are then in residual units, and decoder rows have norm 1. batchtopk and
jumprelu are saved as jumprelu, as SAELens does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qkattr.config import ModelConfig
from qkattr.errors import InputError
from qkattr.files import write_files
from qkattr.load.dictionaries import CONFIG, WEIGHTS, load_saes
from qkattr.load.dictionaries.packing import pack_saes
from qkattr.sources.dictionary import Dictionary, DictionaryConfig
from qkattr.train.config import TrainConfig
from qkattr.train.rounding import rounded
from qkattr.train.sae import SAE
from qkattr.train.step import TrainState


def dictionaries(
    state: TrainState, scale: Float[Array, "L"], *, cfg: TrainConfig
) -> tuple[Dictionary, ...]:
    """One dictionary a boundary, in residual units."""
    sae = jax.device_get(jax.vmap(rounded)(state.sae, state.grid) if cfg.bits else state.sae)
    scale_L, threshold_L = np.asarray(scale), np.asarray(state.threshold)
    topk = cfg.activation == "topk"
    config = DictionaryConfig(
        activation="topk" if topk else "jumprelu", k=cfg.k if topk else None, prepend_bos=True
    )

    def threshold(b: int) -> np.ndarray | None:
        if topk:
            return None
        if cfg.activation == "jumprelu":
            return np.exp(sae.log_threshold_M[b]) / scale_L[b]
        return np.full(cfg.width, threshold_L[b] / scale_L[b], np.float32)

    return tuple(
        Dictionary(
            w_enc_DM=sae.w_enc_MD[b].T,
            w_dec_MD=sae.w_dec_MD[b],
            b_enc_M=sae.b_enc_M[b] / scale_L[b],
            b_dec_D=sae.b_dec_D[b] / scale_L[b],
            threshold_M=threshold(b),
            config=config,
        )
        for b in range(len(scale_L))
    )


def write_packed(folder: Path, path: Path, state: TrainState, *, cfg: TrainConfig) -> None:
    """Pack the written set on the grid it was trained on."""
    grid = jax.device_get(state.grid)
    n = len(grid.half)
    grids = {
        b + 1: {
            "W_enc": (grid.scale_enc_MG[b], grid.gain_enc_D[b]),
            "W_dec": (grid.scale_dec_MG[b], grid.gain_dec_D[b]),
        }
        for b in range(n)
    }
    pack_saes(folder, path, bits=cfg.bits, wide=cfg.wide, grids=grids)


def write_saes(
    folder: Path, trained: tuple[Dictionary, ...], *, model_name: str, context: int
) -> list[Path]:
    """Write one SAELens folder a boundary, `blocks.{i}.hook_resid_post`."""
    from safetensors.numpy import save

    written = []
    for i, dictionary in enumerate(trained):
        hook = f"blocks.{i}.hook_resid_post"
        tensors = {
            "W_enc": dictionary.w_enc_DM,
            "W_dec": dictionary.w_dec_MD,
            "b_enc": dictionary.b_enc_M,
            "b_dec": dictionary.b_dec_D,
            "threshold": dictionary.threshold_M,
        }
        arrays = {
            k: np.ascontiguousarray(v, np.float32) for k, v in tensors.items() if v is not None
        }
        config = saelens_config(dictionary, hook=hook, model_name=model_name, context=context)
        write_files(
            folder / hook, {WEIGHTS: save(arrays), CONFIG: json.dumps(config, indent=2).encode()}
        )
        written.append(folder / hook)
    return written


def saelens_config(
    dictionary: Dictionary, *, hook: str, model_name: str, context: int
) -> dict[str, Any]:
    """The cfg.json of SAELens 6 for an SAE that reads the stream as it is."""
    d, m = dictionary.w_enc_DM.shape
    own = dict(k=dictionary.config.k, rescale_acts_by_decoder_norm=False)
    return {
        "architecture": dictionary.config.activation,
        "d_in": d,
        "d_sae": m,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **(own if dictionary.config.activation == "topk" else {}),
        "metadata": {
            "model_name": model_name,
            "hook_name": hook,
            "prepend_bos": True,
            "context_size": context,
        },
    }


def open_start(folder: str, *, model: ModelConfig, cfg: TrainConfig) -> tuple[Dictionary, ...]:
    """The SAEs of a folder or packed file that a run is to go on from.

    Raises:
      InputError: they are not SAEs of this kind and width after every block, or read their input
        otherwise than the trainer does.
    """
    found = cast(tuple[Dictionary, ...], load_saes(folder, model)[1:])
    for b, d in enumerate(found, start=1):
        same = d.config.activation == cfg.activation and d.config.subtract_b_dec
        if not same or d.config.normalize != "none" or d.width != cfg.width:
            raise InputError(
                f"start: the SAE at boundary {b} of {folder} is {d.config.activation} of width "
                f"{d.width} ({d.config.normalize} normalisation), the run trains {cfg.activation} "
                f"of width {cfg.width} on the stream as it is; give a set of that kind"
            )
    return found


def start_from(found: tuple[Dictionary, ...], scale: Float[Array, "L"]) -> SAE:
    """SAEs, stacked, as parameters over scaled inputs."""
    each = [_parameters(d, float(c)) for d, c in zip(found, np.asarray(scale), strict=True)]
    return jax.tree.map(lambda *arrays: jnp.asarray(np.stack(arrays)), *each)


def _parameters(d: Dictionary, scale: float) -> SAE:
    """One SAE over inputs times `scale`, its decoder rows brought to norm 1."""
    w_dec = np.float32(d.w_dec_MD)
    norm = np.maximum(np.linalg.norm(w_dec, axis=1), 1e-12)
    jump = d.threshold_M is not None
    return SAE(
        w_enc_MD=np.float32(d.w_enc_DM).T * norm[:, None],
        w_dec_MD=w_dec / norm[:, None],
        b_enc_M=np.float32(d.b_enc_M) * norm * scale,
        b_dec_D=cast(Any, np.float32(d.b_dec_D) * scale),
        log_threshold_M=np.log(np.float32(d.threshold_M) * norm * scale) if jump else None,
    )
