"""Figures of the QK analyses, readable in grey: sign is also a hatch, lines differ in dash."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkattr.export.figures import (
    COLOURS,
    GREY,
    LINES,
    need_pyplot,
    safe,
    save_figure,
    style,
    tidy,
)
from qkattr.export.summary import component
from qkattr.qk.rows import unfolded

if TYPE_CHECKING:
    from qkattr.analyses.distance import Distance
    from qkattr.analyses.marginals import Looks
    from qkattr.analyses.mechanisms import MechanismTable
    from qkattr.analyses.pairs import Pairs
    from qkattr.analyses.weights import WeightPairs
    from qkattr.analyses.why import Why
    from qkattr.qk.table import QKAttribution

#: Bars of a panel.
BARS = 12


def place_title(found: Any) -> str:
    """Head 14.5, " Aunt" 14 to " Sally" 6."""
    query, key = (f'"{safe(found.tokens[p].strip(), 16)}" {p}' for p in (found.query, found.key))
    return f"Head {found.layer}.{found.head}, {query} to {key}"


def signed_bars(axes, names: list[str], values: list[float], title: str, x: str) -> None:
    """Horizontal bars, the first on top; negative ones hatched."""
    at = range(len(values))
    for i, value in zip(at, values, strict=True):
        colour = COLOURS[0] if value >= 0 else COLOURS[1]
        axes.barh(i, value, color=colour, hatch=None if value >= 0 else "///", edgecolor="white")
    axes.set_yticks(list(at), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, lw=0.8)
    tidy(axes, title, x, "")


def qk_figure(found: QKAttribution, path: Path) -> Path:
    """The strongest pairs of components that are no bias, error or sink; beside it the shares."""
    pyplot = need_pyplot()
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12, 4.4), layout="constrained", width_ratios=(1.9, 1)
    )
    rows = sorted(unfolded(found.pairs)[:BARS], key=lambda p: -p["value"])
    named = [f"{safe(component(p['query']), 40)}  x  {safe(component(p['key']), 40)}" for p in rows]
    signed_bars(left, named, [p["value"] for p in rows], "Strongest pairs of features", "value")
    shares = list(found.shares.items())[:BARS]
    values = [share["signed"] for _, share in shares]
    title = f"All {found.n_pairs} pairs, by kind"
    signed_bars(right, [name for name, _ in shares], values, title, "sum of values")
    said = f"{place_title(found)}: attention {found.probability:.2f}, score {found.score:+.2f}"
    if found.effect is not None:
        said += f"; effect {found.effect:+.2f} on the {safe(found.target or '', 40)}"
    figure.suptitle(said, fontsize=11, x=0.01, ha="left")
    return save_figure(figure, path)


def why_figure(found: Why, path: Path) -> Path:
    """What each key's rows add; beside it the strongest rows of either sign."""
    figure, (left, right) = need_pyplot().subplots(
        1, 2, figsize=(12, 4.6), layout="constrained", width_ratios=(1, 1.7)
    )
    keys = found.keys[:BARS]
    named = [
        f'"{safe(k["token"].strip(), 14)}" {k["position"]} ({100 * k["probability"]:.1f} %)'
        for k in keys
    ]
    signed_bars(left, named, [k["value"] for k in keys], "Keys by attention", "part of the sum")
    rows = sorted(
        [*found.pushes[: BARS // 2], *found.pulls[: BARS // 2]], key=lambda r: -r["value"]
    )
    named = [f"{safe(component(r['query']), 36)} x {safe(component(r['key']), 36)}" for r in rows]
    signed_bars(right, named, [r["value"] for r in rows], "Pairs, summed over keys", "value")
    left_side = {"odds": "log(A / (1 - A))", "log": "log A"}.get(found.form)
    if found.against is not None:
        other = f'"{safe(found.tokens[found.against].strip(), 14)}" {found.against}'
        left_side = f"its score less that of {other}"
    share = f"error slots {100 * found.error_share:.0f} % of the absolute sum"
    title = f"{place_title(found)}: {left_side} = {found.value:+.2f}, {share}"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return save_figure(figure, path)


def mechanisms_figure(found: MechanismTable, path: Path) -> Path:
    """Singular values with what each carries; beside it the components of the first ones."""
    few = min(3, len(found.mechanisms))
    figure, axes = need_pyplot().subplots(1, few + 1, figsize=(4 + 4 * few, 4.2),
                                          layout="constrained")  # fmt: skip
    shown = found.mechanisms[:BARS]
    named = [f"{i}: sigma {m['sigma']:.2f}" for i, m in enumerate(shown)]
    title = f"Parts of the score ({found.score:+.2f})"
    if found.features:
        title = f"Parts of {found.score - found.rest:+.2f} (score {found.score:+.2f})"
    signed_bars(axes[0], named, [m["carried"] for m in shown], title, "carried")
    for i, panel in enumerate(axes[1:]):
        sides = [("q", c) for c in found.mechanisms[i]["query"][:5]]
        sides += [("k", c) for c in found.mechanisms[i]["key"][:5]]
        named = [f"{side}: {safe(component(c), 36)}" for side, c in sides]
        signed_bars(panel, named, [c["weight"] for _, c in sides], f"Mechanism {i}", "entry")
    rank, cross = f"effective rank {found.rank:.2f}", f"cross terms {100 * found.cross:.0f} %"
    figure.suptitle(f"{place_title(found)}: {rank}, {cross}", fontsize=11, x=0.01, ha="left")
    return save_figure(figure, path)


def distance_figure(found: Distance, path: Path) -> Path:
    """The score and the strongest pairs against distance; the true distance is marked."""
    figure, (left, right) = need_pyplot().subplots(1, 2, figsize=(12, 4), layout="constrained")
    at = range(len(found.score_profile))
    left.plot(at, found.score_profile, color=COLOURS[0], lw=1.8)
    tidy(left, "Score, all pairs", "distance", "score")
    for i, pair in enumerate(found.pairs[:LINES]):
        label = f"{safe(component(pair['query']), 30)} x {safe(component(pair['key']), 30)}"
        look = style(i) | dict(marker=None)
        right.plot(at, pair["profile"], label=label, **look)
    for axes in (left, right):
        axes.axvline(found.query - found.key, color=GREY, lw=1.0, ls=":")
        axes.axhline(0, color=GREY, lw=0.6)
    right.legend(fontsize=7, frameon=False)
    tidy(right, "Strongest pairs", "distance", "value")
    figure.suptitle(place_title(found), fontsize=11, x=0.01, ha="left")
    return save_figure(figure, path)


def pairs_figure(found: Pairs, path: Path) -> Path:
    """The strongest pairs of a prompt, of either sign."""
    error = f"error slots {100 * found.error_share:.0f} % of the sum of |value|"
    title = f"{safe(found.prompt, 70)}: {found.searched:,} terms, {error}"
    return _two_signs(found.positive, found.negative, title, path)


def weights_figure(found: WeightPairs, path: Path) -> Path:
    """The strongest pairs of a head's weights, of either sign."""
    at = "mean activations" if found.typical else "one unit"
    title = (
        f"Head {found.layer}.{found.head}, key {found.distance} before the query: "
        f"{found.width} x {found.width} features at {at}"
    )
    return _two_signs(found.positive, found.negative, title, path)


def _two_signs(positive: list[dict], negative: list[dict], title: str, path: Path) -> Path:
    figure, axes = need_pyplot().subplots(1, 2, figsize=(14, 4.8), layout="constrained")

    def side(c: dict[str, Any]) -> str:
        where = f' at "{safe(c["token"].strip(), 12)}" {c["position"]}' if "token" in c else ""
        return safe(component(c), 34) + where

    def name(row: dict[str, Any]) -> str:
        head = f"{row['layer']}.{row['head']}: " if "head" in row else ""
        return f"{head}{side(row['query'])} x {side(row['key'])}"

    for panel, sign, rows in zip(
        axes, ("Strongest", "Most negative"), (positive, negative), strict=True
    ):
        rows = rows[:BARS]
        signed_bars(panel, [name(r) for r in rows], [r["value"] for r in rows], sign, "value")
        panel.tick_params(axis="y", labelsize=7)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return save_figure(figure, path)


def looks_figure(found: Looks, path: Path) -> Path:
    """The places with the most attention, beside the largest marginal of either side."""
    figure, axes = need_pyplot().subplots(
        1, 3, figsize=(15, 4.8), layout="constrained", width_ratios=(1, 1, 1)
    )
    places = found.places[:BARS]
    named = [
        f'{p["layer"]}.{p["head"]} "{safe(found.tokens[p["query"]].strip(), 12)}" {p["query"]} to '
        f'"{safe(found.tokens[p["key"]].strip(), 12)}" {p["key"]}'
        for p in places
    ]
    values = [p["probability"] for p in places]
    signed_bars(axes[0], named, values, "Where heads look", "attention")
    for panel, side in zip(axes[1:], ("query", "key"), strict=True):
        best: Any = [p[f"{side}_marginals"][:1] or [dict(kind="none", index=None, value=0.0)]
                for p in places]  # fmt: skip
        named = [safe(component(m[0]), 40) for m in best]
        values = [m[0]["value"] for m in best]
        signed_bars(panel, named, values, f"Largest marginal, {side} side", "value")
    title = f"{found.n_places} places with attention of {found.attention:g} or more"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return save_figure(figure, path)
