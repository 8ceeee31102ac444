"""A tree of SAEs, in any of the formats, to one `Dictionary` a boundary.

`recognise` says what a folder holds by the files in it; SAEs of other hooks are left out; `choose`
has what takes one of several SAEs of a boundary; `check_set` compares the set with the model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from qkattr.config import ModelConfig
from qkattr.errors import InputError, clipped
from qkattr.load.dictionaries import (
    gemma_scope,
    llama_scope,
    others,
    saelens,
    single_files,
    sparsify,
    torch_saes,
)
from qkattr.load.dictionaries.boundaries import by_boundary, check_set
from qkattr.load.dictionaries.choose import (
    check_factors,
    matching,
    nearest,
    path_below,
    read_options,
    split_pattern,
)
from qkattr.load.dictionaries.header import Found, Header, Options, map_sae, stated
from qkattr.load.dictionaries.hooks import OTHERS, boundary, counts
from qkattr.load.dictionaries.packed import find_packed
from qkattr.sources.dictionary import Dictionary


@dataclasses.dataclass(frozen=True)
class Reader:
    """One format: whether a folder is of it, and what finds its SAEs."""

    name: str
    here: Callable[[Path], object]
    find: Callable[[Path, Options], list[Found]]


def _files(*names: str) -> Callable[[Path], bool]:
    return lambda folder: all((folder / name).is_file() for name in names)


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
    Reader("no SAEs", others.kind_of, others.find),
)


def recognise(folder: Path) -> Reader | None:
    """What reads the SAEs that lie in a folder itself; None where there are none."""
    return next((reader for reader in READERS if reader.here(folder)), None)


def load_sae(folder: str | Path, options: Options | None = None) -> Dictionary:
    """Read the SAE of one folder, whatever hook it was trained on.

    options: None: none.

    Raises:
      InputError: files are missing or damaged, the tensors do not fit the config or are not finite,
        or the SAE computes something that qkattr does not implement.
    """
    folder = Path(folder)
    reader = recognise(folder) if folder.is_dir() else None
    if reader is None:
        raise InputError(
            f"{folder} has no {saelens.CONFIG} and is of no other known format; give "
            "the folder of an SAE"
        )
    options = options or Options()
    found = reader.find(folder, options)
    if len(found) != 1:
        raise InputError(f"{folder} holds {len(found)} SAEs, expected one; see load_saes")
    if found[0].hook in OTHERS:
        raise InputError(
            f"{folder} holds a {found[0].hook}; load SAEs, which reconstruct what they read"
        )
    return map_sae(stated(found[0].read(), options))


@dataclasses.dataclass(frozen=True)
class SaeSet:
    """The SAEs of a tree that were chosen, by boundary, their weights not yet read. notes: what was
    left out."""

    root: Path
    headers: dict[int, Header]
    settings: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> list[Path]:
        """All files that the set is made of, for its fingerprint."""
        files = (file for header in self.headers.values() for file in header.files)
        return [*self.settings, *dict.fromkeys(files)]

    def read(self, n_blocks: int) -> tuple[Dictionary | None, ...]:
        """One dictionary a boundary, None where there is none."""
        headers = self.headers
        return tuple(map_sae(headers[b]) if b in headers else None for b in range(n_blocks + 1))


def sae_folders(path: str | Path, called: str | None = None) -> tuple[Path, ...]:
    """The folders at or below `path` that hold SAEs. called: see `find_saes`."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(
            f"no such folder: {path}; give a folder of SAEs, one after every block, or a packed "
            "file"
        )
    folders = tuple(folder for folder in sorted(_below(path)) if recognise(folder) is not None)
    if not folders:
        raise InputError(
            f"{called or path} holds no SAE (no {saelens.CONFIG} in it or below it, nor any other "
            "format's files); give a folder of SAEs, see docs/saes.md"
        )
    return folders


def _below(path: Path) -> Iterator[Path]:
    """A folder and those below it, but for hidden ones: what other programs keep."""
    for folder, below, _ in os.walk(path):
        below[:] = [name for name in below if not name.startswith(".")]
        yield Path(folder)


def find_saes(
    path: str | Path, options: Options | None = None, called: str | None = None
) -> SaeSet:
    """The SAEs at or below `path`, one a boundary, their weights not yet read.

    path: a packed file, a folder, or `FOLDER:PATTERN`, see `choose.matching`. options: None: those
    of the folder's qkattr.toml, if it has one. called: what the user knows the folder as, if that
    is another name, for errors.
    """
    if Path(path).is_file():
        packed = [stated(header, options or Options()) for header in find_packed(Path(path))]
        return SaeSet(Path(path).parent, by_boundary(packed))
    root, pattern = split_pattern(path)
    name = called or str(root)
    folders = sae_folders(root, name)
    options, settings = read_options(root) if options is None else (options, ())
    pattern = pattern or options.pattern
    every = [f for folder in folders for f in _recognised(folder).find(folder, options)]
    check_factors(options, every)
    where = f"{name}:{pattern}" if pattern else name
    found, notes = _on_the_stream(matching(every, root, pattern, name), where)
    chosen = nearest([stated(f.read(), options) for f in found], pattern)
    example = path_below(root, chosen[-1].folder)
    choice = f"choose with a pattern, as in '{clipped(name, 80)}:{clipped(example, 80)}'"
    return SaeSet(root, by_boundary(chosen, choice), settings, notes)


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


def _recognised(folder: Path) -> Reader:
    reader = recognise(folder)
    if reader is None:
        raise InputError(f"{folder} has changed while it was read; try again")
    return reader


def sae_model_names(path: str | Path) -> set[str]:
    """The models that the SAEs at `path` say they were trained on; empty when they do not say."""
    return {h.model_name for h in find_saes(path).headers.values() if h.model_name}


def check_saes(path: str | Path, config: ModelConfig, *, missing: str = "error") -> None:
    """Everything that `load_saes` checks, but for the values of the weights; reads only headers."""
    found = find_saes(path)
    check_set(found.headers, path, config, missing, found.notes)


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
      InputError: as `load_sae`; or an SAE is not on the residual stream, is not as wide as the
        model, shares its boundary with another; or a boundary after a block has none.
    """
    found = find_saes(path, options)
    check_set(found.headers, path, config, missing, found.notes)
    return found.read(config.n_blocks)
