"""Neuronpedia's labels of a known set of SAEs, downloaded once.

    BASE/{scan}/{source}/explanations/batch-{0, 1, ...}.jsonl.gz

The files of a source are numbered without gaps. They are kept below the cache folder (see
`smollm2.cache_folder`) under the same path, with a file `complete` once all are there.
"""

from __future__ import annotations

import contextlib
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from qkattr.errors import InputError
from qkattr.files import replacing
from qkattr.labels.forms import read_labels
from qkattr.load import hub
from qkattr.load.registry import Source, find_saes, near_saes
from qkattr.load.smollm2 import cache_folder

BASE = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com/v1"

#: Bytes of one file, files of one source, seconds without an answer: at most.
LARGEST, MOST, PATIENCE = 2**29, 4096, 30

#: What S3 answers where there is no such file, the second if it may not be listed.
_ABSENT = (404, 403)


def source_of(name: str) -> Source:
    """Where the labels of a set of the registry are.

    Raises:
      InputError: there is no such set, or it is not known to have any.
    """
    choice = find_saes(name)
    if choice is None:
        raise InputError(
            f"no such SAEs: {name!r}; {near_saes(name)}`qkattr models` lists the names"
        )
    source = choice.source()
    if source is None or source.source_set is None:
        raise InputError(
            f"{name} is not known to have labels on Neuronpedia; give a file of labels"
        )
    return source


def fetch_labels(
    source: Source | None,
    widths: Mapping[int, int] | None,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[tuple[int, int], str]:
    """Labels by (boundary, feature), of all boundaries that Neuronpedia has.

    widths: how many features each boundary has.

    Raises:
      InputError: it is not known where they are, they are not there, or there is no network.
    """
    if source is None or not source.sources:
        raise InputError(
            "it is not known where Neuronpedia has labels of these SAEs; give a file of labels, or "
            "neuronpedia:NAME with a name of `qkattr models`"
        )
    labels: dict[tuple[int, int], str] = {}
    found = 0
    for number, (boundary, name) in enumerate(sorted(source.sources.items()), 1):
        if widths is not None and boundary not in widths:
            continue
        progress(f"labels, {number} of {len(source.sources)}")
        for file in _files(source.scan, name):
            found += 1
            labels |= read_labels(file, widths, pre=source.pre, boundary=boundary)
    if not found:
        raise InputError(
            f"Neuronpedia has no labels of {source.scan}/{source.source_set}; give a file of labels"
        )
    return labels


def _files(scan: str, name: str) -> list[Path]:
    """The files of one source, downloaded if they are not all there; empty if it has none."""
    folder = cache_folder() / "neuronpedia" / scan / name
    if not (folder / "complete").is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _download(f"{BASE}/{scan}/{name}/explanations", folder)
        except OSError as e:
            raise InputError(
                f"cannot keep Neuronpedia's labels in {folder} ({e}); set QKATTR_CACHE to a folder "
                f"that can be written"
            ) from e
    return sorted(folder.glob("batch-*.jsonl.gz"))


def _download(url: str, folder: Path) -> None:
    if hub.offline():
        raise InputError(
            f"the labels of {url} are not in {folder}, and HF_HUB_OFFLINE is set; unset it, or "
            f"give a file of labels"
        )
    for number in range(MOST):
        path = folder / f"batch-{number}.jsonl.gz"
        if not path.is_file() and not _fetched(f"{url}/{path.name}", path):
            break
    (folder / "complete").touch()


def _copy(answer: Any, file: IO[bytes], url: str) -> None:
    """All of an answer, unless it is too large or ends early."""
    copied, size = 0, answer.headers.get("Content-Length")
    while chunk := answer.read(2**20):
        copied += len(chunk)
        if copied > LARGEST:
            raise InputError(f"{url} has more than {LARGEST} bytes; give a file of labels")
        file.write(chunk)
    if size is not None and copied != int(size):
        raise ConnectionError(f"it ended after {copied} of {size} bytes")


def _fetched(url: str, path: Path) -> bool:
    """Whether the file is there; it is then at `path`, whole."""
    try:
        with contextlib.ExitStack() as stack:
            answer = stack.enter_context(urllib.request.urlopen(url, timeout=PATIENCE))
            temporary = stack.enter_context(replacing(path))
            with temporary.open("wb") as file:
                _copy(answer, file, url)
        return True
    except urllib.error.HTTPError as e:
        if e.code in _ABSENT:
            return False
        reason = f"{e.code} {e.reason}"
    except (urllib.error.URLError, TimeoutError, ConnectionError) as e:
        reason = str(getattr(e, "reason", e))
    raise InputError(f"{url} cannot be downloaded ({reason}); try again, or give a file of labels")
