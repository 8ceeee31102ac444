"""The settings of a run that takes seconds."""

from __future__ import annotations

ROWS, ROW = 40, 17
SETTINGS = dict(
    width=24, k=4, tokens=640, batch=32, buffer=4, row=ROW, held_out=4, lr=1e-2, aux_k=4,
    dead_after=200, checkpoint_every=5, seed=3,
)  # fmt: skip


def toml(**changes) -> str:
    values = {**SETTINGS, **changes}
    return "".join(
        f"{k} = {str(v).lower() if isinstance(v, bool) else repr(v)}\n" for k, v in values.items()
    )
