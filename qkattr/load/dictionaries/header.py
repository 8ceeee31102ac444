"""What every format comes down to: a `Header`, and from it the `Dictionary`.

A reader says under which names and in which orientation its file has the tensors (`Part`), and what
its config means for `DictionaryConfig`. Checking and mapping are the same for all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from qkattr.errors import InputError, clipped, some
from qkattr.files import read_json_object
from qkattr.load.dictionaries.hooks import EMBEDDING, canonical, own_name
from qkattr.load.models.families.fields import as_float
from qkattr.load.tensors.mapped import check_finite
from qkattr.sources.dictionary import Dictionary, DictionaryConfig

#: More features, or dimensions, than any SAE has.
MOST = 2**24

#: How inputs are normalised, in SAELens's words.
Normalisation = Literal["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"]
AVERAGE = "expected_average_only_in"
NORMALISATIONS: tuple[str, ...] = get_args(Normalisation)

#: Bytes of an SAE file up to which every weight is checked at loading; beyond it, the vectors.
_CHECKED_WHOLE = 2**28

#: The fields of `Dictionary`, by the names of tensors in SAELens.
FIELDS = {
    "W_enc": "w_enc_DM",
    "W_dec": "w_dec_MD",
    "b_enc": "b_enc_M",
    "b_dec": "b_dec_D",
    "threshold": "threshold_M",
    "b_gate": "b_gate_M",
    "r_mag": "r_mag_M",
}


class Tensors(Protocol):
    """An open file of tensors: safetensors, npz or PyTorch."""

    @property
    def where(self) -> str: ...
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def type(self, name: str) -> str: ...
    def read(self, name: str) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor in the file. transposed: it lies the other way round. scalar: one number for all.
    apply: what makes the tensor that is meant of it."""

    name: str
    transposed: bool = False
    scalar: bool = False
    apply: Callable[[np.ndarray], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """What the files of a set do not say, or say in too many ways.

    pattern: which of several SAEs of a boundary, see `choose`. centre: see `DictionaryConfig`;
    None: as the configs say. normalize_activations: SAELens's word for how inputs are normalised,
    in place of what the configs say. norm_factors: of SAEs whose input was scaled to an average
    norm, by hook. k: of topk SAEs, where neither a config nor the folder's name says it. hook:
    "resid_post" or "resid_pre", where no config says it; then names of folders do not count.
    dict_class: dictionary_learning's, where its configs lack it. llama_scope_threshold: "openmoss"
    or "saelens", see `llama_scope`.
    """

    pattern: str | None = None
    centre: bool | None = None
    normalize_activations: Normalisation | None = None
    norm_factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    k: int | None = None
    hook: Literal["resid_post", "resid_pre"] | None = None
    dict_class: str | None = None
    llama_scope_threshold: str = "openmoss"

    def factor(self, hook: str) -> float | None:
        """What inputs at a hook are multiplied by, if that is given; however the hook is spelt."""
        given = {canonical(name): factor for name, factor in self.norm_factors.items()}
        return given.get(canonical(hook))


@dataclasses.dataclass(frozen=True)
class Header:
    """What is known of an SAE before its weights are read. `name` is how errors call it.

    parts: where its tensors are, by their names in SAELens; those that are left out are zeros or
    none. spare: tensors of the file that have no use here. constants: fields of `Dictionary` that
    come from the config. scaled: inputs are multiplied by a factor that no file has. finite: the
    file checks the values of matrices where it reads them. source: the config, as errors call it.
    """

    folder: Path
    name: str
    hook: str
    model_name: str | None
    d_in: int
    d_sae: int
    config: DictionaryConfig
    file: Tensors
    files: tuple[Path, ...]
    parts: dict[str, Part]
    spare: frozenset[str] = frozenset()
    constants: dict[str, Any] = dataclasses.field(default_factory=dict)
    scaled: bool = False
    finite: bool = False
    source: str = "its config"

    @property
    def l0(self) -> float | None:
        """Features active at a position, as its makers say."""
        said = self.constants.get("l0", self.config.k)
        return None if said is None else float(said)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder, and the names of the files in it that count."""

    path: Path
    names: frozenset[str]

    def has(self, *names: str) -> bool:
        return self.names.issuperset(names)


@dataclasses.dataclass(frozen=True)
class Found:
    """An SAE of which the config and the names around it were looked at, but no tensor.

    path: its folder, or its file where several lie in one folder. hook: see `hooks`.
    """

    path: Path
    hook: str
    read: Callable[[], Header]


def stated(header: Header, options: Options) -> Header:
    """The header with what the user says of the SAE's input in place of what its config says."""
    kind, factor = options.normalize_activations, options.factor(header.hook)
    hook, config, constants = header.hook, header.config, dict(header.constants)
    if options.centre is not None:
        config = dataclasses.replace(config, centre=options.centre)
    if kind is not None:
        config = dataclasses.replace(config, normalize="none" if kind == AVERAGE else kind)
        constants.pop("factor", None)
    if factor is not None:
        if config.normalize != "none" or not 0 < factor < math.inf:
            raise InputError(
                f"{header.name} has norm factor {factor} and normalisation {config.normalize}; "
                f"expected a factor above 0 and {AVERAGE} (qkattr.toml)"
            )
        constants["factor"] = np.float32(factor)
        hook = "hook_embed" if hook == EMBEDDING else hook  # of what enters the stream
    elif kind == AVERAGE or (kind is None and header.scaled):
        raise InputError(
            f"{header.name}: normalize_activations is {AVERAGE}, whose factor is not in the file; "
            "give it in norm_factors (qkattr.toml), or fold it into the weights with SAELens "
            "(fold_activation_norm_scaling_factor) and save again"
        )
    return dataclasses.replace(header, hook=hook, config=config, constants=constants)


def shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """The shapes that the parts should have in the file, by the file's names."""
    d, m = header.d_in, header.d_sae
    whole = {"W_enc": (d, m), "W_dec": (m, d), "b_dec": (d,)}
    expected = {}
    for name, part in header.parts.items():
        shape = whole.get(name, (m,))
        expected[part.name] = () if part.scalar else shape[::-1] if part.transposed else shape
    return expected


def check_tensors(header: Header) -> Header:
    """The header, its tensors' names, types and shapes checked against the config."""
    expected, found = shapes(header), header.file.shapes()
    file, kind = Path(header.files[-1]).name, f"a {header.config.activation} SAE"
    if missing := [name for name in expected if name not in found]:
        raise InputError(
            f"{header.name}: {file} lacks {some(missing)}, which {kind} needs; copy it again"
        )
    extra = [name for name in found if name not in expected and name not in header.spare]
    if skips := [name for name in extra if "skip" in name.lower()]:
        raise InputError(
            f"{header.name}: {file} holds {some(skips)}, which only a transcoder has; load SAEs, "
            "which reconstruct what they read"
        )
    if extra:
        raise InputError(
            f"{header.name}: {file} holds {some(extra)}, for which {kind} has no use; see "
            f"{header.source}"
        )
    for name, shape in expected.items():
        if header.file.type(name) not in ("F32", "F16", "BF16", "F64"):
            raise InputError(
                f"{header.name}: {name} is {header.file.type(name)}, expected floats; convert it"
            )
        if found[name] != shape:
            got, want = list(found[name]), list(shape)
            raise InputError(
                f"{header.name}: {name} has shape {got}, {header.source} (d_in={header.d_in}, "
                f"d_sae={header.d_sae}) calls for {want}"
            )
    return header


def map_sae(header: Header) -> Dictionary:
    """The SAE as memory-mapped arrays, its values checked."""
    file = header.file
    raw = {part.name: file.read(part.name) for part in header.parts.values()}
    small = sum(tensor.nbytes for tensor in raw.values()) <= _CHECKED_WHOLE
    whole = small and not header.finite
    for name, tensor in raw.items():
        if whole or tensor.ndim < 2:
            check_finite(tensor, name, file.where)
    _check_scaling(header)
    fields: dict[str, Any] = {"b_enc_M": np.zeros(header.d_sae, np.float32)}
    fields["b_dec_D"] = np.zeros(header.d_in, np.float32)
    for name, part in header.parts.items():
        fields[FIELDS[name]] = _oriented(raw[part.name], part, header)
    return Dictionary(**fields | header.constants, config=header.config)


def _check_scaling(header: Header) -> None:
    """SAELens once wrote a factor for each feature; all ones, where it was not used."""
    name = "scaling_factor"
    if name in header.spare and name in header.file.shapes():
        if not np.all(header.file.read(name) == 1):
            raise InputError(
                f"{header.name} has a scaling_factor other than one, which is not implemented; "
                "fold it into W_dec"
            )


def _oriented(tensor: np.ndarray, part: Part, header: Header) -> np.ndarray:
    tensor = tensor.T if part.transposed else tensor
    tensor = tensor if part.apply is None else part.apply(tensor)
    return np.broadcast_to(tensor, (header.d_sae,)) if part.scalar else tensor


class SaeFields:
    """A config in JSON, looked up flat, then in its nested part, under every name of a field."""

    def __init__(self, folder: Path, config: str, nested: str | None = None):
        self.folder, self.config = folder, config
        self.flat = read_json_object(folder / config)
        inner = self.flat.get(nested) if nested else None
        self.nested = inner if isinstance(inner, dict) else {}

    def get(self, *names: str, default: Any = None) -> Any:
        for source in (self.flat, self.nested):
            for name in names:
                if source.get(name) is not None:
                    return source[name]
        return default

    def refuse(self, message: str) -> InputError:
        return InputError(f"SAE {own_name(self.folder)}: {message}")

    def typed(self, kind: type, *names: str, default: Any = ...) -> Any:
        value = self.get(*names, default=default)
        if value is ...:
            raise self.refuse(f"{self.config} has no {names[0]}; it is not a whole SAE config")
        if kind is float and type(value) is int:
            return as_float(value)
        if value is not default and type(value) is not kind:
            raise self.refuse(
                f"{names[0]} should be {kind.__name__}, got {clipped(repr(value), 40)}; restore "
                f"its own {self.config}"
            )
        return value

    def size(self, *names: str) -> int:
        return self.within(names[0], self.typed(int, *names))

    def within(self, name: str, size: Any) -> Any:
        """A size from 1 to `MOST`."""
        if not 1 <= size <= MOST:
            raise self.refuse(
                f"{name} should lie in 1..{MOST}, got {size!r:.40}; restore its own {self.config}"
            )
        return size

    def positive(self, *names: str) -> float:
        """A number above 0 that float32 holds."""
        value = self.typed(float, *names)
        if not 0 < value < 1e30:
            raise self.refuse(
                f"{names[0]} should be above 0, got {value}; restore its own {self.config}"
            )
        return value

    def k(self, k: Any, d_sae: int, options: Options | None = None) -> int:
        """The k of a topk SAE, checked. options: may say it where the config does not."""
        given = options.k if options else None
        k = given if k is None else k
        if type(k) is not int or not 1 <= k <= d_sae or given not in (None, k):
            also = f", and {given} of qkattr.toml" if given not in (None, k) else ""
            raise self.refuse(
                f"a topk SAE needs k in 1..d_sae={d_sae}, got {clipped(repr(k), 40)}{also}; "
                f"restore its own {self.config}, or give k in qkattr.toml"
            )
        return k


def exponential(log: np.ndarray) -> np.ndarray:
    """A threshold that is stored as its logarithm."""
    return np.exp(np.asarray(log, np.float32))


def release_l0(value: Any) -> dict[str, Any]:
    """The L0 that the makers name, as a constant of a header; nothing where it is no number."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9
    return {"l0": np.float32(value)} if known else {}
