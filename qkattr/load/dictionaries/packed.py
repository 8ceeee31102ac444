"""All SAEs of a model in one safetensors file, their weights as blockwise integers.

For the SAE at hook h: `h.W_enc.codes`, `.scales`, `.gain` and the same of `W_dec` (see `blockwise`;
both matrices `[M, D]`, a feature a row, so that blocks run along d_model), and float32 `h.b_enc`,
`h.b_dec`, of jumprelu also `h.threshold`. The file's metadata has one entry, `qkattr.packed_saes`:
JSON of the layout's version and of each SAE's config. `docs/formats.md` describes it for others.
Axes: M dictionary width, D d_model.
Exact: biases and thresholds. Approximate: the weights, read as float16; `pack_saes` says how much.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
import numpy as np
from safetensors.numpy import save

from qkattr.config import ModelConfig
from qkattr.errors import InputError, clipped, some
from qkattr.files import replacing
from qkattr.load.dictionaries import by_boundary, check_set, find_saes, map_sae
from qkattr.load.dictionaries.blockwise import (
    Blockwise,
    dequantise,
    on_grid,
    quantise,
    relative_error,
    shapes,
)
from qkattr.load.tensors.mapped import MappedTensors, check_finite, open_mapped
from qkattr.sources.dictionary import Dictionary, DictionaryConfig

METADATA, VERSION = "qkattr.packed_saes", 1
Bits = Literal[4, 8]
Grid = tuple[np.ndarray, np.ndarray]  # scales `[M, G]` and gain `[D]` of a matrix
_MATRICES = ("W_enc", "W_dec")
_VECTORS = {
    "b_enc": "b_enc_M",
    "b_dec": "b_dec_D",
    "threshold": "threshold_M",
    "b_gate": "b_gate_M",
    "r_mag": "r_mag_M",
    "factor": "factor",
}
_OF_KIND = {"jumprelu": ("threshold",), "gated": ("b_gate", "r_mag")}
_TYPES = {"codes": "U8", "scales": "F16", "gain": "F32"}

#: A matrix that comes back with a larger relative error than this is not worth writing.
_USELESS = 0.5


class _Config(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """An SAE in the metadata. The fields from `activation` to `centre` are those of
    `DictionaryConfig`. The last three are written only where they are not the default."""

    hook_name: str
    model_name: str | None
    d_in: Annotated[int, msgspec.Meta(ge=1)]
    d_sae: Annotated[int, msgspec.Meta(ge=1)]
    bits: Bits
    block: Annotated[int, msgspec.Meta(ge=2, le=1024, multiple_of=2)]
    activation: Literal["relu", "topk", "jumprelu", "gated"]
    k: Annotated[int, msgspec.Meta(ge=1)] | None
    subtract_b_dec: bool
    normalize: Literal["none", "constant_norm_rescale", "layer_norm"]
    rescale_by_decoder_norm: bool
    prepend_bos: bool | None
    centre: bool = False
    scaled: bool = False
    l0: Annotated[float, msgspec.Meta(gt=0)] | None = None

    def dictionary(self) -> DictionaryConfig:
        names = (field.name for field in dataclasses.fields(DictionaryConfig))
        return DictionaryConfig(**{name: getattr(self, name) for name in names})

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each of its tensors in the file."""
        parts = shapes(self.d_sae, self.d_in, bits=self.bits, block=self.block)
        of = {
            f"{w}.{part}": (_TYPES[part], shape) for w in _MATRICES for part, shape in parts.items()
        }
        of |= {"b_enc": ("F32", (self.d_sae,)), "b_dec": ("F32", (self.d_in,))}
        of |= {name: ("F32", (self.d_sae,)) for name in _OF_KIND.get(self.activation, ())}
        of |= {"factor": ("F32", (1,))} if self.scaled else {}
        return {f"{self.hook_name}.{name}": what for name, what in of.items()}


class _Metadata(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    saes: list[_Config]


@dataclasses.dataclass(frozen=True)
class _Packed:
    """One SAE of an open file; what `check_set` asks of it."""

    name: str
    config: _Config
    file: MappedTensors

    @property
    def hook(self) -> str:
        return self.config.hook_name

    @property
    def d_in(self) -> int:
        return self.config.d_in


@dataclasses.dataclass(frozen=True)
class PackedError:
    """What packing did to the weights of one boundary: |w - w'| / |w| of its two matrices."""

    boundary: int
    bits: int
    W_enc: float
    W_dec: float


# Writing


def pack_saes(
    folder: str | Path,
    path: str | Path,
    *,
    bits: int = 4,
    block: int = 32,
    wide: Collection[int] = (),
    grids: Mapping[int, Mapping[str, Grid]] | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> tuple[PackedError, ...]:
    """Pack a folder of SAEs into one file, whole or not at all.

    bits: 4 or 8 a weight. block: weights that share a scale, an even number up to 1024. wide:
    boundaries that get 8 bits in any case. grids: scales and gains to round to, by boundary and
    matrix, of weights that were trained on them; None: those that fit the weights best.

    Raises:
      InputError: as `load_sae`; the hooks are not boundaries or two are one; the numbers do not fit
        the format; or the file cannot be written.
    """
    if bits not in get_args(Bits) or not (2 <= block <= 1024 and block % 2 == 0):
        raise InputError(
            f"bits={bits}, block={block} is not a format; expected 4 or 8 bits, and an even block "
            "of 2 to 1024 weights"
        )
    headers = find_saes(folder).headers
    if absent := [str(b) for b in wide if b not in headers]:
        raise InputError(
            f"{folder} has no SAE for boundary {some(absent)}, which --wide "
            "names; name another boundary"
        )
    configs, tensors, errors = [], {}, []
    for boundary, header in headers.items():
        progress(f"packing boundary {boundary}")
        width = 8 if boundary in wide else bits
        how = dict(bits=width, block=block, grids=grids and grids[boundary])
        dictionary = map_sae(header)
        packed, error = _pack(dictionary, boundary, **how, name=header.name)
        tensors |= {f"{header.hook}.{name}": tensor for name, tensor in packed.items()}
        errors.append(error)
        configs.append(
            _Config(
                hook_name=header.hook,
                model_name=header.model_name,
                d_in=header.d_in,
                d_sae=header.d_sae,
                bits=width,
                block=block,
                scaled=dictionary.factor is not None,
                l0=None if dictionary.l0 is None else float(dictionary.l0),
                **dataclasses.asdict(header.config),
            )
        )
    metadata = msgspec.json.encode(_Metadata(VERSION, configs)).decode()
    _write(Path(path), save(tensors, {METADATA: metadata}))
    return tuple(errors)


def _pack(
    dictionary: Dictionary,
    boundary: int,
    *,
    bits: int,
    block: int,
    grids: Mapping[str, Grid] | None,
    name: str,
) -> tuple[dict[str, np.ndarray], PackedError]:
    """The SAE's tensors as they are stored, and what became of its weights."""
    vectors = {name: getattr(dictionary, field) for name, field in _VECTORS.items()}
    tensors = {n: np.ascontiguousarray(v, np.float32) for n, v in vectors.items() if v is not None}
    errors = {}
    matrices = np.asarray(dictionary.w_enc_DM).T, np.asarray(dictionary.w_dec_MD)
    for matrix, w in zip(_MATRICES, matrices, strict=True):
        if grids is None:
            packed = quantise(w, bits=bits, block=block)
        else:
            packed = on_grid(w, *grids[matrix], bits=bits, block=block)
        errors[matrix] = relative_error(w, dequantise(packed, bits=bits))
        if not errors[matrix] <= _USELESS:
            raise InputError(
                f"{name}: {matrix}, of weights up to {np.abs(w).max():.2g}, comes back with a "
                f"relative error of {errors[matrix]:.2g}; bring it into the range of float16"
            )
        tensors |= {f"{matrix}.{part}": array for part, array in vars(packed).items()}
    return tensors, PackedError(boundary, bits, **errors)


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        raise InputError(
            f"cannot write {path}: {e.strerror or e}; what was there is unchanged, choose another "
            "path or make room"
        ) from e


# Reading


def _read_metadata(file: MappedTensors) -> list[_Config]:
    if METADATA not in file.metadata:
        raise InputError(
            f"{file.where} is not a packed set of SAEs (no {METADATA} in its metadata); give a "
            "file that `qkattr pack` wrote, or the folder of an SAE"
        )
    try:
        version = msgspec.json.decode(file.metadata[METADATA], type=dict)["version"]
        if version != VERSION:
            raise InputError(
                f"{file.where} has layout {version!r:.40}, this qkattr reads layout {VERSION}; "
                "pack the SAEs again"
            )
        saes = msgspec.json.decode(file.metadata[METADATA], type=_Metadata).saes
    except (msgspec.DecodeError, KeyError, RecursionError) as e:
        raise InputError(
            f"{file.where}: its metadata does not describe packed SAEs ({e}); pack them again"
        ) from e
    if len({sae.hook_name for sae in saes}) < len(saes):
        raise InputError(f"{file.where}: two SAEs have one hook; pack them again")
    return saes


def _check_tensors(file: MappedTensors, saes: list[_Config]) -> None:
    """Names, types and shapes of all tensors against the configs."""
    expected = {name: what for sae in saes for name, what in sae.tensors().items()}
    found = {name: (file.type(name), shape) for name, shape in file.shapes().items()}
    if missing := [name for name in expected if name not in found]:
        raise InputError(f"{file.where} lacks {some(missing)}; copy it again")
    if extra := [name for name in found if name not in expected]:
        raise InputError(
            f"{file.where} holds {some(extra)}, which no config describes; copy the file again"
        )
    for name, (kind, shape) in expected.items():
        if found[name] != (kind, shape):
            got = f"{found[name][0]} {list(found[name][1])}"
            raise InputError(
                f"{file.where}: {name} is {got}, its config calls for {kind} {list(shape)}; pack "
                "the SAEs again"
            )


def _check_config(sae: _Config, name: str) -> None:
    if (sae.activation == "topk") != (sae.k is not None) or (sae.k or 1) > sae.d_sae:
        raise InputError(
            f"{name}: a {sae.activation} SAE of d_sae={sae.d_sae} cannot have k={sae.k}; pack it "
            "again"
        )


def _open(path: Path, config: ModelConfig, missing: str = "error") -> dict[int, _Packed]:
    """Every SAE by its boundary, all but the values checked."""
    file = open_mapped(path, where=str(path))
    saes = _read_metadata(file)
    for sae in saes:
        _check_config(sae, f"{path}: {clipped(sae.hook_name, 60)}")
    headers = by_boundary(_Packed(f"SAE {clipped(sae.hook_name, 60)}", sae, file) for sae in saes)
    check_set(headers, path, config, missing)
    _check_tensors(file, saes)
    return headers


def check_packed(path: str | Path, config: ModelConfig) -> None:
    """Everything that `open_packed` checks, but for the values; reads only the header."""
    _open(Path(path), config)


def open_packed(
    path: str | Path, config: ModelConfig, *, missing: str = "error"
) -> tuple[Dictionary | None, ...]:
    """One dictionary a boundary, `n_blocks + 1` of them; boundary 0 may have None.

    missing: "error", or "raw": a boundary may have no SAE.

    Raises:
      InputError: the file is no packed set, is damaged, or does not belong to the model.
    """
    headers = _open(Path(path), config, missing)
    return tuple(_read(headers[b]) if b in headers else None for b in range(config.n_blocks + 1))


def _read(sae: _Packed) -> Dictionary:
    """The SAE with its weights as float16."""
    names = ("b_enc", "b_dec", *_OF_KIND.get(sae.config.activation, ()))
    factor = _read_vector(sae, "factor").reshape(()) if sae.config.scaled else None
    return Dictionary(
        w_enc_DM=_read_matrix(sae, "W_enc").T,
        w_dec_MD=_read_matrix(sae, "W_dec"),
        **{_VECTORS[name]: _read_vector(sae, name) for name in names},
        factor=factor,
        l0=None if sae.config.l0 is None else np.float32(sae.config.l0),
        config=sae.config.dictionary(),
    )


def _read_vector(sae: _Packed, name: str) -> np.ndarray:
    vector = sae.file.read(f"{sae.hook}.{name}")
    check_finite(vector, f"{sae.hook}.{name}", sae.file.where)
    return vector


def _read_matrix(sae: _Packed, name: str) -> np.ndarray:
    """`[M, D]`."""
    parts = (field.name for field in dataclasses.fields(Blockwise))
    packed = Blockwise(**{part: sae.file.read(f"{sae.hook}.{name}.{part}") for part in parts})
    for part in ("scales", "gain"):
        check_finite(getattr(packed, part), f"{sae.hook}.{name}.{part}", sae.file.where)
    bits = sae.config.bits
    matrix = dequantise(packed, bits=bits)
    most = float(np.abs(packed.scales).max()) * float(np.abs(packed.gain).max()) * 2 ** (bits - 1)
    if most > float(np.finfo(np.float16).max):
        check_finite(matrix, f"{sae.hook}.{name}", sae.file.where)
    return matrix
