"""dictionary_learning's `ae.pt` with its config.json; SAEBench, andyrdt and others save so.

Classes: AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder, AutoEncoderTopK, and
BatchTopKSAE and MatryoshkaBatchTopKSAE, which have one threshold for all features. The gated and
jumprelu classes give activations times decoder norm; here they are what multiplies the decoder's
row. What older configs leave out is taken from the trainer's name, the tensors or the folders'
names.
"""

from __future__ import annotations

from functools import partial

from qkattr.errors import clipped
from qkattr.load.dictionaries.header import (
    Folder,
    Found,
    Header,
    Options,
    Part,
    SaeFields,
    check_tensors,
    release_l0,
)
from qkattr.load.dictionaries.hooks import by_name, by_names, layer_of, own_name
from qkattr.load.tensors.archive import Archive
from qkattr.load.tensors.torch_file import open_torch
from qkattr.sources.dictionary import DictionaryConfig

CONFIG, WEIGHTS = "config.json", "ae.pt"
_LINEAR = {
    "W_enc": Part("encoder.weight", transposed=True),
    "W_dec": Part("decoder.weight", transposed=True),
}
_PLAIN = {name: Part(name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
_BIAS = {"b_enc": Part("encoder.bias")}
_ONE_THRESHOLD = {"threshold": Part("threshold", scalar=True)}
_GATED = {"b_enc": "mag_bias", "b_gate": "gate_bias", "r_mag": "r_mag", "b_dec": "decoder_bias"}

#: Of each class: the activation, whether b_dec is subtracted, and where the tensors are.
_CLASSES: dict[str, tuple[str, bool, dict[str, Part]]] = {
    "AutoEncoder": ("relu", True, _LINEAR | _BIAS | {"b_dec": Part("bias")}),
    "AutoEncoderNew": ("relu", False, _LINEAR | _BIAS | {"b_dec": Part("decoder.bias")}),
    "GatedAutoEncoder": ("gated", True, _LINEAR | {n: Part(s) for n, s in _GATED.items()}),
    "JumpReluAutoEncoder": ("jumprelu", False, _PLAIN | {"threshold": Part("threshold")}),
    "AutoEncoderTopK": ("topk", True, _LINEAR | _BIAS | {"b_dec": Part("b_dec")}),
    "BatchTopKSAE": (
        "jumprelu",
        True,
        _LINEAR | _BIAS | {"b_dec": Part("b_dec")} | _ONE_THRESHOLD,
    ),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True, _PLAIN | _ONE_THRESHOLD),
}
_TRAINING = frozenset({"k", "threshold", "group_sizes", "active_groups"})
#: Classes by a part of the trainer's name, for configs without `dict_class`.
_TRAINERS = {
    "Matryoshka": "MatryoshkaBatchTopKSAE",
    "BatchTopK": "BatchTopKSAE",
    "TopK": "AutoEncoderTopK",
    "Gated": "GatedAutoEncoder",
    "Gdm": "GatedAutoEncoder",
    "JumpRelu": "JumpReluAutoEncoder",
    "New": "AutoEncoderNew",
    "Standard": "AutoEncoder",
    "PAnneal": "AutoEncoder",
}


def find(at: Folder, options: Options) -> list[Found]:
    """The SAE of a folder, its config and the names of its folders looked at."""
    fields = SaeFields(at.path, CONFIG, nested="trainer")
    hook = _hook(fields, options)
    return [Found(at.path, hook, partial(_read, fields, hook, options))]


def _hook(fields: SaeFields, options: Options) -> str:
    """What the config's submodule means; where it names none, what the folders' names mean."""
    kind = fields.typed(str, "dict_class", "trainer_class", default="")
    if "crosscoder" in kind.lower():
        return "crosscoder"
    layer = fields.typed(int, "layer", default=layer_of(fields.folder))
    module = fields.typed(str, "submodule_name", default=None)
    if module is not None:
        hook = by_name(module, layer)
    elif (hook := by_names(fields.folder, layer, stated=options.hook, default=None)) is None:
        raise fields.refuse(
            f"{fields.config} has no submodule_name, nor do the folders' names say what it read; "
            'give hook = "resid_post" in qkattr.toml if that is so'
        )
    if hook == "":
        raise fields.refuse(
            f"{fields.config} has no layer, nor has a folder's name; name its folder as in "
            "resid_post_layer_3"
        )
    return module or "" if hook is None else hook


def _read(fields: SaeFields, hook: str, options: Options) -> Header:
    """Everything but the weights, checked."""
    folder = fields.folder
    file = open_torch(folder / WEIGHTS, f"SAE {folder.name}: {WEIGHTS}")
    activation, subtract, parts = _CLASSES[_class(fields, file.shapes(), options)]
    d_in, d_sae = _sizes(fields, file, parts["W_enc"])
    k = fields.get("k")
    if k is None and file.shapes().get("k") == ():
        k = int(file.read("k"))
    config = DictionaryConfig(
        activation=activation,
        k=fields.k(k, d_sae, options) if activation == "topk" else None,
        subtract_b_dec=subtract,
    )
    header = Header(
        folder=folder,
        name=f"SAE {own_name(folder, 2)}",
        hook=hook,
        model_name=fields.typed(str, "lm_name", default=None),
        d_in=d_in,
        d_sae=d_sae,
        config=config,
        file=file,
        files=(folder / CONFIG, folder / WEIGHTS),
        parts=dict(parts),
        spare=_TRAINING,
        constants=release_l0(k),
        source=CONFIG,
    )
    return check_tensors(header)


def _sizes(fields: SaeFields, file: Archive, encoder: Part) -> tuple[int, int]:
    """d_in and d_sae: as the config says, or else as the encoder's shape does."""
    shape = file.shapes().get(encoder.name, ())
    whole = len(shape) == 2
    d_in, d_sae = (shape[::-1] if encoder.transposed else shape) if whole else (..., ...)
    d_in = fields.typed(int, "activation_dim", default=d_in)
    d_sae = fields.typed(int, "dict_size", "dictionary_size", default=d_sae)
    return fields.within("activation_dim", d_in), fields.within("dict_size", d_sae)


def _class(fields: SaeFields, found: dict[str, tuple[int, ...]], options: Options) -> str:
    """The class: as the config or the user says, or as the trainer's name or the tensors mean."""
    trainer = fields.typed(str, "trainer_class", default="")
    meant = next((name for part, name in _TRAINERS.items() if part in trainer), None)
    name = fields.typed(str, "dict_class", default=options.dict_class) or meant or _class_of(found)
    if name is None:
        raise fields.refuse(
            f"{fields.config} has no dict_class, and {WEIGHTS} may be of several or of none; give "
            "dict_class in qkattr.toml, such as AutoEncoderTopK or BatchTopKSAE"
        )
    if name not in _CLASSES:
        raise fields.refuse(
            f"dict_class {clipped(repr(name), 40)} is not implemented; known are "
            f"{', '.join(_CLASSES)}"
        )
    return name


def _class_of(found: dict[str, tuple[int, ...]]) -> str | None:
    """The class whose tensors have these names, if it is only one."""

    def fits(parts: dict[str, Part]) -> bool:
        threshold = parts.get("threshold")
        if threshold and (found.get("threshold") == ()) != threshold.scalar:
            return False
        needed = {part.name for part in parts.values()}
        return needed <= found.keys() and found.keys() - needed <= _TRAINING

    fitting = [name for name, (_, _, parts) in _CLASSES.items() if fits(parts)]
    return fitting[0] if len(fitting) == 1 else None
