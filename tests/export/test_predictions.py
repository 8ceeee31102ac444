"""The next tokens as they are shown, with the role of each."""

from __future__ import annotations

import types

import pytest

from qkattr.export.predictions import predictions, shown


def result(*tokens, target=(), against=None):
    """Next tokens by falling probability, ids from 0 on."""
    at = tokens.index(against) if against else -1
    rows = [
        dict(token=t, id=i, probability=0.5**i, target=t in target,
             against=at if t in target else -1)
        for i, t in enumerate(tokens)
    ]  # fmt: skip
    return types.SimpleNamespace(predictions=rows)


def roles(result):
    return [p["role"] for p in predictions(result)]


def test_targets():
    assert roles(result("a", "b", "c", target=("a", "c"))) == ["target", "", "target"]
    assert roles(result("a", "b")) == ["", ""]


def test_both_tokens_of_a_contrast():
    assert roles(result("a", "b", "c", target=("c",), against="b")) == ["", "against", "for"]
    # The id of the token that is subtracted may be 0.
    assert roles(result("a", "b", "c", target=("b",), against="a")) == ["against", "for", ""]


@pytest.mark.parametrize("most", [0, 1, 5])
def test_an_unlikely_token_with_a_role_is_shown(most):
    tokens = list("abcdefghij")
    listed = [p["token"] for p in shown(result(*tokens, target=("j",), against="h"), most)]
    assert listed == [*tokens[:most], "h", "j"]


def test_notes_say_the_role():
    noted = {p["token"]: p["note"] for p in shown(result("a", "b", target=("a",), against="b"), 2)}
    assert noted["a"] == "for: traced is its logit less that of 'b'"
    assert noted["b"] == "against: its logit is subtracted from that of 'a'"
    assert [p["note"] for p in shown(result("a", "b", target=("a",)), 2)] == ["traced", ""]
