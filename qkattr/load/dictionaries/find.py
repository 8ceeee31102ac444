"""A tree of SAEs, in any of the formats, to one `Dictionary` a boundary.

`recognise` says what a folder holds by the files in it, all of them or those that were chosen; SAEs
of other hooks are left out; `choose` has what takes one of several SAEs of a boundary; `check_set`
compares the set with the model. Dictionaries that are no SAEs are recognised too, so that they can
be refused by what they are.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from qkattr.config import ModelConfig
from qkattr.errors import InputError, clipped
from qkattr.load.dictionaries import (
    gemma_scope,
    llama_scope,
    saelens,
    single_files,
    sparsify,
    torch_saes,
)
from qkattr.load.dictionaries.boundaries import by_boundary, check_set
from qkattr.load.dictionaries.choose import (
    SETTINGS,
    check_factors,
    matching,
    nearest,
    path_below,
    read_options,
    split_pattern,
)
from qkattr.load.dictionaries.header import Folder, Found, Header, Options, map_sae, stated
from qkattr.load.dictionaries.hooks import boundary, counts, other_by_names
from qkattr.load.dictionaries.packed import find_packed
from qkattr.load.fingerprint import fingerprint
from qkattr.sources.dictionary import Dictionary


@dataclasses.dataclass(frozen=True)
class Reader:
    """One format: whether a folder is of it, and what finds its SAEs."""

    name: str
    here: Callable[[Folder], object]
    find: Callable[[Folder, Options], list[Found]]


def _files(*names: str) -> Callable[[Folder], bool]:
    return lambda folder: folder.has(*names)


_GEMMA_SCOPE_2 = ("params_layer_0.safetensors",)  # below clt/ or crosscoder/
#: The files of a folder of dictionaries that are no SAEs, and what it holds then.
_NO_SAES = (
    (("config.yaml", "layer_0.safetensors"), "transcoder"),  # of circuit-tracer
    (("W_enc_0.safetensors",), "cross-layer transcoder"),  # of circuit-tracer
    (_GEMMA_SCOPE_2, "cross-layer transcoder"),
    (("conf.yaml", "latest_ckpt.safetensors"), "temporal SAE"),
)


def _other(folder: Folder) -> str | None:
    """The word of `hooks.OTHERS` for what a folder holds; None where it holds none of these."""
    for files, kind in _NO_SAES:
        if folder.has(*files):
            return (other_by_names(folder.path) or kind) if files == _GEMMA_SCOPE_2 else kind
    return None


def _find_other(folder: Folder, options: Options) -> list[Found]:
    """What lies in a folder; it cannot be read."""
    kind = _other(folder) or ""
    return [Found(folder.path, kind, partial(_refuse, folder.path, kind))]


def _refuse(folder: Path, kind: str) -> Header:
    raise InputError(f"{folder} holds a {kind}; load SAEs, which reconstruct what they read")


#: The first that a folder is of reads it.
READERS = (
    Reader("sparsify", _files(sparsify.CONFIG, sparsify.WEIGHTS), sparsify.find),
    Reader("SAELens", _files(saelens.CONFIG), saelens.find),
    Reader("Llama Scope", _files(llama_scope.HYPERPARAMS), llama_scope.find_1),
    Reader("llamascopium", _files(llama_scope.CONFIG, llama_scope.WEIGHTS), llama_scope.find_2),
    Reader("dictionary_learning", _files(torch_saes.CONFIG, torch_saes.WEIGHTS), torch_saes.find),
    Reader("Gemma Scope", _files(gemma_scope.NPZ), gemma_scope.find_1),
    Reader("Gemma Scope 2", _files(gemma_scope.SAFETENSORS), gemma_scope.find_2),
    Reader("Qwen Scope", single_files.qwen_files, single_files.find_qwen),
    Reader("Goodfire or qresearch", single_files.linear_files, single_files.find_linear),
    Reader("no SAEs", _other, _find_other),
)


def recognise(at: Folder) -> Reader | None:
    """What reads the SAEs that lie in a folder itself; None where there are none."""
    return next((reader for reader in READERS if reader.here(at)), None)


def _folder(path: Path, names: Iterable[str]) -> Folder:
    return Folder(path, frozenset(name for name in names if (path / name).is_file()))


@dataclasses.dataclass(frozen=True)
class SaeFiles:
    """Where SAEs are looked for. pattern: see `choose.matching`. names: the files that count, as
    paths below the root; None: all. options: None: those of the root's qkattr.toml, if it has one.
    settings: the text of a qkattr.toml that says the options given, for the fingerprint."""

    root: Path
    pattern: str | None = None
    names: tuple[str, ...] | None = None
    options: Options | None = None
    settings: str = ""

    def folders(self) -> list[Folder]:
        """The root and the folders below it, but for hidden ones: what other programs keep."""
        if self.names is None:
            return [_folder(folder, names) for folder, names in _walk(self.root)]
        there: dict[Path, list[str]] = {}
        for path in (self.root / name for name in self.names):
            there.setdefault(path.parent, []).append(path.name)
        return [_folder(folder, names) for folder, names in there.items()]


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        yield Path(folder), names


@dataclasses.dataclass(frozen=True)
class SaeSet:
    """The SAEs of a tree that were chosen, by boundary, their weights not yet read. files: all that
    the set is made of; texts: a qkattr.toml that is no file; both for its fingerprint. notes: what
    was left out."""

    root: Path
    headers: dict[int, Header]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    texts: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @property
    def hash(self) -> str:
        """See `fingerprint`."""
        return fingerprint(self.root, self.files, self.texts)

    def read(self, n_blocks: int) -> tuple[Dictionary | None, ...]:
        """One dictionary a boundary, None where there is none."""
        headers = self.headers
        return tuple(map_sae(headers[b]) if b in headers else None for b in range(n_blocks + 1))


def find_saes(
    path: str | Path | SaeFiles, options: Options | None = None, called: str | None = None
) -> SaeSet:
    """The SAEs at or below `path`, one a boundary, their weights not yet read.

    path: a packed file, a folder, `FOLDER:PATTERN`, or files that were chosen. options: None: those
    of the folder's qkattr.toml, if it has one. called: what the user knows the folder as, if that
    is another name, for errors.
    """
    if not isinstance(path, SaeFiles) and Path(path).is_file():
        packed = [stated(header, options or Options()) for header in find_packed(Path(path))]
        return SaeSet(Path(path).parent, by_boundary(packed), (Path(path),))
    files = path if isinstance(path, SaeFiles) else SaeFiles(*split_pattern(path), options=options)
    root, options, settings = files.root, files.options, ()
    name = called or str(root)
    readers = _readers(files, name)
    if options is None:
        options, settings = read_options(root)
    pattern = files.pattern or options.pattern
    every = [f for at, reader in readers for f in reader.find(at, options)]
    check_factors(options, every)
    where = f"{name}:{pattern}" if pattern else name
    found, notes = _on_the_stream(matching(every, root, pattern, name), where)
    chosen = nearest([stated(f.read(), options) for f in found], pattern)
    example = path_below(root, chosen[-1].folder)
    choice = f"choose with a pattern, as in '{clipped(name, 80)}:{clipped(example, 80)}'"
    texts = {SETTINGS: files.settings.encode()} if files.settings else {}
    headers = by_boundary(chosen, choice)
    made_of = (*settings, *(file for header in headers.values() for file in header.files))
    return SaeSet(root, headers, made_of, notes, texts)


def _readers(files: SaeFiles, name: str) -> list[tuple[Folder, Reader]]:
    """The folders that hold SAEs, and what reads them. name: the root, as errors call it.

    Raises:
      InputError: there are none.
    """
    if not files.root.is_dir():
        raise InputError(
            f"no such folder: {files.root}; give a folder of SAEs, one after every block, or a "
            "packed file"
        )
    folders = sorted(files.folders(), key=lambda at: at.path)
    found = [(at, reader) for at in folders if (reader := recognise(at)) is not None]
    if not found:
        raise InputError(
            f"{name} holds no SAE (no {saelens.CONFIG} in it or below it, nor any other "
            "format's files); give a folder of SAEs, see docs/saes.md"
        )
    return found


def _on_the_stream(found: list[Found], where: str) -> tuple[list[Found], tuple[str, ...]]:
    """Those trained on the residual stream, and a note that counts the others.

    Raises:
      InputError: there are none; it says what is there.
    """
    kept = [f for f in found if boundary(f.hook) is not None]
    others = [f.hook for f in found if boundary(f.hook) is None]
    if not kept:
        raise InputError(
            f"{where} holds no SAE of the residual stream, but {counts(others)}; expected hooks "
            "such as blocks.N.hook_resid_post or model.layers.N. If only a folder's name says "
            "otherwise, state hook in qkattr.toml"
        )
    saes = "1 SAE" if len(others) == 1 else f"{len(others)} SAEs"
    said = f"{saes} of other hooks left out: {counts(others)}"
    return kept, (said,) if others else ()


def load_saes(
    path: str | Path,
    config: ModelConfig,
    *,
    missing: str = "error",
    options: Options | None = None,
) -> tuple[Dictionary | None, ...]:
    """One dictionary a boundary, `n_blocks + 1` of them; boundary 0 may have None.

    path: a packed file, or a folder with SAEs in or below it in any known format, or
    `FOLDER:PATTERN`. missing: "error", or "raw": a boundary may have no SAE. options: see
    `find_saes`.

    Raises:
      InputError: files are missing or damaged, the tensors do not fit the config or are not finite,
        or an SAE computes something that qkattr does not implement, is not on the residual stream,
        is not as wide as the model, shares its boundary with another; or a boundary after a block
        has none.
    """
    found = find_saes(path, options)
    check_set(found.headers, path, config, missing, found.notes)
    return found.read(config.n_blocks)
