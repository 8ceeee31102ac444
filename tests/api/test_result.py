"""What a `Result` answers: head loadings and positions by name."""

import re

import folders
import numpy as np
import pytest

import qkattr
from qkattr.errors import InputError
from qkattr.positions import find_position


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    root = tmp_path_factory.mktemp("result")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_saes(root / "saes")
    return qkattr.trace(qkattr.load(root / "model", root / "saes"), "hi hi hi 12 hi")


# Head loadings


def test_head_loadings_between_positions(plain):
    heads = plain.to_pandas("heads").merge(
        plain.to_pandas("nodes").set_index("node_id").position, left_on="source", right_index=True
    )
    heads = heads.merge(
        plain.to_pandas("nodes").set_index("node_id").position, left_on="target", right_index=True
    )
    last = len(plain.tokens) - 1
    there = heads[(heads.position_x == 1) & (heads.position_y == last)]
    found = plain.head_loadings(source=1, target=-1)
    assert found.n_edges > 0 and len(there)
    for (block, head), loading in there.groupby(["block", "head"]).loading.sum().items():
        assert abs(found.loadings[block, head] - loading) < 1e-4 * abs(found.loadings).max()
    top = found.top()
    assert [abs(h["loading"]) for h in top] == sorted(
        (abs(h["loading"]) for h in top), reverse=True
    )
    assert found.top(2) == top[:2] and len(top) == np.count_nonzero(found.loadings)


def test_head_loadings_of_one_edge_and_of_groups(plain):
    edges, ids = plain.graph.edges, plain.to_pandas("nodes").node_id
    crossing = np.flatnonzero((edges.block >= 0) & (np.abs(edges.heads).sum(1) > 0))
    one, other = crossing[0], crossing[-1]
    found = plain.head_loadings(source=ids[edges.source[one]], target=ids[edges.target[one]])
    assert found.n_edges == 1
    np.testing.assert_allclose(found.loadings[edges.block[one]], edges.heads[one], rtol=1e-6)
    assert np.isclose(found.residual, edges.residual[one])
    assert found.source == ids[edges.source[one]]
    group = plain.head_loadings(
        source=[ids[edges.source[e]] for e in (one, other)],
        target=[ids[edges.target[e]] for e in (one, other)],
    )
    assert group.n_edges >= 2
    everywhere = range(len(plain.tokens))
    total = plain.head_loadings(source=everywhere, target=everywhere)
    by_target = [plain.head_loadings(source=everywhere, target=t).loadings for t in everywhere]
    np.testing.assert_allclose(total.loadings, sum(by_target), rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match="no token '9_9_9' in the prompt"):
        plain.head_loadings(source="9_9_9", target=0)


# Positions

SALLY = ["<s>", "I", " Aunt", " Sally", ".", " Aunt", "5", "#1", "a#2", "a"]


@pytest.mark.parametrize(
    "where, position",
    [
        *((0, 0), (9, 9), (-1, 9), (-10, 0), ("3", 3), ("-2", 8)),
        *((" Sally", 3), ("Sally", 3), ("Sally ", 3), (" Aunt#1", 2), ("Aunt#2", 5)),
        *((".", 4), ("5#1", 6), ("#1", 7), ("a#2", 8), ("a", 9), ("I#1", 1)),
    ],
)
def test_positions(where, position):
    assert find_position(SALLY, where) == position


@pytest.mark.parametrize(
    "where, message",
    [
        (10, "position 10 is out of range: the prompt has 10 tokens; give one of 0..9, or of -10"),
        (-11, "position -11 is out of range"),
        (" Aunt", "token ' Aunt' is ambiguous: ' Aunt#1' at 2, ' Aunt#2' at 5; say which"),
        ("Aunt#3", "occurs 2 times, 'Aunt#3' asks for number 3; give #1..#2"),
        ("aunt", "no token 'aunt' in the prompt; `qkattr tokens` lists them"),
        ("", "no token '' in the prompt"),
    ],
)
def test_positions_that_are_none(where, message):
    with pytest.raises(InputError, match=re.escape(message)):
        find_position(SALLY, where)


# What a notebook shows


def test_reprs_are_a_line_without_arrays(plain):
    bundle = plain.subject.bundle
    assert repr(bundle).startswith("<Bundle ") and "2 blocks, d_model 16, 4 heads" in repr(bundle)
    assert "2 SAEs of 32 features" in repr(bundle)
    shown = [bundle, plain.head_loadings(source=1, target=-1), next(iter(plain.qk.values()))]
    for value in shown:
        assert "\n" not in repr(value) and "array" not in repr(value) and len(repr(value)) < 250
    assert " edges, " in repr(shown[1])


def test_qk_attributions_as_frames(plain):
    table = next(iter(plain.qk.values()))
    pairs = table.to_pandas()
    assert len(pairs) == len(table.pairs)
    assert pairs.query_kind[0] == table.pairs[0]["query"]["kind"]
    assert pairs.value[0] == table.pairs[0]["value"]
    marginals = table.to_pandas("key_marginals")
    assert list(marginals.value) == [m["value"] for m in table.key_marginals]
    with pytest.raises(
        InputError, match="no table 'nodes'; expected one of pairs, query_marginals"
    ):
        table.to_pandas("nodes")


@pytest.mark.parametrize("given", ["hi", None, 3])
def test_a_bundle_comes_first(plain, given):
    for call in (lambda: qkattr.trace(given, plain.subject.bundle), lambda: qkattr.run(given, [1])):
        with pytest.raises(InputError, match="first argument should be a bundle from qkattr.load"):
            call()


def test_near_names_include_the_model_of_the_package():
    with pytest.raises(InputError, match="no such model: 'smolm2'; did you mean smollm2"):
        qkattr.load("smolm2")
