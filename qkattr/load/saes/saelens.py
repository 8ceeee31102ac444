"""SAELens folders (`cfg.json`, `sae_weights.safetensors`) to one `Dictionary` a boundary.

Read: architectures standard, topk and jumprelu (BatchTopK and Matryoshka SAEs are saved as
jumprelu), with the configs of SAELens 6 (nested metadata) and of the versions before it (flat, with
other names). Whatever changes what an SAE computes and is not implemented is refused by name.
`blocks.{i}.hook_resid_post` is boundary i + 1, `blocks.{i}.hook_resid_pre` boundary i, `hook_embed`
boundary 0. Arrays stay memory-mapped in the file's own type.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from qkattr.config import ModelConfig
from qkattr.errors import InputError
from qkattr.load.hf import read_json_object
from qkattr.load.mapped import MappedTensors, check_finite, open_mapped, some
from qkattr.sources.dictionary import Dictionary, DictionaryConfig

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_ACTIVATIONS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
_NORMALISATIONS = ("none", "constant_norm_rescale", "layer_norm")
_RESIDUAL_HOOK = re.compile(r"blocks\.(\d{1,4})\.hook_resid_(pre|post)|hook_embed")
_CHECKED_WHOLE = (
    2**28
)  # bytes of an SAE file up to which every weight is checked at loading; beyond it, the vectors


@dataclasses.dataclass(frozen=True)
class _Header:
    """What is known of an SAE before its weights are read. `name` is how errors call it."""

    folder: Path
    name: str
    hook: str
    model_name: str | None
    d_in: int
    d_sae: int
    config: DictionaryConfig
    file: MappedTensors


class _Fields:
    """A cfg.json, looked up flat, then in SAELens 6's metadata, under all names a field has had."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.flat = read_json_object(folder / CONFIG)
        metadata = self.flat.get("metadata")
        self.metadata = metadata if isinstance(metadata, dict) else {}
        self.before_v6 = "metadata" not in self.flat

    def get(self, *names: str, default: Any = None) -> Any:
        for source in (self.flat, self.metadata):
            for name in names:
                if source.get(name) is not None:
                    return source[name]
        return default

    def refuse(self, message: str) -> InputError:
        return InputError(f"SAE {self.folder.name}: {message}")

    def typed(self, kind: type, *names: str, default: Any = ...) -> Any:
        value = self.get(*names, default=default)
        if value is ...:
            raise self.refuse(f"{CONFIG} has no {names[0]}; it is not a whole SAELens config")
        if value is not default and type(value) is not kind:
            raise self.refuse(
                f"{names[0]} should be {kind.__name__}, got {value!r:.40}; restore its own {CONFIG}"
            )
        return value

    def size(self, *names: str) -> int:
        value = self.typed(int, *names)
        if value < 1:
            raise self.refuse(
                f"{names[0]} should be at least 1, got {value}; restore its own {CONFIG}"
            )
        return value


def _architecture(fields: _Fields) -> str:
    """Before version 6 a TopK SAE was a "standard" one whose activation function is "topk"."""
    architecture = fields.get("architecture", default="standard")
    activation = fields.get("activation_fn_str", "activation_fn", default="relu")
    if architecture == "standard" and activation == "topk":
        return "topk"
    if architecture not in _ACTIVATIONS:
        raise fields.refuse(
            f"architecture {architecture!r} is not implemented; known are {', '.join(_ACTIVATIONS)}"
        )
    if activation not in ("relu", architecture):
        raise fields.refuse(
            f"activation function {activation!r} is not implemented; known are relu and topk"
        )
    return architecture


def _k(fields: _Fields) -> int:
    arguments = fields.get("activation_fn_kwargs", default={})
    k = fields.get("k", default=arguments.get("k") if isinstance(arguments, dict) else None)
    if type(k) is not int or not 1 <= k <= fields.size("d_sae"):
        raise fields.refuse(
            f"a topk SAE needs k in 1..d_sae={fields.size('d_sae')}, got {k!r}; restore its own "
            f"{CONFIG}"
        )
    return k


def _normalisation(fields: _Fields) -> str:
    kind = fields.get("normalize_activations", default="none")
    kind = (
        {True: "expected_average_only_in", False: "none"}[kind] if isinstance(kind, bool) else kind
    )
    if kind == "expected_average_only_in":
        raise fields.refuse(
            "normalize_activations is expected_average_only_in, whose factor is not in the file; "
            "fold it into the weights with SAELens (fold_activation_norm_scaling_factor) and "
            "save again"
        )
    if kind not in _NORMALISATIONS:
        raise fields.refuse(
            f"normalize_activations {kind!r} is not implemented; known are "
            f"{', '.join(_NORMALISATIONS)}"
        )
    return kind


def _dictionary_config(fields: _Fields) -> DictionaryConfig:
    if (reshape := fields.get("reshape_activations", default="none")) != "none":
        raise fields.refuse(
            f"reshape_activations is {reshape!r}; only SAEs over the residual stream itself are "
            "read"
        )
    if (head := fields.get("hook_head_index")) is not None:
        raise fields.refuse(
            f"it reads head {head} alone (hook_head_index); load SAEs of the whole residual stream"
        )
    architecture = _architecture(fields)
    return DictionaryConfig(
        activation=_ACTIVATIONS[architecture],
        k=_k(fields) if architecture == "topk" else None,
        subtract_b_dec=fields.typed(bool, "apply_b_dec_to_input", default=True),
        normalize=_normalisation(fields),
        rescale_by_decoder_norm=architecture == "topk"
        and fields.typed(bool, "rescale_acts_by_decoder_norm", default=False),
        prepend_bos=fields.typed(bool, "prepend_bos", default=True if fields.before_v6 else None),
    )


def _check_tensors(header: _Header) -> None:
    """Names and shapes against the config. The values of a `scaling_factor` are for `map_sae`."""
    d, m = header.d_in, header.d_sae
    expected = {"W_enc": (d, m), "W_dec": (m, d), "b_enc": (m,), "b_dec": (d,)}
    if header.config.activation == "jumprelu":
        expected["threshold"] = (m,)
    found = header.file.shapes()
    kind = f"a {header.config.activation} SAE"
    if missing := [name for name in expected if name not in found]:
        raise InputError(
            f"{header.name}: {WEIGHTS} lacks {some(missing)}, which {kind} needs; copy it again"
        )
    if extra := [name for name in found if name not in expected and name != "scaling_factor"]:
        raise InputError(
            f"{header.name}: {WEIGHTS} holds {some(extra)}, for which {kind} has no use; see its "
            f"{CONFIG}"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            got, want = list(found[name]), list(shape)
            raise InputError(
                f"{header.name}: {name} has shape {got}, {CONFIG} (d_in={d}, d_sae={m}) calls "
                f"for {want}"
            )


def _read_header(folder: Path) -> _Header:
    """Read and check everything but the weights."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}; give a folder that SAELens saved an SAE to")
    fields = _Fields(folder)
    header = _Header(
        folder=folder,
        name=f"SAE {folder.name}",
        hook=fields.typed(str, "hook_name", "hook_point", default=""),
        model_name=fields.typed(str, "model_name", default=None),
        d_in=fields.size("d_in"),
        d_sae=fields.size("d_sae"),
        config=_dictionary_config(fields),
        file=open_mapped(folder / WEIGHTS, where=f"SAE {folder.name}: {WEIGHTS}"),
    )
    _check_tensors(header)
    return header


def map_sae(header: _Header) -> Dictionary:
    """The SAE as memory-mapped arrays, its values checked."""
    file = header.file
    tensors: dict[str, Any] = {name: file.read(name) for name in file.shapes()}
    whole = sum(tensor.nbytes for tensor in tensors.values()) <= _CHECKED_WHOLE
    for name, tensor in tensors.items():
        if whole or tensor.ndim == 1:
            check_finite(tensor, name, file.where)
    if not np.all(tensors.pop("scaling_factor", np.ones(1)) == 1):
        raise InputError(
            f"{header.name} has a scaling_factor other than one, which is not implemented; fold "
            "it into W_dec"
        )
    return Dictionary(
        w_enc_DM=tensors["W_enc"],
        w_dec_MD=tensors["W_dec"],
        b_enc_M=tensors["b_enc"],
        b_dec_D=tensors["b_dec"],
        threshold_M=tensors.get("threshold"),
        config=header.config,
    )


def load_sae(folder: str | Path) -> Dictionary:
    """Read one SAELens folder, whatever hook it was trained on.

    Raises:
      InputError: files are missing or damaged, the tensors do not fit the config or are not finite,
        or the SAE computes something that qkattr does not implement.
    """
    return map_sae(_read_header(Path(folder)))


def sae_folders(path: str | Path) -> tuple[Path, ...]:
    """The SAE folders at or below `path`."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(
            f"no such folder: {path}; give a folder of SAELens SAEs, one after every block, or "
            "a packed file"
        )
    folders = tuple(sorted(config.parent for config in path.rglob(CONFIG)))
    if not folders:
        raise InputError(
            f"{path} holds no SAE (no {CONFIG} in it or below it); give a folder of SAELens SAEs"
        )
    return folders


def sae_model_names(path: str | Path) -> set[str]:
    """The models that the SAEs at `path` say they were trained on; empty when they do not say."""
    names = (_Fields(folder).typed(str, "model_name", default=None) for folder in sae_folders(path))
    return {name for name in names if name}


class SaeHeader(Protocol):
    """What an SAE is checked by before its weights are read. `name` is how errors call it."""

    @property
    def name(self) -> str: ...
    @property
    def hook(self) -> str: ...
    @property
    def d_in(self) -> int: ...


Header = TypeVar("Header", bound=SaeHeader)


def _boundary(header: SaeHeader) -> int:
    match = _RESIDUAL_HOOK.fullmatch(header.hook)
    if not match:
        raise InputError(
            f"{header.name} was trained at {header.hook or 'a hook that it does not name'}; "
            "expected blocks.N.hook_resid_pre, blocks.N.hook_resid_post or hook_embed; load "
            "residual-stream SAEs"
        )
    return 0 if match[1] is None else int(match[1]) + (match[2] == "post")


def read_headers(path: str | Path) -> dict[int, _Header]:
    """Every SAE at or below `path` by its boundary, the first boundary first."""
    return by_boundary(_read_header(folder) for folder in sae_folders(path))


def by_boundary(headers: Iterable[Header]) -> dict[int, Header]:
    """The SAEs by boundary, the first boundary first; one a boundary."""
    found: dict[int, Header] = {}
    for header in headers:
        boundary = _boundary(header)
        if boundary in found:
            first, second = found[boundary].name, header.name
            raise InputError(
                f"{first} and {second} are both for boundary {boundary}, expected one; move one "
                "away"
            )
        found[boundary] = header
    return dict(sorted(found.items()))


def check_set(headers: dict[int, Header], path: str | Path, config: ModelConfig) -> None:
    """Raise `InputError` unless the SAEs are as wide as the model, one after every block."""
    for boundary, header in headers.items():
        if boundary > config.n_blocks:
            raise InputError(
                f"{header.name} is for boundary {boundary}, the model has "
                f"{config.n_blocks} blocks; load the SAEs trained on this model"
            )
        if header.d_in != config.d_model:
            raise InputError(
                f"SAE at boundary {boundary} has d_in={header.d_in}, the model has "
                f"d_model={config.d_model}; load the SAEs trained on this model"
            )
    if missing := [str(b) for b in range(1, config.n_blocks + 1) if b not in headers]:
        raise InputError(
            f"{path} has no SAE for boundary {some(missing, 12)}; expected one after every "
            f"block, 1..{config.n_blocks}"
        )


def _headers(path: str | Path, config: ModelConfig) -> dict[int, _Header]:
    """Every SAE by its boundary, checked against the model."""
    headers = read_headers(path)
    check_set(headers, path, config)
    return headers


def check_saes(path: str | Path, config: ModelConfig) -> None:
    """Everything that `load_saes` checks, but for the values of the weights; reads only headers."""
    _headers(path, config)


def load_saes(path: str | Path, config: ModelConfig) -> tuple[Dictionary | None, ...]:
    """One dictionary a boundary, `n_blocks + 1` of them; boundary 0 may have None.

    path: a folder with SAE folders in or below it, or one SAE folder (of a model of one block).

    Raises:
      InputError: as `load_sae`; or an SAE is not on the residual stream, is not as wide as the
        model, shares its boundary with another; or a boundary after a block has none.
    """
    headers = _headers(path, config)
    return tuple(map_sae(headers[b]) if b in headers else None for b in range(config.n_blocks + 1))
