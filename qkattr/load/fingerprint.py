"""What identifies a model or a set of SAEs in results: a hash of its files, read in part.

Hashed: each file's name, size, its first and last 64 KiB, and the whole header of a safetensors
file (names, shapes and types of all tensors). That tells models, trainings and conversions apart in
milliseconds, whatever their size. It is no proof against tampering: a change in the middle of a
large file that keeps its size goes unseen.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from qkattr.load.tensors.mapped import header_bytes

_ENDS = 2**16


def fingerprint(root: Path, files: Iterable[Path], texts: Mapping[str, bytes] | None = None) -> str:
    """64 hexadecimal digits; the same wherever the folder `root` lies.

    texts: of files that would be part of it and are not on disk, by their paths below the root.
    """
    digest, contents = hashlib.sha256(), {root / name: text for name, text in (texts or {}).items()}
    for path in sorted([*files, *contents]):
        text = contents.get(path)
        size = path.stat().st_size if text is None else len(text)
        head = max(_ENDS, header_bytes(path)) if path.suffix == ".safetensors" else _ENDS
        digest.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode())
        with path.open("rb") if text is None else io.BytesIO(text) as file:
            digest.update(file.read(head))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read())
    return digest.hexdigest()
