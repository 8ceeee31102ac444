"""Draws the README's picture: one QK attribution of the real run.

    python docs/figures.py            needs matplotlib

Left, where the head looked; right, the strongest pairs of features that made it look at " Sally",
positive and negative, with what the features are (from their cards).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

import qkattr
from qkattr.export.summary import component

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

PROMPT = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
LAYER, HEAD, QUERY, KEY = 24, 4, 14, 6
LABELS = {(24, 1429): "before “Sally”, “Sue”", (24, 720): "begins with s", (24, 278): "she, her"}
BLUE, ORANGE, GREY = "#1f6fb2", "#c2571a", "#667085"
PAIRS = 9


def attention(axes, result) -> None:
    """The head's pattern from the last token, as bars along the prompt."""
    _, trace = qkattr.run(result.session.bundle, result.token_ids, capture=("patterns",))
    pattern = np.asarray(trace.patterns[LAYER, HEAD, QUERY])
    y = np.arange(len(pattern))[::-1]
    axes.barh(y, pattern, color=[BLUE if i == KEY else "#b9c4d6" for i in range(len(pattern))])
    axes.set_yticks(y, [f"{t.strip()}  {i}" for i, t in enumerate(result.tokens)], fontsize=9)
    axes.set_xlim(0, 1)
    axes.set_title(f'Head {LAYER}.{HEAD}, from the last "Aunt"', fontsize=10, loc="left")
    axes.set_xlabel("attention", fontsize=9)


def pairs(axes, table) -> None:
    """The strongest pairs, the query side left of the bar, the key side right of it."""
    rows = table.pairs[:PAIRS]
    y = np.arange(len(rows))[::-1]
    value = [p["value"] for p in rows]
    axes.barh(y, value, color=[BLUE if v > 0 else ORANGE for v in value])
    named = [f"{_name(p['query'])}  ×  {_name(p['key'])}" for p in rows]
    axes.set_yticks(y, named, fontsize=9)
    for at, v in zip(y, value, strict=True):
        axes.text(v + (0.06 if v > 0 else -0.06), at, f"{v:+.2f}", va="center", fontsize=8.5,
                  ha="left" if v > 0 else "right", color=GREY)  # fmt: skip
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set_xlim(min(value) - 0.9, max(value) + 0.9)
    axes.set_title('Why it looks at "Sally": strongest terms', fontsize=10, loc="left")
    axes.set_xlabel(
        f"query side × key side; all {table.n_pairs} sum to {table.sum:.2f}", fontsize=9
    )


def _name(described: dict) -> str:
    return described["label"] or component(described)


def main() -> None:
    bundle = qkattr.load("smollm2", "smollm2")
    result = qkattr.trace(bundle, PROMPT, qk=0)
    result.labels.update(LABELS)
    table = qkattr.qk_attribution(result, layer=LAYER, head=HEAD, query=QUERY, key=KEY)
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 3.6), width_ratios=(1, 1.5), layout="constrained"
    )
    attention(axes[0], result)
    pairs(axes[1], table)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    out = Path(__file__).parent / "qk.png"
    figure.savefig(out, dpi=170, facecolor="white")
    print(out)


if __name__ == "__main__":
    main()
