"""Measures of heads and places against what the target loses without them, as tables over prompts.

    rank    Spearman's correlation of |measure| and |lost|
    sign    of the heads (places) whose loss is largest in size, the share whose sign the measure
            has; one without a sign says of all that they help, so that its share is a baseline
    top     the share of the first by |measure| that are among the first by |lost|

`misled` says for which heads and places the signs go wrong, and by how much the sizes are off.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qkattr.experiments.ablations import ABLATIONS, OTHERS
from qkattr.experiments.faithfulness.statistics import Table, rank_correlation
from qkattr.experiments.rankings import FIRST_ORDER

#: Heads, and places, whose signs are compared; and how many of each are the first.
MATTER = dict(heads=30, places=15)
TOP = 15
#: A head rests on sinks that gives them this much of its attention; a place is saturated that has
#: this much of its query's; a head is repaired that matters less than this, others live.
RESTS, SATURATED, REPAIRED = 0.8, 0.9, 0.5
#: Heads that are listed as the worst.
WORST = 12

Agreement = dict[str, Any]


def agreement(measure: np.ndarray, lost: np.ndarray, matter: int) -> dict[str, float]:
    """rank, sign and top of one prompt."""
    first = lambda values, n: np.argsort(-np.abs(values), kind="stable")[:n]
    most = first(lost, matter)
    n = min(TOP, len(lost))
    return dict(
        rank=rank_correlation(np.abs(measure), np.abs(lost)),
        sign=float((np.sign(measure[most]) == np.sign(lost[most])).mean()),
        top=len(np.intersect1d(first(measure, n), first(lost, n))) / n,
    )


def effect_tables(prompts: list[Agreement]) -> dict[str, list[Agreement]]:
    """The tables `effects` (of heads), `places`, `misled` and `worst`."""
    there = [prompt for prompt in prompts if "effects" in prompt]
    heads, places = Table(), Table()
    for prompt in there:
        of_heads, of_places = prompt["effects"]["heads"], prompt["effects"]["places"]
        for ablation, lost in of_heads["lost"].items():
            _compare(heads, (ablation,), of_heads["measures"], lost, MATTER["heads"])
        _compare(places, (), of_places["measures"], of_places["lost"], MATTER["places"])
    return dict(
        effects=heads.rows("ablation", "others", "read", "measure", "by"),
        places=places.rows("others", "read", "measure", "by"),
        misled=_misled(there),
        worst=_worst(there),
    )


def _compare(table: Table, row: tuple, measures: Agreement, lost: Agreement, matter: int) -> None:
    for change, values in lost.items():
        for measure, said in measures.items():
            found = agreement(np.array(said), np.array(values), matter)
            table.add((*row, *change.split(), *name_and_derivative(measure)), **found)


def name_and_derivative(measure: str) -> tuple[str, str]:
    """`("less mean", "live")` of "less mean live"; `("influence", "")` of "influence"."""
    name = next((n for n in (*FIRST_ORDER, "derivative") if measure.startswith(f"{n} ")), measure)
    return name, measure[len(name) + 1 :]


def _misled(prompts: list[Agreement]) -> list[Agreement]:
    """Of groups of heads and of places among those that matter most: their share, the sign of the
    first-order measure that goes with the ablation (by the jacobian, and by the model's own
    derivative), and its size in relation to what is lost."""
    table = Table()
    for prompt in prompts:
        of_heads, of_places = prompt["effects"]["heads"], prompt["effects"]["places"]
        for ablation, others, name in _ablated():
            lost = np.array(of_heads["lost"][ablation][f"{others} logit"])
            groups = _head_groups(of_heads, ablation)
            _add_groups(table, ("heads", ablation, others), of_heads, name, lost, groups)
        for others in OTHERS:
            lost = np.array(of_places["lost"][f"{others} logit"])
            for name in ("derivative", "masking"):
                row = ("places", name, others)
                _add_groups(table, row, of_places, name, lost, _place_groups(of_places))
    return table.rows("of", "what", "others", "group")


def _ablated() -> Iterator[tuple[str, str, str]]:
    for ablation, name in zip(ABLATIONS, FIRST_ORDER, strict=True):
        for others in OTHERS:
            yield ablation, others, name


def _add_groups(table: Table, row: tuple, found: Agreement, name: str, lost, groups) -> None:
    matter = np.argsort(-np.abs(lost), kind="stable")[: MATTER[row[0]]]
    for group, mask in groups.items():
        here = matter[mask[matter]]
        columns: dict[str, float | None] = dict(share=len(here) / len(matter))
        for by in ("jacobian", "live"):
            said = np.array(found["measures"][f"{name} {by}"])[here]
            some, right = len(here) > 0, np.sign(said) == np.sign(lost[here])
            columns[f"sign {by}"] = float(right.mean()) if some else None
            size = np.abs(said).sum() / max(np.abs(lost[here]).sum(), 1e-30)
            columns[f"size {by}"] = float(size) if some else None
        table.add((*row, group), **columns)


def _head_groups(found: Agreement, ablation: str) -> dict[str, np.ndarray]:
    n_blocks, n_heads = found["shape"]
    depth = np.repeat(np.arange(n_blocks), n_heads) * 3 // n_blocks
    sinks = np.array(found["sinks"])
    frozen, live = (np.abs(found["lost"][ablation][f"{others} logit"]) for others in OTHERS)
    return {
        "all": sinks >= 0,
        "rests on sinks": sinks >= RESTS,
        "does not": sinks < RESTS,
        "repaired": live < REPAIRED * frozen,
        "first third": depth == 0,
        "middle third": depth == 1,
        "last third": depth == 2,
    }


def _place_groups(found: Agreement) -> dict[str, np.ndarray]:
    _, _, query, key = np.array(found["places"]).T
    attention = np.array(found["attention"])
    return {
        "all": attention >= 0,
        "saturated": attention >= SATURATED,
        "not saturated": attention < SATURATED,
        "key 0": key == 0,
        "own key": (key == query) & (key > 0),
        "other key": (key != query) & (key > 0),
    }


def _worst(prompts: list[Agreement]) -> list[Agreement]:
    """The heads that lose most, zeroed with the others live, and whose effect has the other
    sign."""
    rows = []
    for prompt in prompts:
        found = prompt["effects"]["heads"]
        effect = np.array(found["measures"]["effect jacobian"])
        lost = np.array(found["lost"]["zero"]["live logit"])
        wrong = np.where(np.sign(effect) != np.sign(lost), np.abs(lost), 0.0)
        for i in np.argsort(-wrong, kind="stable")[:WORST]:
            changes = {
                f"{ablation} {others}": found["lost"][ablation][f"{others} logit"][i]
                for ablation, others, _ in _ablated()
            }
            rows.append(
                dict(
                    text=prompt["text"],
                    head=".".join(map(str, divmod(int(i), found["shape"][1]))),
                    effect=float(effect[i]),
                    live=found["measures"]["effect live"][i],
                    sinks=found["sinks"][i],
                    **changes,
                )
            )
    return sorted(rows, key=lambda row: -abs(row["zero live"]))[:WORST]


def effect_failures(prompts: list[Agreement], tables: Agreement) -> list[str]:
    """Where effects mislead, in words."""
    said = [
        f"{row['text']!r}: head {row['head']} has an effect of {row['effect']:+.2f}, and without "
        f"it the logit moves by {-row['zero live']:+.2f} ({-row['zero frozen']:+.2f} with the "
        f"other patterns held); it gives sinks {100 * row['sinks']:.0f} % of its attention"
        for row in tables.get("worst", ())[:3]
    ]
    said += [_against_influence(prompts, others) for others in OTHERS if tables.get("effects")]
    for row in tables.get("misled", ()):
        kind = row["of"], row["what"], row["group"]
        if kind == ("places", "derivative", "saturated") and row["share"]["mean"] > 0:
            said.append(
                f"places that have more than {SATURATED:g} of their query's attention: the "
                f"derivative says {row['size jacobian']['mean']:.2f} of what masking the key "
                f"changes, others {row['others']}"
            )
    return said


def _against_influence(prompts: list[Agreement], others: str) -> str:
    found = [prompt["effects"]["heads"] for prompt in prompts if "effects" in prompt]
    better = [
        rank_correlation(*np.abs([one["measures"]["influence"], lost]))
        > rank_correlation(*np.abs([one["measures"]["effect jacobian"], lost]))
        for one in found
        for lost in [one["lost"]["zero"][f"{others} logit"]]
    ]
    return (
        f"in {sum(better)} of {len(better)} prompts influence ranks zeroed heads better than "
        f"|effect of the head| does, others {others}"
    )
