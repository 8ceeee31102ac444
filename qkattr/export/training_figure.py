"""A training run as a figure: unexplained variance as it goes, and each boundary at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qkattr.export.figures import GREY, check_figure, need_pyplot, save_figure, style

#: Boundaries drawn as lines: the first, the last, and some between.
LINES = 5


def draw_training(log: str | Path, report: dict[str, Any] | None, path: str | Path) -> Path:
    """Draw a run's `metrics.jsonl` and, if given, the report of its held-out rows.

    Raises:
      InputError: the ending of `path` names no format, or matplotlib is not installed.
    """
    target = check_figure(path)
    plt = need_pyplot()
    lines = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(1, 2 if report else 1, figsize=(10, 3.6), squeeze=False)
    _course(axes[0][0], lines)
    if report:
        _boundaries(axes[0][1], report["boundaries"])
    figure.tight_layout()
    save_figure(figure, target)
    plt.close(figure)
    return target


def _course(axes, lines: list[dict[str, Any]]) -> None:
    n = len(lines[0]["unexplained"])
    most = min(n, LINES)
    shown = [round(i * (n - 1) / max(1, most - 1)) for i in range(most)]
    tokens = [line["tokens"] for line in lines]
    for i, b in enumerate(shown):
        values = [line["unexplained"][b] for line in lines]
        every = max(1, len(lines) // 8)
        axes.plot(tokens, values, label=f"boundary {b + 1}", markevery=every, **style(i))
    axes.set(xlabel="tokens", ylabel="unexplained variance", yscale="log")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(color=GREY, alpha=0.2)


def _boundaries(axes, rows: list[dict[str, Any]]) -> None:
    boundary = [row["boundary"] for row in rows]
    every = max(1, len(rows) // 8)
    series = (
        ("next-token loss recovered", "loss_recovered"),
        ("median relative error", "median_relative_error"),
        ("unexplained variance", "unexplained_variance"),
    )
    for i, (label, name) in enumerate(series):
        axes.plot(boundary, [r[name] for r in rows], label=label, markevery=every, **style(i))
    axes.set(xlabel="boundary", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(color=GREY, alpha=0.2)
