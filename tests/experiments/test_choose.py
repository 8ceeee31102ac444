"""Which heads and features are chosen, groups and labels, and the hydra effect."""

from __future__ import annotations

import json

import folders
import numpy as np
import pytest
from steering import (
    HEADS,
    KEY,
    QUERY,
    SAME,
    features_at,
    only,
    p_top,
    top_token,
)

import qkattr
from qkattr import Edit
from qkattr.errors import InputError
from qkattr.experiments.choose import heads_between, how_many
from qkattr.experiments.hydra import greedy_heads, hydra
from qkattr.labels.groups import read_group, search_labels
from qkattr.labels.read import read_labels

# Which heads and features -------------------------------------------------------------------------


def test_heads_are_ordered_by_what_they_carried(result):
    found = result.head_loadings(source=KEY, target=QUERY)
    into = result.head_loadings(source=KEY, target=QUERY, into="feature")
    for by, value in (("influence", found.influence), ("loading", np.abs(into.loadings))):
        heads = heads_between(result, result, source=KEY, target=QUERY, by=by)
        values = [value[head] for head in heads]
        assert values == sorted(values, reverse=True) and values[-1] > 0
        assert len(heads) == np.count_nonzero(value)
        chosen = qkattr.choose_edits(result, source=KEY, target=QUERY, heads=4, by=by)
        # Nothing but tokens lies at boundary 0.
        expected = {head for head in heads[:4] if head[0] > 0}
        assert {head for edit in chosen for head in edit.heads} == expected


@pytest.mark.parametrize("by", ["effect", "masking", "attention"])
def test_heads_that_work_for_the_target_come_first(result, by):
    rows = {(r["layer"], r["head"]): r for r in result.head_effects(source=KEY, target=QUERY)}
    heads = heads_between(result, result, source=KEY, target=QUERY, by=by)
    values_of = "probability" if by == "attention" else by
    values = [rows[head][values_of] for head in heads]
    assert values == sorted(values, reverse=True) and values[-1] > 0
    assert len(heads) == sum(
        r["probability" if by == "attention" else by] > 0 for r in rows.values()
    )
    if by == "effect":
        assert heads == heads_between(result, result, source=KEY, target=QUERY)


def marginals(result, heads, side, what):
    """Of every feature of one block, summed over heads."""
    total: dict[int, float] = {}
    for layer, head in heads:
        qk = qkattr.qk_attribution(result, layer=layer, head=head, query=QUERY, key=KEY)
        for m in getattr(qk, f"{side}_marginals"):
            if m["kind"] == "feature":
                total[m["index"]] = total.get(m["index"], 0.0) + m[what]
    return total


@pytest.mark.parametrize("side, what", [("key", "value"), ("query", "contrast")])
def test_features_are_those_of_the_largest_marginals(result, side, what):
    heads = [(1, 0), (2, 3), (1, 2)]
    for n in (1, 2, 9):
        chosen = qkattr.choose_edits(
            result, source=KEY, target=QUERY, heads=heads, side=side, features=n
        )
        for block in (1, 2):
            mates = tuple(head for head in heads if head[0] == block)
            total = marginals(result, mates, side, what)
            best = sorted((f for f in total if total[f] > 0), key=lambda f: -total[f])[:n]
            in_block = [edit for edit in chosen if edit.boundary == block]
            assert [edit.component for edit in in_block] == best
            for edit in in_block:
                assert edit.heads == mates and edit.side == side
                assert edit.position == (KEY if side == "key" else QUERY)


def test_named_heads_and_positions(result):
    asked = dict(source=" #1", target="12#2", features=2)
    by_text = qkattr.choose_edits(result, heads="1.0, 2.3", **asked)
    by_pairs = qkattr.choose_edits(result, heads=[(1, 0), (2, 3)], **asked)
    assert by_text == by_pairs and by_text
    assert {(edit.position, edit.side) for edit in by_text} == {(KEY, "key")}


@pytest.mark.parametrize(
    "asked, n_heads, n",
    [
        ("5%", 270, 14),
        ("5%", 12, 1),
        ("25%", 12, 3),
        ("26%", 12, 4),
        ("100%", 270, 270),
        ("0.1%", 270, 1),
        (7, 12, 7),
        ("12", 12, 12),
    ],
)
def test_how_many(asked, n_heads, n):
    assert how_many(asked, n_heads) == n


@pytest.mark.parametrize("asked", [0, -1, 13, "0%", "101%", "nan%", "inf%", "x", "", "1.5"])
def test_how_many_is_refused(asked):
    with pytest.raises(InputError, match="give "):
        how_many(asked, 12)


def test_greedy_takes_the_best_head_of_every_step(result):
    subject, top = result.subject, top_token(result)
    edits = [Edit(b, "error", KEY, "key", tuple(h for h in HEADS if h[0] == b)) for b in (1, 2)]
    expected: list = []
    for _ in range(2):
        p = {}
        for head in HEADS:
            if head not in expected:
                steering = qkattr.steer(
                    result, only(edits, [*expected, head]), scales=[0, 1], track=[top]
                )
                p[head] = p_top(result, steering)[0]
        lowest = sorted(p.values())
        assert lowest[1] - lowest[0] > SAME  # or there is no telling which is best
        expected.append(min(p, key=p.__getitem__))
    assert greedy_heads(subject, HEADS, edits, n=2) == expected
    assert greedy_heads(subject, HEADS, edits, n=99)[:2] == expected


def test_greedy_chooses_among_the_largest_loadings(result):
    group = {b: features_at(result, b, KEY)[:1] for b in (1, 2)}
    asked = dict(source=KEY, target=QUERY, group=group, by="influence")
    candidates = heads_between(result, result, source=KEY, target=QUERY, by="influence")[
        :2
    ]  # 10 % of 12 heads
    p = {}
    for head in candidates:
        edits = qkattr.choose_edits(result, heads=[head], **asked)
        steering = qkattr.steer(result, edits, scales=[0, 1], track=[top_token(result)])
        p[head] = p_top(result, steering)[0]
    chosen = qkattr.choose_edits(result, heads="greedy:1", **asked)
    assert {head for edit in chosen for head in edit.heads} == {min(p, key=p.__getitem__)}


# Groups and labels --------------------------------------------------------------------------------


@pytest.fixture
def named(result, root):
    """A file of groups and one of labels; the features that are active at the key."""
    first, second = features_at(result, 1, KEY)[:2]
    other = features_at(result, 2, KEY)[0]
    quiet = next(f for f in range(folders.WIDTH) if f not in features_at(result, 1, KEY))
    (root / "groups.toml").write_text(
        f'[spaces]\nfeatures = ["1:{first}", " 2:{other} ", "1:{quiet}"]\n'
        f'[second]\nfeatures = ["1:{second}"]\n'
    )
    (root / "one.toml").write_text(f'["a b"]\nfeatures = ["1:{second}"]\n')
    labels = {f"1:{first}": "A Space", f"2:{other}": "more spaces", f"1:{second}": "digits"}
    (root / "labels.json").write_text(json.dumps(labels))
    return first, second, other, quiet


def test_groups_and_labels(result, root, named):
    first, second, other, quiet = named
    spaces = read_group(root / "groups.toml", "spaces")
    assert spaces == {1: [first, quiet], 2: [other]}
    assert read_group(root / "one.toml") == read_group(root / "groups.toml", "second")
    labels = read_labels(root / "labels.json")
    assert search_labels(labels, "SPACE") == {1: [first], 2: [other]}
    asked = dict(source=KEY, target=QUERY, heads=[(1, 1), (1, 3), (2, 2)])
    by_group = qkattr.choose_edits(result, group=spaces, **asked)
    assert by_group == [
        Edit(1, first, KEY, "key", ((1, 1), (1, 3))),
        Edit(2, other, KEY, "key", ((2, 2),)),
    ]
    assert by_group == qkattr.choose_edits(result, group=search_labels(labels, "space"), **asked)
    steering = qkattr.steer(result.with_labels(labels), by_group, scales=[0, 1])
    assert [edit["label"] for edit in steering.edits] == ["A Space", "more spaces"]
    with pytest.raises(InputError, match=r"none of the group's features is active at position 3"):
        qkattr.choose_edits(result, group={0: [1], 1: [quiet]}, **asked)
    with pytest.raises(InputError, match=r"none of 3 labels contains 'zebra'"):
        search_labels(labels, "zebra")


def test_groups_and_labels_on_the_command_line(cli, named):
    first, second, other, _ = named
    ends = ("--from", KEY, "--to", -1, "--heads", "1.1,2.2", "--scales", "0,1")
    by_name = cli(*ends, "--group", "groups.toml:spaces")
    found = cli(*ends, "--labels", "labels.json", "--label", "space")
    alone = cli(*ends, "--group", "one.toml")
    assert [edit["index"] for edit in by_name["edits"]] == [first, other]
    assert [edit["label"] for edit in found["edits"]] == ["A Space", "more spaces"]
    assert [edit["index"] for edit in alone["edits"]] == [second]
    assert found["kl"] == by_name["kl"] != alone["kl"]


# The hydra effect ---------------------------------------------------------------------------------


def test_hydra_counts_are_separate_calls(result, edits):
    ranked = heads_between(result, result, source=KEY, target=QUERY, by="influence")
    heads = [head for head in ranked if head[0] > 0][:4]
    edits = only(edits, heads)
    scale = -4.0
    nested = hydra(result.subject, heads, edits, query=QUERY, key=KEY, scale=scale)
    assert nested.counts == [0, 1, 2, 3, 4]
    assert nested.heads == [f"{layer}.{head}" for layer, head in heads]
    assert nested.token == result.predictions[0]["token"]
    for fate, frozen in ((nested.live, False), (nested.frozen, True)):
        assert fate["p"][0] == pytest.approx(result.predictions[0]["probability"], abs=SAME)
        for n in nested.counts[1:]:
            steering = qkattr.steer(
                result, only(edits, heads[:n]), scales=[scale, 1], freeze_others=frozen,
                track=[top_token(result)],
            )  # fmt: skip
            assert fate["p"][n] == pytest.approx(p_top(result, steering)[0], abs=SAME)
            assert fate["token"][n] == steering.top[0][0]["token"]
        flips = [n for n in nested.counts if fate["token"][n] != nested.token]
        assert fate["flip"] == min(flips, default=None)
    assert nested.live["p"] != nested.frozen["p"]
    rises = [row["rise"] for row in nested.compensation]
    assert rises == sorted(rises, reverse=True)
    assert not {row["head"] for row in nested.compensation} & set(nested.heads)


def test_hydra_of_live_scales_and_ablated_heads(result, edits):
    heads, how = HEADS[:3], dict(live_scales=True)
    silent = (0, 1)
    nested = hydra(result.subject, heads, edits, query=QUERY, key=KEY, ablated=[silent], **how)
    for fate, frozen in ((nested.live, False), (nested.frozen, True)):
        for n in nested.counts:
            steering = qkattr.steer(
                result, only(edits, heads[:n]), scales=[0], freeze_others=frozen,
                ablate=[silent], track=[top_token(result)], **how,
            )  # fmt: skip
            assert fate["p"][n] == pytest.approx(p_top(result, steering)[0], abs=SAME)
    plain = hydra(result.subject, heads, edits, query=QUERY, key=KEY)
    assert np.abs(np.subtract(nested.live["p"], plain.live["p"])).min() > 100 * SAME
    assert "0.1" not in {row["head"] for row in nested.compensation}


def test_hydra_of_some_counts(result, edits):
    heads = HEADS[:4]
    every = hydra(result.subject, heads, edits, query=QUERY, key=KEY)
    some = hydra(result.subject, heads, edits, query=QUERY, key=KEY, counts=[1, 4])
    for all_of_it, part in ((every.live, some.live), (every.frozen, some.frozen)):
        assert part["p"] == pytest.approx([all_of_it["p"][n] for n in (1, 4)], abs=SAME)


# On the real model --------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_hydra(sally):
    """Frozen patterns take fewer than half the heads."""
    where = dict(source=" Sally", target=-1, by="influence")
    edits = qkattr.choose_edits(sally, heads=12, features=4, **where)
    ranked = heads_between(sally, sally, **where)[:12]
    needed = hydra(
        sally.subject,
        ranked,
        edits,
        query=sally.position(-1),
        key=sally.position(" Sally"),
    )
    assert needed.token == " Sally" and needed.live["p"][0] > 0.98
    assert needed.frozen["flip"] < needed.live["flip"] / 2
    assert needed.compensation and needed.compensation[0]["rise"] > 0.05
