"""The faithfulness figure: a panel for every claim, with 95 % intervals over prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qkattr.errors import InputError
from qkattr.export.figures import COLOURS, GREY, need_pyplot, save_figure, style, tidy

if TYPE_CHECKING:
    from qkattr.experiments.faithfulness import Report

#: Points of the scatter, at most.
POINTS = 4000


def faithfulness_figure(report: Report, path: Path) -> Path:
    """Draw all panels whose measure was taken.

    Raises:
      InputError: none was.
    """
    plt = need_pyplot()
    panels = [
        panel
        for name, panel in (
            ("scores", _scores),
            ("features", _attention),
            ("features", _next_token),
            ("heads", _heads),
            ("effects", _effects),
            ("blocks", _blocks),
            ("nodes", _nodes),
        )
        if name in report.tables
    ]
    if not panels:
        raise InputError("nothing to draw: no measure was taken on these prompts")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (4.2 * columns, 3.5 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for panel, place in zip(panels, axes.flat, strict=False):
        panel(place, report)
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    return save_figure(figure, path)


def _scores(axes, report: Report) -> None:
    """Predicted against actual changes of scores, norm scales live: all on the line when frozen."""
    for i, mode in enumerate(("live", "frozen")):
        pairs = [
            (side["single"]["predicted"], side["single"][mode]["actual"])
            for prompt in report.prompts
            for side in prompt.get("qk", {}).values()
        ]
        x, y = (np.concatenate(column) for column in zip(*pairs, strict=True))
        some = np.random.default_rng(0).permutation(len(x))[:POINTS]
        marker = dict(s=9, marker="o") if mode == "live" else dict(s=2, marker="s")
        axes.scatter(x[some], y[some], color=COLOURS[1 - i], alpha=0.6, lw=0, label=mode, **marker)
    axes.legend(fontsize=8.5, frameon=False, title="norm scales", title_fontsize=8.5)
    tidy(axes, "One feature removed: the score moves", "predicted change", "actual change")


def _line(axes, i: int, x, rows: list[dict[str, Any]], column: str, label: str) -> None:
    """A line with its band, over the rows that have the column."""
    there = [(at, row[column]) for at, row in zip(x, rows, strict=True) if column in row]
    x, values = [at for at, _ in there], [value for _, value in there]
    axes.plot(x, [v["mean"] for v in values], label=label, **style(i))
    low, high = ([v[end] for v in values] for end in ("low", "high"))
    axes.fill_between(x, low, high, color=style(i)["color"], alpha=0.15, lw=0)


def _by_k(axes, report: Report, lost: str, control: str, title: str, y: str) -> None:
    for i, side in enumerate(("key", "query")):
        rows = [r for r in report.tables["features"] if r["side"] == side and r["scales"] == "live"]
        x = [row["k"] for row in rows]
        _line(axes, 2 * i, x, rows, lost, f"strongest, {side} side")
        _line(axes, 2 * i + 1, x, rows, control, f"controls, {side} side")
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [str(k) for k in x])
    axes.legend(fontsize=8, frameon=False)
    tidy(axes, title, "features removed from each head", y)


def _attention(axes, report: Report) -> None:
    _by_k(
        axes, report, "attention_lost", "attention_control",
        "… and attention with it", "attention lost",
    )  # fmt: skip


def _next_token(axes, report: Report) -> None:
    _by_k(
        axes, report, "log_p_lost", "log_p_control",
        "… and the next token", "log probability lost (nats)",
    )  # fmt: skip


def _heads(axes, report: Report) -> None:
    rows = report.tables["heads"]
    x = [row["n"] for row in rows]
    for i, name in enumerate(("influence", "effect", "attention", "random")):
        label = "random (median)" if name == "random" else f"by {name}"
        _line(axes, i, x, rows, name, label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [str(n) for n in x])
    axes.legend(fontsize=8.5, frameon=False)
    tidy(axes, "Whole heads ablated", "heads", "log probability lost (nats)")


#: Measures that are drawn, with the derivative that they are taken by.
_DRAWN = (
    ("effect", "jacobian"), ("less mean", "jacobian"), ("masking", "jacobian"), ("effect", "live"),
    ("less mean", "live"), ("masking", "live"), ("influence", ""), ("|loading|", ""),
    ("attention", ""),
)  # fmt: skip


def _effects(axes, report: Report) -> None:
    """How measures rank heads whose removal is known, by ablation, all others live."""
    found = {
        (row["ablation"], row["measure"], row["by"]): row["rank"]
        for row in report.tables["effects"]
        if (row["others"], row["read"]) == ("live", "logit")
    }
    names = [f"{measure}, {by}" if by else measure for measure, by in _DRAWN]
    at = np.arange(len(names))
    for i, ablation in enumerate(("zero", "mean", "pattern")):
        ranks = [found[ablation, *drawn] for drawn in _DRAWN]
        mean = np.array([rank["mean"] for rank in ranks])
        reach = [mean - [rank["low"] for rank in ranks], [rank["high"] for rank in ranks] - mean]
        axes.errorbar(
            mean, at + 0.2 * (i - 1), xerr=reach, fmt="o", ms=3.5, lw=1, color=style(i)["color"],
            label=ablation,
        )  # fmt: skip
    axes.set_yticks(at, names, fontsize=8)
    axes.invert_yaxis()
    axes.legend(fontsize=8, frameon=False, title="ablation", title_fontsize=8)
    tidy(axes, "Every head ablated alone", "rank correlation with what is lost", "")


def _blocks(axes, report: Report) -> None:
    rows = report.tables["blocks"]
    x = [row["block"] for row in rows]
    for i, (name, label) in enumerate(
        (
            ("held", "patterns and scales held"),
            ("live", "live"),
            ("crossing", "live, between positions"),
        )
    ):
        if any(name in row for row in rows):
            _line(axes, i, x, rows, name, label)
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.03)
    axes.legend(fontsize=8.5, frameon=False, loc="lower left")
    tidy(axes, "Edges against sources taken away", "block", "correlation")


def _nodes(axes, report: Report) -> None:
    """Mean insertion (solid) and deletion (light) curves, errors traced on."""
    rows = [
        row for prompt in report.prompts for row in prompt.get("nodes", ())
        if row["choice"] == "through"
    ]  # fmt: skip
    x = rows[0]["counts"]
    for i, order in enumerate(("influence", "size", "random")):
        for kind in ("insertion", "deletion"):
            mean = np.mean([np.clip(row[kind][order], 0, 1) for row in rows], axis=0)
            label = f"by {order}" if kind == "insertion" else None
            look = style(i) | (dict(alpha=0.4) if kind == "deletion" else {})
            axes.plot(x, mean, label=label, **look)
    axes.axhline(1, color=GREY, lw=0.6, ls=":")
    axes.set_xscale("log", base=4)
    axes.set_xticks(x, [str(n) for n in x])
    axes.legend(fontsize=8.5, frameon=False)
    tidy(axes, "Nodes put back (full) or taken out (pale)", "nodes of one boundary",
         "share of log probability")  # fmt: skip
