"""Hugging Face model folders: `config.json` with `model.safetensors`, or with indexed shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qkattr.config import ModelConfig
from qkattr.errors import InputError, clipped
from qkattr.files import read_json_object
from qkattr.load.models.families import from_hf
from qkattr.load.tensors.mapped import MappedTensors, open_mapped

if TYPE_CHECKING:
    pass

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(folder: str | Path, accept: Collection[str] = ()) -> ModelConfig:
    """The `ModelConfig` of a model folder. accept: see `from_hf`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"no such folder: {folder}; give a folder with config.json and safetensors weights"
        )
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} has no config.json; give the folder that a Hugging Face model was saved to"
        )
    return from_hf(read_json_object(folder / "config.json"), accept)


def attributes(folder: str | Path, names: Collection[str]) -> tuple[str, ...]:
    """`name=value` of some attributes of a model folder's config, or of its text part."""
    raw = read_json_object(Path(folder) / "config.json")
    found = raw | (raw["text_config"] if isinstance(raw.get("text_config"), dict) else {})
    return tuple(f"{name}={clipped(repr(found[name]), 40)}" for name in names)


@dataclasses.dataclass(frozen=True)
class Shards:
    """Several safetensors files read as one checkpoint."""

    where: str
    files: tuple[MappedTensors, ...]

    @cached_property
    def _owner(self) -> dict[str, MappedTensors]:
        return {name: file for file in self.files for name in file.shapes()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for file in self.files for name, shape in file.shapes().items()}

    def type(self, name: str) -> str:
        return self._owner[name].type(name)

    def read(self, name: str) -> np.ndarray:
        return self._owner[name].read(name)


def weight_files(folder: str | Path) -> tuple[Path, ...]:
    """The safetensors files of a model folder, in order.

    Raises:
      InputError: there are none, the index is malformed, or a shard is missing or lies outside the
        folder.
    """
    folder = Path(folder)
    if (folder / _SINGLE).is_file():
        return (folder / _SINGLE,)
    if not (folder / _INDEX).is_file():
        raise InputError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}; save the model in safetensors form"
        )
    table = read_json_object(folder / _INDEX).get("weight_map")
    if (
        not isinstance(table, dict)
        or not table
        or not all(isinstance(name, str) for name in table.values())
    ):
        raise InputError(
            f"{folder / _INDEX} has no weight_map of tensor names to file names; download it again"
        )
    names = sorted(set(table.values()))
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise InputError(
                f"{_INDEX} names the shard {name!r}, expected a plain file name inside {folder}"
            )
        if not (folder / name).is_file():
            raise InputError(f"{folder} lacks the shard {name} that {_INDEX} lists; download it")
    return tuple(folder / name for name in names)


def open_checkpoint(folder: str | Path) -> Shards:
    """Map the weights of a model folder; reads only their headers."""
    files = weight_files(folder)
    where = files[0].name if len(files) == 1 else f"{Path(folder).name} ({len(files)} shards)"
    return Shards(where, tuple(open_mapped(file) for file in files))
