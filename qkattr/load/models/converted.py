"""A GGUF file written once as a Hugging Face folder, which opens without dequantising anything.

    config.json, tokenizer.json, tokenizer_config.json, model.safetensors (float32)
    manifest.json    the SHA-256 of the GGUF file and of the small files, the CRC-32 of each tensor

The weights are those that the GGUF file gives, bit for bit. Every file takes its place whole, and
the manifest last. What is written depends on the GGUF file alone, so several processes may write
at once. Nothing in the folder is believed: the small files are compared with the manifest when it
is opened, and each tensor when it is read. What does not agree is read from the GGUF file, and the
folder is written again the next time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import math
import os
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from qkattr.config import ModelConfig
from qkattr.errors import InputError
from qkattr.files import replacing
from qkattr.load.models.checkpoint import Checkpoint
from qkattr.load.models.gguf import GGUF, open_gguf
from qkattr.load.models.hf import read_config
from qkattr.load.tensors.mapped import MappedTensors, open_mapped
from qkattr.load.text.gguf_tokenizer import tokenizer_from_gguf
from qkattr.load.text.tokenizer import Tokenizer

_MANIFEST, _WEIGHTS, _VERSION = "manifest.json", "model.safetensors", 1
_ALIGNMENT = 8  # of the data in a safetensors file
_SPARE = 2**20  # bytes, for the small files
_OLD = 3600  # seconds: nothing takes that long to write


class _Manifest(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    source: str
    files: dict[str, str]
    tensors: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model whose weights have not been read."""

    config: ModelConfig
    tokenizer: Tokenizer | None
    checkpoint: Checkpoint


@dataclasses.dataclass(frozen=True)
class _Checked:
    """The weights of the folder; a tensor that was damaged comes from the GGUF file."""

    weights: MappedTensors
    folder: Path
    gguf: Path
    checksums: Mapping[str, int]

    @property
    def where(self) -> str:
        return self.gguf.name

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.weights.shapes()

    def type(self, name: str) -> str:
        return self.weights.type(name)

    def read(self, name: str) -> np.ndarray:
        with contextlib.suppress(InputError):  # it was cut short or taken away meanwhile
            tensor = self.weights.read(name)
            if zlib.crc32(tensor.data) == self.checksums[name]:
                return tensor
        with contextlib.suppress(OSError):
            (self.folder / _MANIFEST).unlink(missing_ok=True)
        return open_gguf(self.gguf).read(name)


def open_converted(gguf: Path, source: str, folder: Path) -> Opened:
    """The model of a GGUF file, from the folder where it is whole; else the folder is written, and
    where that is not possible (a full disk, say) the model comes from the GGUF file itself.

    source: the SHA-256 that the file should have.

    Raises:
      InputError: it has another one, which is asked where the folder is not whole; or see
        `open_gguf`.
    """
    if (found := _open_folder(gguf, source, folder)) is not None:
        return found
    file = open_gguf(gguf)
    with gguf.open("rb") as raw:
        digest = hashlib.file_digest(raw, "sha256").hexdigest()
    if digest != source:
        raise InputError(
            f"{gguf} is damaged: its SHA-256 is {digest}, expected {source}; delete it, then it is "
            "fetched again"
        )
    opened = Opened(file.config, tokenizer_from_gguf(file.reader), file)
    with contextlib.suppress(OSError):
        _write(file, opened.tokenizer, source, folder)
        return _open_folder(gguf, source, folder) or opened
    return opened


def _open_folder(gguf: Path, source: str, folder: Path) -> Opened | None:
    """None where the folder is not there or not whole."""
    try:
        manifest = msgspec.json.decode((folder / _MANIFEST).read_bytes(), type=_Manifest)
        if (manifest.version, manifest.source) != (_VERSION, source):
            return None
        if any(_sha256(folder / name) != digest for name, digest in manifest.files.items()):
            return None
        weights = open_mapped(folder / _WEIGHTS)
        if weights.shapes().keys() != manifest.tensors.keys():
            return None
        checked = _Checked(weights, folder, gguf, manifest.tensors)
        return Opened(read_config(folder), Tokenizer.from_folder(folder), checked)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, InputError):
        return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(file: GGUF, tokenizer: Tokenizer | None, source: str, folder: Path) -> None:
    """Write the folder, whatever is there.

    Raises:
      OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"config.json": msgspec.json.encode(file.hf_config)}
    if tokenizer is not None:
        special = dict(bos_token=tokenizer.bos, eos_token=tokenizer.eos)
        texts |= {
            "tokenizer.json": tokenizer.inner.to_str().encode(),
            "tokenizer_config.json": msgspec.json.encode(
                special | dict(chat_template=tokenizer.template)
            ),
        }
    _sweep(folder)
    size = 4 * sum(math.prod(shape) for shape in file.shapes().values())
    if shutil.disk_usage(folder).free < size + _SPARE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    with replacing(folder / _WEIGHTS) as temporary, temporary.open("wb") as out:
        checksums = _write_weights(file, out)
    for name, text in texts.items():
        _replace(folder / name, text)
    digests = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    manifest = _Manifest(_VERSION, source, digests, checksums)
    _replace(folder / _MANIFEST, msgspec.json.encode(manifest))


def _sweep(folder: Path) -> None:
    """Remove what a process that was killed while it wrote left behind: it is old by now."""
    for left in folder.glob(f".{_WEIGHTS}.*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _OLD:
                left.unlink()


def _replace(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _write_weights(file: GGUF, out: BinaryIO) -> dict[str, int]:
    """All tensors as a safetensors file, one at a time; their CRC-32."""
    header, end = {}, 0
    for name, shape in file.shapes().items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = dict(dtype="F32", shape=shape, data_offsets=(start, end))
    raw = msgspec.json.encode(header)
    raw += b" " * (-len(raw) % _ALIGNMENT)
    out.write(len(raw).to_bytes(8, "little") + raw)
    checksums = {}
    for name in header:
        tensor = np.ascontiguousarray(file.read(name), "<f4")
        out.write(tensor.data)
        checksums[name] = zlib.crc32(tensor.data)
    return checksums
