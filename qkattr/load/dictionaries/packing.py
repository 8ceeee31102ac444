"""Packing SAEs: a folder of them into one GGUF file, see `packed`.

Axes: M dictionary width, D d_model, G blocks of a row.
Exact: biases and thresholds. Approximate: the weights; `pack_saes` says by how much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from qkattr.errors import InputError, some
from qkattr.files import replacing
from qkattr.load.dictionaries.find import find_saes
from qkattr.load.dictionaries.header import FIELDS, map_sae
from qkattr.load.dictionaries.packed import GAIN, METADATA, VERSION, Metadata, Sae
from qkattr.load.dictionaries.quantised import (
    KINDS,
    Quantised,
    dequantise,
    on_grid,
    quantise,
    relative_error,
)
from qkattr.sources.dictionary import Dictionary

_Grid = tuple[np.ndarray, np.ndarray]  # scales `[M, G]` and gain `[D]` of a matrix
_ARCHITECTURE = "qkattr-saes"

#: A matrix that comes back with a larger relative error than this is not worth writing.
_USELESS = 0.5


@dataclasses.dataclass(frozen=True)
class PackedError:
    """What packing did to the weights of one boundary: |w - w'| / |w| of its two matrices."""

    boundary: int
    bits: int
    W_enc: float
    W_dec: float


def pack_saes(
    folder: str | Path,
    path: str | Path,
    *,
    bits: int = 4,
    wide: Collection[int] = (),
    grids: Mapping[int, Mapping[str, _Grid]] | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> tuple[PackedError, ...]:
    """Pack a folder of SAEs into one file, whole or not at all.

    bits: 4 or 8 a weight. wide: boundaries that get 8 bits in any case. grids: scales and gains to
    round to, by boundary and matrix, of weights that were trained on them; None: those that fit the
    weights best.

    Raises:
      InputError: as `load_saes`; the hooks are no boundaries or two are one; numbers do not fit
        the format; or the file cannot be written.
    """
    if bits not in KINDS.values():
        raise InputError(f"bits={bits} is not a format; expected 4 or 8 bits a weight")
    headers = find_saes(folder).headers
    if absent := [str(b) for b in wide if b not in headers]:
        raise InputError(
            f"{folder} has no SAE for boundary {some(absent)}, which --wide "
            "names; name another boundary"
        )
    saes, tensors, errors = [], {}, []
    for boundary, header in headers.items():
        progress(f"packing boundary {boundary}")
        width, dictionary = 8 if boundary in wide else bits, map_sae(header)
        grid = grids[boundary] if grids else {}
        stored, error = _stored(dictionary, width, grid, header.name)
        tensors |= {f"{header.hook}.{name}": tensor for name, tensor in stored.items()}
        errors.append(PackedError(boundary, width, **error))
        stated = {n: getattr(dictionary, n) for n in ("factor", "l0")}
        saes.append(
            Sae(
                header.hook, header.model_name, header.d_in, header.d_sae, header.config,
                **{name: None if value is None else float(value) for name, value in stated.items()},
            )
        )  # fmt: skip
    _write(Path(path), Metadata(VERSION, saes), tensors)
    return tuple(errors)


def _stored(
    dictionary: Dictionary, bits: int, grid: Mapping[str, _Grid], name: str
) -> tuple[dict[str, np.ndarray | Quantised], dict[str, float]]:
    """The SAE's tensors as they are stored, and the relative errors of its two matrices."""
    fields = {name: getattr(dictionary, field) for name, field in FIELDS.items()}
    matrices = {
        "W_enc": np.asarray(fields.pop("W_enc")).T,
        "W_dec": np.asarray(fields.pop("W_dec")),
    }
    vectors = {n: np.ascontiguousarray(v, np.float32) for n, v in fields.items() if v is not None}
    tensors: dict[str, np.ndarray | Quantised] = dict(vectors)
    errors: dict[str, float] = {}
    for matrix, w in matrices.items():
        packed = on_grid(w, *grid[matrix], bits=bits) if grid else quantise(w, bits=bits)
        errors[matrix] = relative_error(w, dequantise(packed))
        if not errors[matrix] <= _USELESS:
            raise InputError(
                f"{name}: {matrix}, of weights up to {np.abs(w).max():.2g}, comes back with a "
                f"relative error of {errors[matrix]:.2g}; bring it into the range of float16"
            )
        tensors |= {matrix: packed, matrix + GAIN: packed.gain}
    return tensors, errors


def _write(path: Path, metadata: Metadata, tensors: Mapping[str, np.ndarray | Quantised]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, closing(GGUFWriter(temporary, _ARCHITECTURE)) as writer:
            writer.add_string(METADATA, msgspec.json.encode(metadata).decode())
            for name, tensor in tensors.items():
                if isinstance(tensor, Quantised):
                    kind = GGMLQuantizationType[tensor.kind]
                    writer.add_tensor(name, tensor.rows, raw_dtype=kind)
                else:
                    writer.add_tensor(name, tensor)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
    except OSError as e:
        raise InputError(
            f"cannot write {path}: {e.strerror or e}; what was there is unchanged, choose another "
            "path or make room"
        ) from e
