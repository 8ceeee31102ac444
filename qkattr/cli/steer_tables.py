"""What `qkattr steer` prints: the edits, the prediction at every scale, and who looked instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qkattr.errors import quoted

if TYPE_CHECKING:
    from qkattr.experiments.hydra import Hydra
    from qkattr.experiments.steer import Steering


def show(steering: Steering) -> None:
    """The edits, the prediction at every scale, and who looked instead."""
    from qkattr.cli.show import console, percent, say, show_table
    from qkattr.errors import some

    out = console()
    rows = [
        (
            f"{e['boundary']}:{e['kind'] if e['index'] is None else e['index']}",
            f"{quoted(e['token'])} {e['position']}",
            e["side"],
            "" if e["activation"] is None else f"{e['activation']:.3g}",
            " ".join(e["heads"]),
            e["label"],
        )
        for e in steering.edits
    ]
    columns = ("component", "at", "side", "activation|", "heads", "label")
    if rows:
        show_table(out, "Scaled", columns, rows)
    if steering.ablated:
        say(out, f"Ablated: {' '.join(steering.ablated)}")
    others = "frozen at the clean run" if steering.freeze_others else "live"
    norms = "live" if steering.live_scales else "frozen"
    share = percent(steering.share_of_heads)
    heads = "1 head" if steering.n_heads == 1 else f"{steering.n_heads} heads"
    say(out, f"{heads}, {share} of the model's; patterns of the others {others}")
    say(out, f"norm scales of edited reads {norms}; values and everything else as they are")
    control = (steering.control or {}).get("tracked", {})
    first, *others = list(steering.tracked)[: 4 if control else 5]
    rows = [
        (
            f"{scale:g}",
            quoted(steering.top[i][0]["token"]),
            f"{steering.tracked[first][i]:.4f}",
            *_spread(control.get(first), i),
            *(f"{steering.tracked[name][i]:.4f}" for name in others),
            f"{steering.kl[i]:.4f}",
            *_attention(steering.patterns[i], steering.keys),
        )
        for i, scale in enumerate(steering.scales)
    ]
    named, *more = (f"P {quoted(name, 16)}|" for name in (first, *others))
    columns = ("scale|", "says", named, *(["control|"] if control else []), *more, "KL|")
    keys = some([f"{quoted(steering.tokens[k], 16)} {k}" for k in steering.keys])
    title = "Next token"
    if steering.patterns[0]:
        columns = (*columns, "attention|")
        title = f"Next token; mean attention of the edited heads to {keys}"
    show_table(out, title, columns, rows)
    _say_control(out, steering)
    rows = [(r["head"], f"{r['attention']:.4f}", f"{r['change']:+.4f}") for r in steering.rose[:5]]
    if rows:
        at = f"at scale {steering.rose[0]['scale']:g}"
        title = f"Unedited heads that look at {keys} otherwise {at}"
        show_table(out, title, ("head", "clean attention|", "change|"), rows)


def _spread(control: dict[str, list[float]] | None, i: int) -> list[str]:
    """The median and range of a probability at a scale under the random edits, if there are any."""
    if control is None:
        return []
    median, low, high = (control[of][i] for of in ("median", "low", "high"))
    return [f"{median:.2f} ({low:.2f}..{high:.2f})"]


def _say_control(out, steering: Steering) -> None:
    """What the columns of the control are, or why there are none."""
    from qkattr.cli.show import say

    control = steering.control
    if control is None:
        return
    if "reason" in control:
        say(out, f"There is no random control. {control['reason']}")
        return
    what = []
    if steering.edits:
        what.append("other active features of the same positions and sizes")
    if steering.ablated:
        what.append("other heads of the same blocks")
    say(
        out,
        f"control: the probability before it (median and range) when {' and '.join(what)} are "
        f"edited instead: {control['draws']} random draws, seed {control['seed']}",
    )


def _attention(patterns: dict[str, list[float]], keys: list[int]) -> list[str]:
    """The mean over heads, if there are any."""
    rows = list(patterns.values())
    return [f"{sum(row[k] for row in rows for k in keys) / len(rows):.4f}"] if rows else []


def show_hydra(hydra: Hydra) -> None:
    from qkattr.cli.show import console, say, show_table

    out = console()
    rows = [
        (n, hydra.heads[n - 1] if n else "", f"{live:.4f}", f"{frozen:.4f}")
        for n, live, frozen in zip(hydra.counts, hydra.live["p"], hydra.frozen["p"], strict=True)
    ]
    columns = ("heads|", "the last of them", "P, others live|", "P, others frozen|")
    show_table(out, f"P({quoted(hydra.token)}) at scale {hydra.scale:g}", columns, rows)

    def said(fate) -> str:
        n = fate["flip"]
        return "never flips" if n is None else f"flips with {n} head{'s' * (n != 1)}"

    say(out, f"The prediction {said(hydra.live)}; with the others frozen it {said(hydra.frozen)}.")
    rows = [(c["head"], f"{c['before']:.4f}", f"{c['rise']:+.4f}") for c in hydra.compensation]
    if rows:
        title = "Unedited heads that make up for it, all of them edited"
        show_table(out, title, ("head", "clean attention|", "rise|"), rows)
