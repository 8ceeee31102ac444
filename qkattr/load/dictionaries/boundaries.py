"""Which boundary an SAE belongs to, and whether a set of them fits a model.

`hooks.boundary` says which one a hook is. Boundary 0 is what enters block 0, which in some models
is not what the embedding gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, TypeVar

from qkattr.config import ModelConfig
from qkattr.errors import InputError, clipped, some
from qkattr.load.dictionaries.hooks import EMBEDDING
from qkattr.load.dictionaries.hooks import boundary as hook_boundary

#: By family, hooks at the embedding that may not be boundary 0, and why.
_BEFORE_0 = {
    ("gpt2", "hook_embed"): "the position embedding comes after it",
    ("gpt2", EMBEDDING): "the position embedding comes after it",
    ("gemma2", EMBEDDING): "older versions of transformers multiply by sqrt(d_model) after it; "
    f"for such SAEs give norm_factors.{EMBEDDING} = 1 / sqrt(d_model) in qkattr.toml, else 1",
}


class SaeHeader(Protocol):
    """What an SAE is checked by before its weights are read. `name` is how errors call it."""

    @property
    def name(self) -> str: ...
    @property
    def hook(self) -> str: ...
    @property
    def d_in(self) -> int: ...


Checked = TypeVar("Checked", bound=SaeHeader)


def boundary_of(header: SaeHeader) -> int:
    boundary = hook_boundary(header.hook)
    if boundary is None:
        at = clipped(header.hook, 80) or "a hook that it does not name"
        raise InputError(
            f"{header.name} was trained at {at}; expected blocks.N.hook_resid_pre, "
            "blocks.N.hook_resid_post or hook_embed; load residual-stream SAEs"
        )
    return boundary


def by_boundary(headers: Iterable[Checked], choice: str = "move one away") -> dict[int, Checked]:
    """The SAEs by boundary, the first boundary first; one a boundary.

    choice: what errors advise where there are several.
    """
    found: dict[int, list[Checked]] = {}
    for header in headers:
        found.setdefault(boundary_of(header), []).append(header)
    for boundary, several in sorted(found.items()):
        if len(several) > 1:
            names = " and ".join(h.name for h in several) if len(several) == 2 else None
            names = names or some([h.name for h in several])
            raise InputError(
                f"{names} are {'both' if len(several) == 2 else 'all'} for boundary {boundary}, "
                f"expected one; {choice}"
            )
    return {boundary: found[boundary][0] for boundary in sorted(found)}


def check_set(
    headers: dict[int, Checked],
    path: str | Path,
    config: ModelConfig,
    missing: str = "error",
    notes: tuple[str, ...] = (),
) -> None:
    """Raise `InputError` unless the SAEs are as wide as the model, one after every block.

    missing: "raw" lets boundaries have none. notes: what was left out of the set.
    """
    if missing not in ("error", "raw"):
        raise InputError(f"missing is {missing!r:.40}, expected error or raw")
    for boundary, header in headers.items():
        if boundary > config.n_blocks:
            raise InputError(
                f"{header.name} is for boundary {boundary}, the model has "
                f"{config.n_blocks} blocks; load the SAEs trained on this model"
            )
        if header.d_in != config.d_model:
            raise InputError(
                f"SAE at boundary {boundary} has d_in={header.d_in}, the model has "
                f"d_model={config.d_model}; load the SAEs trained on this model"
            )
    _check_embedding(headers.get(0), config)
    absent = [str(b) for b in range(1, config.n_blocks + 1) if b not in headers]
    if absent and missing == "error":
        left_out = f" ({'; '.join(notes)})" if notes else ""
        raise InputError(
            f"{path} has no SAE for boundary {some(absent, 12)}{left_out}; expected one after "
            f"every block, 1..{config.n_blocks}; --missing raw (missing='raw') makes such a "
            "boundary one error component"
        )


def _check_embedding(header: SaeHeader | None, config: ModelConfig) -> None:
    """Raise `InputError` if what an SAE read may not be what enters block 0."""
    if header and (why := _BEFORE_0.get((config.family, header.hook))):
        raise InputError(
            f"{header.name} was trained at the embedding, which in {config.family} models is not "
            f"boundary 0: {why}. Or leave it out with FOLDER:PATTERN"
        )
