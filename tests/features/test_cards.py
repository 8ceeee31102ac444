"""Cards, their files and their JSON, in traces."""

from __future__ import annotations

import dataclasses
import json

import jax
import jsonschema
import numpy as np
import pytest
from scans import (
    COARSE,
    CONFIG,
    COUNT,
    EXACT,
    LENGTH,
    LEVEL,
    N_ROWS,
    SAME,
    bundle_of,
    cards,
    naive,
    rows,
)
from tiny import within

import qkattr
from qkattr.errors import InputError
from qkattr.export.feature_json import export_features, feature_json, feature_number
from qkattr.features import Cards, with_cards


def test_a_card_is_what_a_loop_finds():
    checked = 0
    for b, a in naive().items():
        for f in range(a.shape[-1]):
            card, values = cards().card(b, f), a[..., f]
            count = (values > 0).sum()
            assert (card.boundary, card.index, card.count) == (b, f, count)
            assert card.density == pytest.approx(count / (N_ROWS * (LENGTH - 1)), rel=EXACT)
            assert card.max == pytest.approx(values.max(), rel=SAME)
            mean = values.sum() / max(count, 1)
            within("mean", card.mean, mean, LEVEL, max(values.max(), 1e-9))
            assert sum(n for *_, n in card.histogram) == pytest.approx(count, rel=COUNT, abs=3)
            for low, high, n in card.histogram[1:]:
                inside = ((values >= low) & (values < high)).sum()
                assert n == pytest.approx(inside, abs=COUNT * (1 + inside) + 0.5)
            for e in card.examples:
                start = e.position - e.at
                expected = values[e.row, start : start + len(e.tokens)]
                assert e.tokens == [str(i) for i in rows()[e.row, start : start + len(e.tokens)]]
                within("own", e.activation, expected[e.at], LEVEL, values.max())
                within("window", e.activations, expected, COARSE, values.max())
                checked += 1
            top = [e for e in card.examples if e.quantile == "Top"]
            assert len(top) == min(CONFIG.top, count)
    assert checked > 200


def test_quantile_examples_are_near_their_quantile():
    several, ranks = 0, {name: [] for name in ("0.9", "0.7", "0.5", "0.3", "0.1")}
    for b, a in naive().items():
        for f in range(cards().width(b)):
            examples = [e for e in cards().card(b, f).examples if e.quantile != "Top"]
            several += len(examples) == 5
            values = [e.activation for e in examples]
            assert values == sorted(values, reverse=True)
            active = np.sort(a[..., f][a[..., f] > 0])
            for e in examples:
                rank = np.searchsorted(active, e.activation) / len(active)
                ranks[e.quantile.removeprefix("Quantile ")].append(rank)
    assert several > 10
    for name, found in ranks.items():  # one of eight sampled: 0.15 is its standard error
        assert abs(np.mean(found) - float(name)) < 0.1


def test_cards_come_back_from_their_file(tmp_path):
    path = cards().save(tmp_path / "sub" / "cards.npz")
    back = Cards.open(path)
    for field in dataclasses.fields(Cards):
        was, now = getattr(cards(), field.name), getattr(back, field.name)
        if field.name == "norms":
            jax.tree.map(np.testing.assert_array_equal, vars(was), vars(now))
        elif isinstance(was, np.ndarray):
            np.testing.assert_array_equal(was, now)
        else:
            assert was == now
    assert back.card(3, 7) == cards().card(3, 7)
    assert back.label(3, 7) == back.labels()[3, 7] != ""
    assert back.label(2, 0) == back.label(3, 999) == back.label(3, -1) == ""
    assert len(back.labels()) == len(back) == 40 + 56
    assert back.labels([(1, 2), (2, 2)]) == {(1, 2): back.label(1, 2)}


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = cards().save(tmp_path / "cards.npz")
    whole = path.read_bytes()

    def refused(content: bytes | None, said: str):
        path.write_bytes(content or b"")
        with pytest.raises(InputError, match=said):
            Cards.open(path)

    refused(b"", "no feature cards")
    refused(whole[: len(whole) // 2], "no feature cards")
    refused(b"hello", "no feature cards")

    def with_columns(**changed) -> bytes:
        path.write_bytes(whole)
        with np.load(path) as data:
            columns = {name: data[name] for name in data.files} | changed
        with path.open("wb") as file:
            np.savez(file, **{k: v for k, v in columns.items() if v is not None})
        return path.read_bytes()

    header = json.dumps({"schema": 99}).encode()
    refused(with_columns(header=np.frombuffer(header, np.uint8)), "schema 99")
    refused(with_columns(auc=None), "damaged feature cards")
    refused(with_columns(auc=np.zeros((3, 2), np.uint8)), "damaged feature cards")
    refused(with_columns(context_row=np.full((96, 8), 10**6)), "outside the rows")
    with pytest.raises(InputError, match="no such file"):
        Cards.open(tmp_path / "absent.npz")


#: FORMATS.md section 1.5.
SCHEMA = {
    "type": "object",
    "required": ["index", "examples_quantiles", "top_logits", "bottom_logits"],
    "properties": {
        "index": {"type": "integer"},
        "top_logits": {"type": "array", "items": {"type": "string"}},
        "bottom_logits": {"type": "array", "items": {"type": "string"}},
        "examples_quantiles": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["quantile_name", "examples"],
                "properties": {
                    "quantile_name": {"type": "string"},
                    "examples": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": [
                                "tokens",
                                "tokens_acts_list",
                                "train_token_ind",
                                "is_repeated_datapoint",
                            ],
                            "properties": {
                                "tokens": {"type": "array", "items": {"type": "string"}},
                                "tokens_acts_list": {
                                    "type": "array",
                                    "items": {"type": "number"},
                                },
                                "train_token_ind": {"type": "integer"},
                                "is_repeated_datapoint": {"type": "boolean"},
                            },
                        },
                    },
                },
            },
        },
        "act_min": {"type": "number"},
        "act_max": {"type": "number"},
        "histogram": {"type": "array", "items": {"type": "number"}},
        "quantile_values": {"type": "array", "items": {"type": "number"}},
        "activation_frequency": {"type": "number"},
    },
}


def test_feature_json_is_of_the_common_format():
    names = set()
    for f in range(cards().width(1)):
        value = json.loads(json.dumps(feature_json(cards().card(1, f))))
        jsonschema.validate(value, SCHEMA)
        for quantile in value["examples_quantiles"]:
            names.add(quantile["quantile_name"])
            for example in quantile["examples"]:
                assert len(example["tokens"]) == len(example["tokens_acts_list"])
                assert example["tokens_acts_list"][example["train_token_ind"]] > 0
    assert "Top" in names and len(names) == 6


def test_feature_files_are_found_by_the_graphs_numbers(tmp_path):
    folder = export_features(cards(), tmp_path, [3])
    assert folder == tmp_path / "features" / "tiny" and len(list(folder.iterdir())) == 56
    layer, index = 2, 9
    number = (layer + index) * (layer + index + 1) // 2 + index
    assert feature_number(3, 9) == number
    assert json.loads((folder / f"{number}.json").read_text())["index"] == 9


# In traces


def test_traces_name_their_features(tmp_path):
    bundle = with_cards(bundle_of(), cards())
    result = qkattr.trace(bundle, rows()[0].tolist(), qk=2)
    assert result.labels and set(result.labels.items()) <= set(cards().labels().items())
    active = {(b, int(f)) for b, a in naive().items() for f in np.flatnonzero((a[0] > 0).any(0))}
    assert set(result.labels) == active
    nodes = [n for n in result.to_json()["nodes"] if n["kind"] == "feature"]
    assert nodes and all(n["clerp"] == cards().label(n["boundary"], n["index"]) for n in nodes)
    table = next(iter(result.qk.values()))
    sides = [pair[side] for pair in table.pairs for side in ("query", "key")]
    assert all(side["label"] for side in sides if side["kind"] == "feature")
    result.save(tmp_path)
    assert qkattr.open(tmp_path).labels == result.labels
    assert not qkattr.trace(bundle_of(), rows()[0].tolist(), qk=0).labels


def test_cards_of_other_saes_are_refused():
    other = dataclasses.replace(bundle_of(), saes_hash="other")
    with pytest.raises(InputError, match="other SAEs"):
        with_cards(other, cards())
