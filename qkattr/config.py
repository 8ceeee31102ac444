"""Configurations: of a model, beyond its weights, and of the sweep.

`qkattr.load.models.families` reads a model's from a Hugging Face `config.json`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qkattr.kinds import NO_WINDOW


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What a block's arithmetic needs beyond its weights. Sizes are read off the weights.

    scale: multiplies q . k.
    norm: "rms" or "layer".
    eps: what norms add to the mean square.
    activation: of the MLP, a key of `model.layers.ACTIVATIONS`.
    softcap: `c * tanh(score / c)` after the scale; None: none.
    parallel: the MLP reads the block's input, not the stream after attention (GPT-NeoX).
    """

    scale: float
    norm: str = "rms"
    eps: float = 1e-5
    activation: str = "silu"
    softcap: float | None = None
    parallel: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary embedding.

    base: of the frequencies' geometric series.
    dims: how many of a head's dimensions turn; 0: none.
    linear: divides every frequency.
    llama3: (factor, low_freq, high_freq, original context).
    """

    base: float
    dims: int
    linear: float = 1.0
    llama3: tuple[float, float, float, int] | None = None

    def inv_freq(self) -> np.ndarray:
        """`[dims/2]` radians per position, in float32 as the checkpoints' own
        code computes them.
        """
        exponent = np.arange(0, self.dims, 2, dtype=np.float32) / np.float32(self.dims)
        inv = (np.float32(1.0) / np.float32(self.base) ** exponent).astype(np.float32)
        inv = inv / np.float32(self.linear)
        if self.llama3 is None:
            return inv
        factor, low_factor, high_factor, original = self.llama3
        wavelength = 2 * math.pi / inv
        smooth = (original / wavelength - low_factor) / (high_factor - low_factor)
        blended = (1 - smooth) * inv / factor + smooth * inv
        scaled = np.where(wavelength > original / low_factor, inv / factor, blended)
        return np.where(wavelength < original / high_factor, inv, scaled).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Hashable: it is a static argument of the jitted functions.

    family: a name of `load.models.families`.
    n_blocks, d_model, n_heads, n_kv_heads, head_dim, d_mlp, vocab: sizes L, D, N, K, H, F, V.
    context: how many positions it was made for.
    block: what its blocks' arithmetic needs.
    rotary: its rotary embedding.
    windows: one a block, NO_WINDOW where it sees everything.
    local_rotary: of the blocks with a window, where it is another than that of the rest (Gemma 3).
    attention_bias, mlp_bias: the checkpoint has them.
    scale_by_depth: scores of block b are divided by b + 1, folded into W_Q and b_Q when they are
      read (GPT-2).
    final_softcap: `c * tanh(logit / c)` (Gemma 2).
    tied: the unembedding is the embedding.
    """

    family: str
    n_blocks: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    vocab: int
    context: int
    block: BlockConfig
    rotary: Rotary
    windows: tuple[int, ...]
    local_rotary: Rotary | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    scale_by_depth: bool = False
    final_softcap: float | None = None
    tied: bool = False

    @property
    def head_grid(self) -> tuple[int, int]:
        """L blocks and N heads: the shape of whatever has one value a head."""
        return self.n_blocks, self.n_heads

    def inv_freq(self) -> np.ndarray:
        """`[L, dims/2]` rotary frequencies of every block."""
        local = self.rotary if self.local_rotary is None else self.local_rotary
        tables = (self.rotary.inv_freq(), local.inv_freq())
        return np.stack([tables[window != NO_WINDOW] for window in self.windows])


#: How an MLP is linearised; see `model.mlp`.
LINEARISATIONS = ("jacobian", "frozen-gate", "half")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Static options of the backward sweep.

    max_rows: R, targets a boundary.
    max_edges: E, sources kept of one target.
    keep: share of a boundary's influence that its kept sources carry.
    linearisation: of the MLP, one of `LINEARISATIONS`.
    through_errors: errors are targets too.
    precision: of all matmuls.
    """

    max_rows: int = 256
    max_edges: int = 64
    keep: float = 0.95
    linearisation: str = "jacobian"
    through_errors: bool = True
    precision: str = "highest"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a result keeps of its model and SAEs, so that it can be read without them.

    model, saes, dtype, missing, accepted: as they were asked for.
    neuronpedia: where Neuronpedia has the SAEs (see `load.registry.Source`), if it is known.
    notes: what is to be known of them.
    n_blocks, n_heads: L and N.
    windows: of every block, `NO_WINDOW` where it sees everything.
    """

    model: str
    saes: str | None
    dtype: str
    neuronpedia: dict[str, Any] | None
    missing: str
    accepted: tuple[str, ...]
    notes: tuple[str, ...]
    n_blocks: int
    n_heads: int
    windows: tuple[int, ...]

    @property
    def head_grid(self) -> tuple[int, int]:
        """L blocks and N heads: the shape of whatever has one value a head."""
        return self.n_blocks, self.n_heads

    def to_json(self) -> dict[str, Any]:
        """As the settings of a result have them."""
        windows = [None if w == NO_WINDOW else w for w in self.windows]
        lists = dict(accepted=list(self.accepted), notes=list(self.notes), windows=windows)
        return vars(self) | lists

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> ModelFacts:
        """From the settings of a result."""
        given = {field.name: settings[field.name] for field in dataclasses.fields(cls)}
        windows = [NO_WINDOW if w is None else w for w in given["windows"]]
        tuples: dict[str, Any] = {k: tuple(given[k]) for k in ("accepted", "notes")}
        tuples["windows"] = tuple(windows)
        return cls(**(given | tuples))
