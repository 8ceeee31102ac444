"""Random controls of `steer`: what is drawn, that the runs are those of the draws, what is said."""

from __future__ import annotations

import numpy as np
import pytest
from steering import KEY, QUERY, SAME

import qkattr
from qkattr import Edit
from qkattr.cli.main import main
from qkattr.errors import InputError
from qkattr.experiments.control import draw_controls, matched
from qkattr.experiments.edits import Placed
from qkattr.experiments.steer import MOST_DRAWS
from qkattr.kinds import Kind

SCALES = [-1.0, 0.0, 1.0]


def active(result, boundary, position):
    """Feature ids and |vector| at a position, by slot."""
    parts = result.subject.components
    kinds = np.asarray(parts.kind)[boundary, position]
    return {
        slot: int(np.asarray(parts.index)[boundary, position, slot])
        for slot in np.flatnonzero(kinds == Kind.FEATURE)
    }


def feature_edit(result, side="key", n=1, boundary=1, heads=((1, 0), (1, 2))):
    ids = list(active(result, boundary, KEY).values())[:n]
    heads = () if side == "residual" else heads
    return [Edit(boundary, i, KEY, side, heads) for i in ids]


def test_matched_is_near_in_size_and_draws_none_twice():
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(size=20))
    sizes[10:] = sizes[:10] * 1.01  # a twin for everyone
    for k in (1, 4, 10):
        chosen = matched(sizes[:k], sizes[k:], np.random.default_rng(k))
        assert len(set(chosen.tolist())) == k and 0 <= chosen.min() < chosen.max() + 1 <= 20 - k
    # Of the three nearest: far nearer than chance.
    one, others = sizes[:1], sizes[1:]
    drawn = [others[matched(one, others, np.random.default_rng(i))] for i in range(50)]
    far = np.abs(np.log(np.array(drawn) / one))
    assert np.mean(far) < np.abs(np.log(sizes[1:] / sizes[0])).mean() / 2


def test_each_is_matched_to_its_own():
    """In the order that was asked, whatever order they were drawn in."""
    sizes, others = np.array([1.0, 10.0, 100.0]), np.array([99.0, 98.0, 97.0, 1.1, 1.2, 1.3])
    chosen = matched(sizes[[0, 2]], others, np.random.default_rng(3))
    assert others[chosen[0]] < 2 and others[chosen[1]] > 90


@pytest.mark.parametrize("side", ["key", "query", "residual"])
def test_draws_are_other_features_of_the_same_place(result, side):
    subject = result.subject
    slots = list(active(result, 1, KEY))[:2]
    heads = () if side == "residual" else ((1, 0), (1, 2))
    placed = [Placed(1, KEY, slot, side, heads) for slot in slots]
    draws = draw_controls(subject, placed, (), draws=20, seed=0)
    assert len(draws) == 20
    for draw in draws:
        assert [(e.boundary, e.position, e.side, e.heads) for e in draw.placed] == [
            (e.boundary, e.position, e.side, e.heads) for e in placed
        ]
        drawn = {edit.slot for edit in draw.placed}
        assert len(drawn) == 2 and not drawn & set(slots) and drawn <= set(active(result, 1, KEY))
    assert draws == draw_controls(subject, placed, (), draws=20, seed=0)
    assert draws != draw_controls(subject, placed, (), draws=20, seed=1)


def again(described):
    """The edit that `describe` described."""
    heads = [tuple(map(int, head.split("."))) for head in described["heads"]]
    names = ("boundary", "index", "position", "side")
    return Edit(*(described[name] for name in names), tuple(heads))


@pytest.mark.parametrize("side", ["key", "query", "residual"])
@pytest.mark.parametrize("options", [{}, dict(freeze_others=True), dict(live_scales=True)])
def test_the_control_is_what_steering_the_draws_gives(result, side, options):
    """Every draw, asked for as edits of its own, in a run of its own."""
    edits = feature_edit(result, side)
    both = qkattr.steer(result, edits, scales=SCALES, draws=5, seed=3, **options)
    assert both.control is not None and both.control["draws"] == 5
    token = next(iter(both.tracked))
    p, kl = [], []
    for drawn in both.control["edits"]:
        one = [again(described) for described in drawn]
        track = [both.clean[0]["id"]]
        found = qkattr.steer(result, one, scales=SCALES, draws=0, track=track, **options)
        p.append(next(iter(found.tracked.values())))
        kl.append(found.kl)
    for name, by in (("median", np.median), ("low", np.min), ("high", np.max)):
        np.testing.assert_allclose(both.control["tracked"][token][name], by(p, axis=0), atol=SAME)
        np.testing.assert_allclose(both.control["kl"][name], by(kl, axis=0), atol=SAME)
    assert both.control["kl"]["high"][SCALES.index(1.0)] < SAME


def test_it_changes_nothing_else(result):
    edits = feature_edit(result, n=2)
    alone = qkattr.steer(result, edits, scales=SCALES, draws=0).to_json()
    both = qkattr.steer(result, edits, scales=SCALES).to_json()
    assert alone.pop("control") is None and both.pop("control")["draws"] == 8
    np.testing.assert_allclose(alone.pop("kl"), both.pop("kl"), atol=SAME)
    for i in range(len(SCALES)):
        ours, theirs = (said["top"][i] for said in (alone, both))
        assert [t["id"] for t in ours[:3]] == [t["id"] for t in theirs[:3]]
    assert alone["edits"] == both["edits"] and alone["keys"] == both["keys"]


def test_ablated_heads_are_compared_with_other_heads_of_their_blocks(result):
    found = qkattr.steer(result, [], scales=[0.0], ablate=[(1, 0), (2, 1)], draws=4)
    assert found.control["ablated"] and found.control["edits"] == [[]] * 4
    for heads, p in zip(found.control["ablated"], range(4), strict=True):
        blocks = [h.split(".")[0] for h in heads]
        assert blocks == ["1", "2"] and not {"1.0", "2.1"} & set(heads), p
    p = []
    for heads in found.control["ablated"]:
        gone = [tuple(map(int, h.split("."))) for h in heads]
        alone = qkattr.steer(result, [], scales=[0.0], ablate=gone, draws=0,
                             track=[found.clean[0]["id"]])  # fmt: skip
        p.append(next(iter(alone.tracked.values()))[0])
    token = next(iter(found.tracked))
    assert found.control["tracked"][token]["median"][0] == pytest.approx(np.median(p), abs=SAME)


@pytest.mark.parametrize(
    "component, side, said",
    [("error", "key", "The error at"), ("bias", "query", "The bias at"),
     ("error", "residual", "The error at")],
)  # fmt: skip
def test_what_is_the_only_one_of_its_kind_has_no_control(result, component, side, said):
    heads = () if side == "residual" else ((1, 0),)
    edits = [Edit(1, component, KEY, side, heads), *feature_edit(result, side)]
    found = qkattr.steer(result, edits, scales=SCALES)
    assert set(found.control) == {"reason"} and said in found.control["reason"]
    assert "no other could be edited in its place." in found.control["reason"]


def test_too_few_others_are_no_control(result):
    n = len(active(result, 1, KEY))
    edits = feature_edit(result, n=n // 2 + 1)
    found = qkattr.steer(result, edits, scales=SCALES)
    assert f"{n // 2 + 1} features are edited at" in found.control["reason"]
    assert "too few to draw from." in found.control["reason"]
    all_heads = [(1, head) for head in range(result.settings["n_heads"])]
    found = qkattr.steer(result, [], scales=[0.0], ablate=all_heads)
    assert "heads of block 1 are ablated" in found.control["reason"]


@pytest.mark.parametrize("draws", [-1, MOST_DRAWS + 1])
def test_how_many_draws(result, draws):
    with pytest.raises(InputError, match=f"draws is {draws}, expected 0 to {MOST_DRAWS}"):
        qkattr.steer(result, feature_edit(result), draws=draws)


def test_columns_of_the_frame(result):
    pytest.importorskip("pandas")
    found = qkattr.steer(result, feature_edit(result), scales=SCALES)
    frame = found.to_pandas()
    assert {"control_median", "control_low", "control_high"} <= set(frame.columns)
    assert (frame.control_low <= frame.control_high).all()


def test_the_command(cli, result, root, capsys, monkeypatch, tmp_path):
    edit = feature_edit(result)[0]
    asked = ("--edit", f"1:{edit.component}@{KEY}:key:1.0,1.2", "--scales", "0,2")
    said = cli(*asked, "--draws", 3, "--seed", 5)
    assert (said["control"]["draws"], said["control"]["seed"]) == (3, 5)
    assert set(said["control"]["tracked"]) == set(said["tracked"])
    assert cli(*asked, "--no-control")["control"] is None
    monkeypatch.chdir(root)
    command = ("steer", "result" if (root / "result").is_dir() else "hi hi 12hi hi hi 12")
    command += ("-m", "model", "-s", "saes")
    assert main([*command, *asked, "--query", str(QUERY)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "when other active features of the same positions and sizes are edited instead: 8" in out
    assert main([*command, "--edit", f"1:error@{KEY}:key:1.0"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "There is no random control. The error at" in out
    assert main([*command, "--ablate", "1.0", "--scales", "0"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "when other heads of the same blocks are edited instead: 8 random draws" in out


def test_the_figure(result, tmp_path):
    pytest.importorskip("matplotlib", reason="figures are an extra")
    found = qkattr.steer(result, feature_edit(result), scales=SCALES, draws=2)
    assert "2 random edits" in qkattr.figure(found, tmp_path / "f.svg").read_text()
