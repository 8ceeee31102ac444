"""`load`: a model, its tokenizer and SAEs, checked against one another before weights are read.

What reads weights or SAEs is imported when it is needed: text becomes tokens without JAX.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from qkattr.config import ModelConfig
from qkattr.errors import InputError
from qkattr.load import smollm2
from qkattr.load.bundle import Bundle
from qkattr.load.fingerprint import fingerprint
from qkattr.load.models import hf
from qkattr.load.models.checkpoint import DTYPES, Checkpoint, check_tensors
from qkattr.load.models.gguf import open_gguf
from qkattr.load.registry import Source, near_model, near_saes
from qkattr.load.text.gguf_tokenizer import tokenizer_from_gguf
from qkattr.load.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qkattr.load.named import SaeSource
    from qkattr.sources.dictionary import Dictionary
    from qkattr.types import Params


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model whose weights have not been read."""

    config: ModelConfig
    tokenizer: Tokenizer | None
    checkpoint: Checkpoint
    root: Path
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def _open_model(model: str, accept: Collection[str]) -> _Model:
    """Find out what `model` is, and read everything of it but the weights."""
    path = Path(model)
    if accept and (model == smollm2.NAME or path.suffix == ".gguf"):
        raise InputError(
            f"accept names attributes of config.json, and {model} has none; leave it out"
        )
    if model == smollm2.NAME:
        path, opened = smollm2.open_smollm2()
        return _Model(opened.config, opened.tokenizer, opened.checkpoint, path.parent, (path,))
    if path.suffix == ".gguf" and path.is_file():
        file = open_gguf(path)
        return _Model(file.config, tokenizer_from_gguf(file.reader), file, path.parent, (path,))
    folder = path if path.is_dir() else _named_folder(model)
    if folder is not None:
        config, tokenizer = hf.read_config(folder, accept), Tokenizer.from_folder(folder)
        files = (folder / "config.json", *hf.weight_files(folder))
        notes = tuple(
            f"config.json has {attribute}, which qkattr does not implement and was told to accept"
            for attribute in hf.attributes(folder, accept)
        )
        return _Model(config, tokenizer, hf.open_checkpoint(folder), folder, files, notes)
    accepted = (
        f"{smollm2.NAME!r}, a Hugging Face folder (config.json and safetensors), a .gguf file, "
        "user/repo of the hub, or a name that `qkattr models` lists"
    )
    raise InputError(f"no such model: {model!r}; {near_model(model)}give {accepted}")


def _named_folder(model: str) -> Path | None:
    from qkattr.load import named

    return named.model_folder(model)


@dataclasses.dataclass(frozen=True)
class _Saes:
    """One dictionary a boundary; their fingerprint; what the registry knows of them."""

    dictionaries: tuple[Dictionary | None, ...]
    hash: str
    source: Source | None = None
    notes: tuple[str, ...] = ()


def _find_saes(saes: str) -> SaeSource:
    """What is here goes before what has that name elsewhere."""
    from qkattr.load import named

    if saes == smollm2.NAME:
        return named.SaeSource(smollm2.saes_path())
    path = Path(saes)
    found = None if path.exists() else named.sae_source(saes)
    here = Path(saes.partition(":")[0]).exists()
    if found is None and not here and (hint := near_saes(saes)):
        raise InputError(f"no such SAEs: {saes!r}; {hint}`qkattr models` lists the names")
    return found or named.SaeSource(path)


def _read_saes(saes: str, model: str, config: ModelConfig, missing: str) -> _Saes:
    """From a packed file, or a folder of SAEs. model: as it was asked for."""
    from qkattr.load import named
    from qkattr.load.dictionaries import check_set, find_saes

    found = _find_saes(saes)
    path, choice = found.path, found.choice
    on_disk = find_saes(path, called=found.called)
    check_set(on_disk.headers, saes, config, missing, on_disk.notes)
    dictionaries = on_disk.read(config.n_blocks)
    read = _Saes(dictionaries, on_disk.hash, notes=on_disk.notes)
    if choice is None:
        return read
    return dataclasses.replace(
        read,
        dictionaries=named.informed(dictionaries, choice),
        source=choice.source(),
        notes=(*named.of_other_model(model, choice), *choice.notes(), *on_disk.notes),
    )


@dataclasses.dataclass(frozen=True)
class _Beginning:
    """The tokenizer with the BOS that is used; whether text gets one, why, what to say of it."""

    tokenizer: Tokenizer | None
    bos: bool | None
    why: str = "as the SAEs were trained"
    notes: tuple[str, ...] = ()


def _beginning(
    model: str, tokenizer: Tokenizer | None, saes: _Saes | None, bos_token: str | int | None
) -> _Beginning:
    """With which token a text begins. Where SAEs were trained with a BOS and the tokenizer has
    none, it is the EOS, which TransformerLens puts there."""
    if bos_token is not None:
        if tokenizer is None:
            raise InputError(f"{model} has no tokenizer, which bos_token needs; leave it out")
        return _Beginning(tokenizer.with_bos(str(bos_token)), True, "as asked")
    bos = None if saes is None else _prepend_bos(saes.dictionaries)
    if bos is None and model == smollm2.NAME:
        return _Beginning(tokenizer, True, "as the SAEs in the package were trained")
    if bos and tokenizer is not None and tokenizer.bos is None and tokenizer.has(tokenizer.eos):
        assert tokenizer.eos is not None  # it is in the vocabulary
        note = (
            f"the SAEs were trained with a BOS and the tokenizer has none; its EOS, "
            f"{tokenizer.eos}, stands for it, as in TransformerLens (--bos-token names another)"
        )
        return _Beginning(tokenizer.with_bos(tokenizer.eos), bos, notes=(note,))
    return _Beginning(tokenizer, bos)


def _prepend_bos(dictionaries: tuple[Dictionary | None, ...]) -> bool | None:
    """What the SAEs say about a BOS, if they say one thing."""
    said = {d.config.prepend_bos for d in dictionaries if d is not None} - {None}
    return said.pop() if len(said) == 1 else None


def load(
    model: str | Path,
    saes: str | Path | None = None,
    *,
    dtype: str = "float32",
    missing: str = "error",
    bos_token: str | int | None = None,
    accept: Collection[str] = (),
) -> Bundle:
    """Load a model and its SAEs.

    model: "smollm2", a Hugging Face folder, a .gguf file; or, downloaded if it is not in the hub's
    cache, user/repo, user/repo@revision or a name of the registry. saes: "smollm2", a folder of
    SAEs in any known format, one after every block, `FOLDER:PATTERN` where it has several of a
    block, a file that `qkattr pack` made of one; or user/repo, a folder in it, user/repo:PATTERN,
    of which only what matches is downloaded, or a name of the registry, with choices, as in
    NAME:262k,big. dtype: of the weight matrices, "float32" or
    "bfloat16". missing: "error", or "raw": a boundary without an SAE is one error component.
    bos_token: the token, by its text or id, that stands for a BOS, which text then begins with.
    accept: attributes of config.json that qkattr does not know and that the user knows to change
    nothing; every output names them.

    Raises:
      InputError: something is missing, damaged, not implemented, or does not belong together.
    """
    bundle = open_bundle(
        model, saes, dtype=dtype, missing=missing, bos_token=bos_token, accept=accept
    )
    _ = bundle.params
    return bundle


def open_bundle(
    model: str | Path,
    saes: str | Path | None = None,
    *,
    dtype: str = "float32",
    missing: str = "error",
    bos_token: str | int | None = None,
    accept: Collection[str] = (),
) -> Bundle:
    """`load`, but with the model's weights still on disk: the config, the tokenizer, the names and
    shapes of all tensors and the SAEs are read and checked, so that a wrong pairing or prompt fails
    at once."""
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not known; expected {' or '.join(DTYPES)}")
    opened = _open_model(str(model), accept)
    check_tensors(opened.checkpoint, opened.config)
    read = None if saes is None else _read_saes(str(saes), str(model), opened.config, missing)
    begins = _beginning(str(model), opened.tokenizer, read, bos_token)
    return Bundle(
        config=opened.config,
        read_params=functools.partial(_read_params, opened.checkpoint, opened.config, dtype),
        tokenizer=begins.tokenizer,
        dictionaries=read and read.dictionaries,
        model=str(model),
        saes=None if saes is None else str(saes),
        model_hash=fingerprint(opened.root, opened.files),
        saes_hash=read and read.hash,
        bos=begins.bos,
        bos_why=begins.why,
        accepted=tuple(accept),
        dtype=dtype,
        missing=missing,
        read_cards=smollm2.packaged_cards if str(saes) == smollm2.NAME else None,
        source=read and read.source,
        notes=(*opened.notes, *begins.notes, *(read.notes if read else ())),
    )


def _read_params(checkpoint: Checkpoint, config: ModelConfig, dtype: str) -> Params:
    from qkattr.load.models.weights import read_params

    return read_params(checkpoint, config, dtype=dtype)
