"""Reading packed SAEs: all of a model in one GGUF file, their weights at 4 or 8 bits.

For the SAE at hook h: `h.W_enc` and `h.W_dec` (both `[M, D]`, a feature a row, so that blocks run
along d_model; Q4_0 or Q8_0) with a gain each (see `quantised`), and float32 `h.b_enc`, `h.b_dec`,
of jumprelu also `h.threshold`. One string of the metadata, `qkattr.saes`, is JSON of the layout's
version and of each SAE's config. `docs/formats.md` describes it for others; `packing` writes it.
Axes: M dictionary width, D d_model.
Exact: biases and thresholds. Approximate: the weights, read as float16.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from qkattr.errors import InputError, clipped
from qkattr.load.dictionaries.header import MOST, Header, Part, check_tensors
from qkattr.load.dictionaries.quantised import KINDS, Quantised, dequantise, padded
from qkattr.load.tensors.gguf_container import Container, Tensor, open_container
from qkattr.load.tensors.mapped import FLOATS, check_finite
from qkattr.sources.dictionary import DictionaryConfig

METADATA, VERSION = "qkattr.saes", 2
GAIN = ".gain"  # after the name of a matrix
#: What an SAE has beside the biases, by its activation.
_OF_KIND = {"relu": (), "topk": (), "jumprelu": ("threshold",), "gated": ("b_gate", "r_mag")}
_NORMALISE = ("none", "constant_norm_rescale", "layer_norm")
#: In the first bytes of a file of layout 1, which was a safetensors file.
_LAYOUT_1, _HEAD = b"qkattr.packed_saes", 64

Size = Annotated[int, msgspec.Meta(ge=1, le=MOST)]
Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e30)]


class Sae(msgspec.Struct):
    """An SAE in the metadata. factor, l0: see `Dictionary`."""

    hook_name: str
    model_name: str | None
    d_in: Size
    d_sae: Size
    config: DictionaryConfig
    factor: Positive | None
    l0: Positive | None


class Metadata(msgspec.Struct):
    version: int
    saes: list[Sae]


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """The tensors of one SAE in a file, as `header.Tensors`: a matrix with a gain is read as
    float16. own: by their names without the hook."""

    file: Container
    own: dict[str, Tensor]

    @property
    def where(self) -> str:
        return str(self.file.path)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A matrix has as many columns as its gain, which is a part of it; the rest is padding."""
        found = {name: tensor.shape for name, tensor in self.own.items()}
        for name in [name for name in found if name + GAIN in found]:
            found[name] = (found[name][0], *found.pop(name + GAIN))
        return found

    def type(self, name: str) -> str:
        tensor, gain = self.own[name], self.own.get(name + GAIN)
        if gain is None:
            return tensor.kind.name
        fits = tensor.kind.name in KINDS and tensor.shape[1:] == tuple(map(padded, gain.shape))
        return "F16" if fits and gain.kind.name == "F32" else f"{tensor} with the gain {gain}"

    def read(self, name: str) -> np.ndarray:
        """As `MappedTensors.read`; the values of a matrix with a gain are checked."""
        raw, kind = self.file.bytes(self.own[name]), self.own[name].kind.name
        if name + GAIN not in self.own:
            return raw.view(FLOATS[kind])
        matrix = Quantised(raw, self.read(name + GAIN), KINDS[kind])
        weights = dequantise(matrix)
        if not matrix.most() <= float(np.finfo(np.float16).max):  # also where it is nan
            check_finite(weights, name, self.where)
        return weights


def find_packed(path: Path) -> list[Header]:
    """The SAEs of a packed file, all but the values checked.

    Raises:
      InputError: the file is no packed set, or it is damaged.
    """
    file = _open(path)
    saes = _read_metadata(file)
    own: dict[str, dict[str, Tensor]] = {sae.hook_name: {} for sae in saes}
    if len(own) < len(saes):
        raise InputError(f"{path}: two SAEs have one hook; pack them again")
    for name, tensor in file.tensors.items():
        hook = name.removesuffix(GAIN).rpartition(".")[0]
        if hook not in own:
            raise InputError(
                f"{path} holds {name!r:.80}, which no config describes; copy the file again"
            )
        own[hook][name.removeprefix(f"{hook}.")] = tensor
    return [_header(sae, _Tensors(file, own[sae.hook_name])) for sae in saes]


def _open(path: Path) -> Container:
    with path.open("rb") as opened:
        head = opened.read(_HEAD)
    if _LAYOUT_1 in head:
        raise InputError(f"{path} was written by an older qkattr; pack the SAEs again")
    file = open_container(path) if head.startswith(b"GGUF") else None
    if file is None or not isinstance(file.get(METADATA), str):
        raise InputError(
            f"{path} is not a packed set of SAEs; give a file that `qkattr pack` wrote, or the "
            "folder of an SAE"
        )
    return file


def _read_metadata(file: Container) -> list[Sae]:
    try:
        raw = msgspec.json.decode(file.get(METADATA), type=dict)
        if raw["version"] != VERSION:
            raise InputError(
                f"{file.path} has layout {raw['version']!r:.40}, this qkattr reads layout "
                f"{VERSION}; pack the SAEs again"
            )
        metadata = msgspec.convert(raw, Metadata)
        if msgspec.to_builtins(metadata) != raw:  # a field that is ignored may change what it does
            raise ValueError("a field is missing or unknown")
    except (ValueError, KeyError, RecursionError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(
            f"{file.path}: its metadata does not describe packed SAEs ({e}); pack them again"
        ) from e
    return metadata.saes


def _header(sae: Sae, tensors: _Tensors) -> Header:
    name, config = f"SAE {clipped(sae.hook_name, 60)}", sae.config
    known = config.activation in _OF_KIND and config.normalize in _NORMALISE
    k = config.k
    fits = k is None if config.activation != "topk" else k is not None and 1 <= k <= sae.d_sae
    if not (known and fits):
        raise InputError(
            f"{tensors.where}: {name} of d_sae={sae.d_sae} cannot have activation "
            f"{config.activation!r:.40}, k={config.k} and normalize {config.normalize!r:.40}; "
            "pack it again"
        )
    parts = {n: Part(n) for n in ("W_enc", "W_dec", "b_enc", "b_dec", *_OF_KIND[config.activation])}
    stated = {"factor": sae.factor, "l0": sae.l0}
    header = Header(
        folder=tensors.file.path,
        name=name,
        hook=sae.hook_name,
        model_name=sae.model_name,
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        config=config,
        file=tensors,
        files=(tensors.file.path,),
        parts=parts | {"W_enc": Part("W_enc", transposed=True)},
        constants={name: np.float32(value) for name, value in stated.items() if value is not None},
        finite={"W_enc" + GAIN, "W_dec" + GAIN} <= tensors.own.keys(),
    )
    return check_tensors(header)
