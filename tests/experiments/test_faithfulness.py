"""Faithfulness: its measures against plain forward passes, its statistics against formulas."""

from __future__ import annotations

import json

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import within

import qkattr
from qkattr.cli.main import main
from qkattr.errors import InputError
from qkattr.experiments.choose import heads_between
from qkattr.experiments.faithfulness import Between, faithfulness
from qkattr.experiments.faithfulness.edges import measure_edges, probe
from qkattr.experiments.faithfulness.nodes import COUNTS, _log_p, measure_nodes, node_sizes
from qkattr.experiments.faithfulness.qk import measure_qk
from qkattr.experiments.faithfulness.statistics import (
    correlation,
    interval,
    rank_correlation,
    slope,
)
from qkattr.kinds import Kind
from qkattr.load.text.prompts import read_prompts
from qkattr.model.edits import Edits, ResidualEdits
from qkattr.model.transformer import block, forward
from qkattr.sources.dictionary import activations
from qkattr.subject import subject as open_subject

SAME = 2e-5  # the same arithmetic in other shapes, relative to the largest
IDS = [0, 40, 41, 42, 40, 41, 43]
MEASURES = ("qk", "heads", "edges", "nodes")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("faithfulness")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_saes(root / "saes")
    return root


@pytest.fixture(scope="module")
def small(root):
    return qkattr.load(root / "model", root / "saes")


@pytest.fixture(scope="module")
def result(small):
    return qkattr.trace(small, IDS, qk=0)


@pytest.fixture(scope="module")
def report(small):
    first, second = (qkattr.subject(small, ids) for ids in (IDS, [*IDS[:-1], 44]))
    prompts = [Between(first, group="g"), Between(second, group="g", source=2)]
    return faithfulness(prompts, draws=4)


def test_single_features_equal_their_marginals(result):
    """Frozen, the score's change is the marginal to rounding; live, it is not."""
    heads = heads_between(result, result, source=2, target=-1, by="influence")[:3]
    rng = np.random.default_rng(0)
    found = measure_qk(result.subject, heads, query=6, key=2, draws=4, rng=rng)
    for side in ("key", "query"):
        single = found[side]["single"]
        assert single["n"] >= 5
        assert single["frozen"]["worst"] < SAME
        assert single["live"]["worst"] > 100 * SAME
        for row in found[side]["groups"]:
            assert row["frozen"]["worst"] < SAME
    # By hand: the key-side marginals that `qk_attribution` lists are what is predicted.
    listed = []
    for layer, head in heads:
        table = qkattr.qk_attribution(result, layer=layer, head=head, query=6, key=2)
        listed += [-m["value"] for m in table.key_marginals if m["kind"] == "feature"]
    size = max(abs(v) for v in listed)
    within("marginals", sorted(found["key"]["single"]["predicted"]), sorted(listed), SAME, size)


def test_next_token_equals_steering(result):
    """Removing the strongest key feature of one head costs what `steer` says."""
    (head, *_) = heads_between(result, result, source=2, target=-1, by="influence")
    rng = np.random.default_rng(0)
    found = measure_qk(result.subject, [head], query=6, key=2, draws=4, rng=rng)
    edits = qkattr.choose_edits(result, source=2, target=-1, heads=[head], features=1)
    steered = qkattr.steer(result, edits, scales=[0.0])
    top = steered.clean[0]
    p = next(t["probability"] for t in steered.top[0] if t["id"] == top["id"])
    lost = np.log(top["probability"] / p)
    assert found["key"]["next_token"][0]["frozen"]["lost"] == pytest.approx(lost, abs=1e-5)


def test_nodes_equal_residual_edits(result):
    """Running on from a boundary equals the whole forward pass with the nodes taken out there."""
    subject, b = result.subject, 1
    rng = np.random.default_rng(1)
    kind = np.asarray(subject.components.kind[b])
    mask = (rng.random(kind.shape) < 0.5) & np.isin(kind, (Kind.FEATURE, Kind.ERROR))
    parts = jax.tree.map(lambda a: a[b], subject.components)
    delta = -np.einsum("TC,TCD->TD", mask, np.asarray(parts.vectors()))
    n = delta.shape[0]
    edits = Edits(ResidualEdits(jnp.full(n, b), jnp.arange(n), jnp.asarray(delta, jnp.float32)))
    tokens = np.pad(IDS, (0, n - len(IDS)))
    cfg = subject.bundle.config
    logits, _ = forward(subject.bundle.params, tokens, cfg=cfg, edits=edits, capture=())
    expected = jax.nn.log_softmax(logits[len(IDS) - 1])
    got = _log_p(subject, b, mask[None].astype(np.float32), 5)
    assert got[0] == pytest.approx(float(expected[5]), abs=1e-4)
    within("sizes", node_sizes(subject, b), np.linalg.norm(parts.vectors(), axis=-1), SAME, 10.0)


def test_node_curves_begin_and_end_where_they_must(result):
    leaves = qkattr.trace(result.subject.bundle, IDS, qk=0, through_errors=False).graph
    graphs = dict(through=result.graph, leaves=leaves)
    rows = measure_nodes(result.subject, graphs, [1, 2], draws=3, rng=np.random.default_rng(0))
    assert [(r["boundary"], r["choice"]) for r in rows] == [
        (b, c) for b in (1, 2) for c in ("through", "leaves", "kept")
    ]
    for row in rows:
        assert max(COUNTS) >= row["n_nodes"]  # so that the last point takes all out
        for order, curve in row["deletion"].items():
            assert curve[-1] == pytest.approx(0.0, abs=1e-4), order
            assert row["insertion"][order][-1] == pytest.approx(1.0, abs=1e-3), order
    assert "random" not in rows[1]["deletion"]


def test_probe_equals_blocks_by_hand(small, result):
    """Changes against `block`, run once for each source."""
    subject = open_subject(small, IDS, read="encoder")
    b, cfg = 1, small.config.block
    weights = tiny.block_weights(small.params, b)
    x, above = subject.boundaries[b], jax.tree.map(lambda a: a[b + 1], subject.components)
    kind = np.asarray(subject.components.kind[b])
    source_at, slot = np.argwhere(kind == Kind.FEATURE)[:4].T
    at, target = np.argwhere(np.asarray(above.kind) == Kind.FEATURE)[-6:].T
    feature = np.asarray(above.index)[at, target]
    vectors = subject.components.at(source_at, slot, np.full(4, b))
    covectors = jnp.stack([above.at(at, target), above.covectors(at, target)])
    dictionary = jax.tree.map(jnp.asarray, small.dictionaries[b + 1])
    found = probe(
        weights, x, dictionary, jnp.asarray(source_at), vectors, jnp.asarray(at),
        jnp.asarray(feature), covectors, cfg=cfg,
    )  # fmt: skip
    clean, _ = block(weights, x, cfg=cfg)
    for q in range(4):
        after, _ = block(weights, x.at[source_at[q]].add(-vectors[q]), cfg=cfg)
        change = np.einsum("XRD,RD->XR", covectors, (after - clean)[at])
        # A difference of two streams: its rounding is that of what each of them reads.
        size = np.abs(np.einsum("XRD,RD->XR", covectors, clean[at])).max()
        within("live", found.actual[1, 2, :, q], change, SAME, size)
        fired = [activations(dictionary, s)[at, feature] for s in (clean, after)]
        within("activation", found.activation[q], fired[1] - fired[0], 1e-4, 1.0)
    # A small change held: the jacobian is the derivative.
    size = np.abs(found.predicted[0]).max()
    within("jacobian", found.actual[0, 0] / 0.01, found.predicted[0], 5e-3, size)
    assert np.abs(found.actual[0, 2] - found.predicted[1]).max() > 1e-3 * size  # it is not linear


def test_edges_are_measured_in_every_block(small, result):
    subject = open_subject(small, IDS, read="encoder")
    rows = measure_edges(subject, result.graph)
    assert [row["block"] for row in rows] == [0, 1]
    for row in rows:
        held = row["jacobian decoder"]["held 0.01"]
        assert held["correlation"] > 0.999 and held["slope"] == pytest.approx(1, abs=0.02)


def test_statistics():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 4, 50).astype(float)  # with ties
    b = a + rng.normal(size=50)
    assert correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])

    def ranks(v):
        return np.array([(v < x).sum() + ((v == x).sum() + 1) / 2 for x in v])

    assert rank_correlation(a, b) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])
    assert slope(a, 3 * a) == pytest.approx(3)
    assert correlation(np.ones(5), b[:5]) == 0
    many = interval(rng.normal(2, 1, 400).tolist())
    assert many["low"] < many["mean"] < many["high"]
    assert many["high"] - many["low"] == pytest.approx(2 * 1.96 / np.sqrt(400), rel=0.15)


def test_a_report_of_all_measures(report):
    tables = report.tables
    assert {"scores", "features", "heads", "edges", "blocks", "nodes", "paraphrases"} <= set(tables)
    frozen = [row for row in tables["scores"] if row["scales"] == "frozen"]
    assert len(frozen) == 2 and all(row["worst"]["mean"] < SAME for row in frozen)
    assert all(row["worst"]["n"] == 2 for row in frozen)
    assert len(tables["edges"]) == 3 * 2 * 7
    assert report.prompts[1]["source"] == 2
    json.dumps(report.to_json(), allow_nan=False)


def test_sides_without_features_are_left_out(small):
    """A sink is one component: nothing to remove on the key side, and nothing breaks."""
    report = faithfulness(Between(qkattr.subject(small, IDS), source=0), measures=("qk",), draws=4)
    assert {row["side"] for row in report.tables["scores"]} == {"query"}
    assert {row["side"] for row in report.tables["features"]} == {"query"}
    (said,) = [line for line in report.tables["failures"] if "key side" in line]
    assert "holds no feature, so it is not tested" in said


@pytest.mark.parametrize("measures", [("heads",), MEASURES])
def test_a_prompt_with_nothing_to_measure(small, measures):
    with pytest.raises(InputError, match="can be measured on these prompts: no edge of their"):
        faithfulness(qkattr.subject(small, [0]), measures=measures, draws=4)


def test_a_prompt_compared_with_itself_agrees(small):
    same = faithfulness([Between(qkattr.subject(small, IDS), group="g")] * 2, measures=("edges",))
    (row, _) = same.tables["paraphrases"]
    assert row["shared"]["mean"] == row["sign"]["mean"] == 1
    assert row["rank"]["mean"] == pytest.approx(1)


def test_draws_follow_the_seed(small):
    def heads(seed):
        asked = qkattr.subject(small, IDS)
        return faithfulness(asked, measures=("heads",), draws=4, seed=seed).tables["heads"]

    assert heads(1) == heads(1) != heads(2)


def test_the_command_resumes(root, tmp_path, monkeypatch, capsys):
    """A second run takes what is there; the files are whole."""
    file = tmp_path / "prompts.txt"
    file.write_text("hi hi hi 12\nhi 12 hi 12\n")
    line = ["faithfulness", str(file), "-m", str(root / "model"), "-s", str(root / "saes"),
            "--out", str(tmp_path / "out"), "--draws", "4", "--measures", "qk,heads"]  # fmt: skip
    assert main(line) == 0
    first = capsys.readouterr().out
    assert "controls" in first and "faithfulness.json" in first
    files = sorted((tmp_path / "out" / "prompts").iterdir())
    assert len(files) == 2 * 3  # what is said of a prompt, and two measures
    measured = "qkattr.experiments.faithfulness.prompt.MeasuredPrompt.measure"
    monkeypatch.setattr(measured, lambda self, name: pytest.fail(f"{name} is measured again"))
    assert main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(
        (tmp_path / "out" / "faithfulness.json").read_text()
    )


def test_a_measure_more_leaves_the_others_as_they_are(small, tmp_path, monkeypatch):
    """What is kept of a measure does not depend on which others are taken; nor do its draws."""
    asked = qkattr.subject(small, IDS)
    both = faithfulness(asked, measures=("qk", "heads"), draws=4, folder=tmp_path / "both")
    one = faithfulness(asked, measures=("heads",), draws=4, folder=tmp_path / "one")
    assert one.tables["heads"] == both.tables["heads"]
    before = {f.name for f in (tmp_path / "one" / "prompts").iterdir()}
    monkeypatch.setattr("qkattr.experiments.faithfulness.prompt.measure_heads", None)
    more = faithfulness(asked, measures=("qk", "heads"), draws=4, folder=tmp_path / "one")
    assert more.tables == both.tables
    after = {f.name for f in (tmp_path / "one" / "prompts").iterdir()}
    assert before < after and len(after) == len(before) + 1


@pytest.mark.parametrize("text", ["", "{", "\udcff"])
def test_a_kept_measure_that_is_damaged(small, tmp_path, text):
    faithfulness(qkattr.subject(small, IDS), measures=("heads",), draws=4, folder=tmp_path)
    for file in (tmp_path / "prompts").iterdir():
        file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="cannot be read; delete it, so that its prompt is"):
        faithfulness(qkattr.subject(small, IDS), measures=("heads",), draws=4, folder=tmp_path)


def test_a_file_of_ids_and_one_prompt_without_intervals(root, tmp_path, capsys):
    where = ["-m", str(root / "model"), "-s", str(root / "saes")]
    how = ["--measures", "heads", "--draws", "4"]
    (tmp_path / "ids.txt").write_text(",".join(map(str, IDS)) + "\n")
    assert main(["faithfulness", str(tmp_path / "ids.txt"), "--ids", *where, *how]) == 0
    of_file = capsys.readouterr().out
    assert main(["faithfulness", ",".join(map(str, IDS)), "--ids", *where, *how]) == 0
    assert capsys.readouterr().out == of_file
    assert of_file.startswith("1 prompt, so no intervals") and "[" not in of_file


def test_figure(report, tmp_path):
    assert qkattr.figure(report, tmp_path / "f.svg").stat().st_size > 10_000
    with pytest.raises(InputError, match="names no figure format"):
        qkattr.figure(report, tmp_path / "f.txt")


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("a.txt", "\n\n", "holds no prompts"),
        ("a.toml", "x = [", "is not TOML"),
        ("a.toml", "[[prompt]]\ntxt = 'a'", "prompt 1 has 'txt'"),
        ("a.toml", "[[prompt]]\ngroup = 'a'", "prompt 1 has no text"),
        ("a.toml", "[[prompt]]\ntext = 3", "text of prompt 1 is 3; give text"),
        ("a.toml", "[[prompt]]\ntext = 'a'\nto = 1.5", "to of prompt 1 is 1.5; give an index or"),
        ("a.toml", "prompt = 3", r"should hold \[\[prompt\]\] tables"),
    ],
)
def test_wrong_prompt_files(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("name, said", [("a.txt", "is not UTF-8 text"), ("a.toml", "is not TOML")])
def test_unreadable_prompt_files(tmp_path, name, said):
    with pytest.raises(InputError, match="No such file or directory; give another path"):
        read_prompts(tmp_path / name)
    (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=said):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--measures", "qk,magic"], "measure 'magic' is not known"),
        (["--draws", "1"], "draws should be at least 4, got 1"),
        (["--saes"], "--saes"),
    ],
)
def test_wrong_options(root, capsys, options, said):
    saes = [] if options == ["--saes"] else ["-s", str(root / "saes")]
    options = [] if options == ["--saes"] else options
    assert main(["faithfulness", "hi hi", "-m", str(root / "model"), *saes, *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_positions_the_wrong_way_round(small):
    with pytest.raises(InputError, match="^the source at 4 comes .* attention is causal"):
        faithfulness(Between(qkattr.subject(small, IDS), source=4, target=2))


def test_of_many_prompts_the_wrong_one_is_named(small):
    good, wrong = (qkattr.subject(small, prompt) for prompt in (IDS, "hi 12"))
    with pytest.raises(InputError, match="^prompt 2 of 3, 'hi 12': no token ' Aunt' in the"):
        faithfulness([good, Between(wrong, source=" Aunt"), good])
