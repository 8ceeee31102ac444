"""Figures, drawn by matplotlib (an extra), readable in grey: lines differ in dash and marker."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkattr.errors import InputError, clipped, printable, some
from qkattr.extras import need
from qkattr.files import write_files

if TYPE_CHECKING:
    from qkattr.experiments.steer import Steering

FORMATS = ("svg", "png", "pdf")
#: Okabe and Ito's colours, darkest first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#667085"
#: Fonts with the characters of other scripts and emoji, those that a system has.
FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei"),
    *("PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic"),
    *("Droid Sans Fallback", "Arial Unicode MS", "Noto Emoji", "Segoe UI Emoji", "Symbola"),
)
#: Tokens of one figure: more lines than this cannot be told apart.
LINES = 7


def need_pyplot():
    """matplotlib.pyplot, without a screen.

    Raises:
      InputError: it is not installed.
    """
    need("matplotlib", "figures need").use("agg")
    import matplotlib.pyplot as plt

    return plt


def check_figure(path: str | Path) -> Path:
    """The path of a figure.

    Raises:
      InputError: its ending names no format, or matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.removeprefix(".") not in FORMATS:
        raise InputError(
            f"cannot draw {path.name!r}: its ending names no figure format; use .svg, .png or .pdf"
        )
    need_pyplot()
    return path


def save_figure(figure, path: Path) -> Path:
    """Write a figure whole or not at all."""
    import matplotlib

    data = io.BytesIO()
    format = check_figure(path).suffix.removeprefix(".")
    _find_glyphs(figure)
    settings: Any = {"svg.hashsalt": "qkattr", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # boxes; an SVG has the text
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(format)
        figure.savefig(data, format=format, dpi=170, facecolor="white", metadata=metadata)
    need_pyplot().close(figure)
    write_files(path.parent, {path.name: data.getvalue()})
    return path


def _find_glyphs(figure) -> None:
    """Let the figure's text fall back on the fonts that are there."""
    from matplotlib.font_manager import fontManager
    from matplotlib.text import Text

    there = {font.name for font in fontManager.ttflist}
    families = ["sans-serif", *(name for name in FONTS if name in there)]
    for text in figure.findobj(Text):
        text.set_family(families)


def style(i: int) -> dict:
    """How line i of a panel looks."""
    return dict(
        color=COLOURS[i % len(COLOURS)],
        linestyle=DASHES[i % len(DASHES)],
        marker=MARKERS[i % len(MARKERS)],
        markersize=4,
        lw=1.6,
    )


def safe(text: str, most: int = 40) -> str:
    """Text of a prompt as matplotlib may draw it: no mathematics, no control characters."""
    return clipped(printable(text), most).replace("$", r"\$")


def tidy(axes, title: str, x: str, y: str) -> None:
    """Titles and a quiet frame."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def steering_figure(steering: Steering, path: Path) -> Path:
    """Probabilities against scale; beside them the edited heads' attention to `steering.keys`,
    where there are such heads."""
    plt = need_pyplot()
    panels = 2 if steering.patterns[0] else 1
    size = (5 * panels, 3.8)
    figure, axes = plt.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
    left, right = axes[0, 0], axes[0, -1]
    order = sorted(range(len(steering.scales)), key=lambda i: steering.scales[i])
    x = [steering.scales[i] for i in order]
    for i, (token, p) in enumerate(list(steering.tracked.items())[:LINES]):
        left.plot(x, [p[j] for j in order], label=f'"{safe(token, 24)}"', **style(i))
    _control(left, steering, order, x)
    left.axvline(1, color=GREY, lw=0.8, ls=":")
    left.set_ylim(-0.02, 1.02)
    left.legend(fontsize=8.5, frameon=False)
    others = "other heads frozen" if steering.freeze_others else "other heads live"
    heads = "1 head" if steering.n_heads == 1 else f"{steering.n_heads} heads"
    share = f"{heads}, {100 * steering.share_of_heads:.1f} %, {others}"
    tidy(left, f"Next token ({share})", "scale of the edited components", "probability")
    if panels == 2:
        _attention(right, steering, order, x)
    return save_figure(figure, path)


def _control(axes, steering: Steering, order: list[int], x: list[float]) -> None:
    """The first token under the random controls, their median and range."""
    control = steering.control or {}
    if "tracked" not in control:
        return
    token, spread = next(iter(control["tracked"].items()))
    median, low, high = ([spread[of][j] for j in order] for of in ("median", "low", "high"))
    axes.fill_between(x, low, high, color=GREY, alpha=0.2, lw=0)
    label = f'"{safe(token, 24)}", {control["draws"]} random edits'
    axes.plot(x, median, color=GREY, lw=1.2, ls="--", label=label)


def _attention(axes, steering: Steering, order: list[int], x: list[float]) -> None:
    keys, heads = steering.keys, list(steering.patterns[0])
    lines = [[sum(steering.patterns[i][h][k] for k in keys) for i in order] for h in heads]
    for i, (head, line) in enumerate(zip(heads, lines, strict=True)):
        few = len(heads) <= LINES
        axes.plot(x, line, **(style(i) if few else dict(color="#9db4d3", lw=0.8)),
                  label=head if few else None)  # fmt: skip
    if len(lines) > LINES:
        mean = [sum(column) / len(column) for column in zip(*lines, strict=True)]
        axes.plot(x, mean, color=COLOURS[0], lw=2.4, marker="o", markersize=4,
                  label=f"mean of {len(heads)} heads")  # fmt: skip
    axes.legend(fontsize=8.5, frameon=False)
    axes.axvline(1, color=GREY, lw=0.8, ls=":")
    axes.set_ylim(-0.02, 1.02)
    at = [f'"{safe(steering.tokens[k].strip(), 16)}" {k}' for k in (steering.query, *keys)]
    title = f"Edited heads, from {at[0]} to {some(at[1:])}"
    tidy(axes, title, "scale of the edited components", "attention")
