"""Wrong runs and texts: exit code 2 and one line that says what, expected, got, and what to do."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from training import toml

from qkattr.errors import InputError
from qkattr.load.text.corpus import read_rows

CONFIGS = {
    "wdith = 3\n": "'wdith' is not known",
    "k = 3\n": "has no width",
    'width = "many"\n': "width should be int, got 'many'",
    "width = true\n": "width should be int, got True",
    "width = 24\nk = 4\nlr = nan\n": "lr should lie in",
    "width = 24\nk = 0\n": "k should lie in 1..",
    "width = 24\nk = 30\n": "each should be at most the next",
    'width = 24\nk = 4\nactivation = "relu"\n': "activation is 'relu'; known are topk",
    'width = 24\nk = 4\ncompute = "float16"\n': "compute is 'float16'; known are",
    'width = 24\nk = 4\nsparse = "yes"\n': "sparse is 'yes'",
    "width = 24\nk = 4\nbuffer = 1\nbatch = 128\n": "does not fit a buffer of 127 positions",
    "width = = 24\n": "is not TOML",
    "width = 24\nk = 4\nrow = 15\n": "row should lie in 16..",
    "width = 24\nk = 4\nwide = [1]\n": "with bits = 0 none is written",
    "width = 24\nk = 4\nbits = 4\nround_from = 1.0\n": "leaves none of the",
    "width = 24\nk = 4\nwarmup = 0.7\ndecay = 0.4\n": "at most 1 together",
}


@pytest.mark.parametrize("text", CONFIGS)
def test_configs(text, root, tmp_path, refused):
    path = tmp_path / "run.toml"
    path.write_text(text)
    out = tmp_path / "out"
    said = refused("train", path, "-m", root / "model", "--text", root / "rows.npy", "--out", out)
    assert CONFIGS[text] in said
    assert not out.exists()


COMMANDS = {
    "missing": (["train", "{root}/none.toml"], "cannot read"),
    "model": (["train", "{root}/run.toml"], "--model is missing"),
    "text": (["train", "{root}/run.toml", "-m", "{root}/model"], "--text is missing"),
    "out": (
        ["train", "{root}/run.toml", "-m", "{root}/model", "--text", "{root}/rows.npy"],
        "--out is missing",
    ),
    "set": (["train", "{root}/run.toml", "--set", "lr"], "--set expects NAME=VALUE"),
    "set value": (["train", "{root}/run.toml", "--set", "lr=fast"], "lr should be float"),
    "mesh": (
        ["train", "{root}/run.toml", "-m", "{root}/model", "--text", "{root}/rows.npy", "--out",
         "{tmp}/o", "--mesh", "3,x"],
        "--mesh expects DATA,MODEL",
    ),
    "wide": (
        ["train", "{root}/run.toml", "-m", "{root}/model", "--text", "{root}/rows.npy", "--out",
         "{tmp}/o", "--set", "bits=4", "--set", "wide=[3]"],
        "wide has boundary 3, the model has 1..2",
    ),
    "processes": (["train", "{root}/run.toml", "--distributed"], "give --mesh"),
    "no processes": (
        ["train", "{root}/run.toml", "--distributed", "--mesh", "1,1"], "cannot join other",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_command_lines(name, root, tmp_path, refused):
    arguments, said = COMMANDS[name]
    filled = [a.format(root=root, tmp=tmp_path) for a in arguments]
    assert said in refused(*filled)


def test_a_text_without_rows_to_train_on(root, tmp_path, refused):
    np.save(tmp_path / "few.npy", np.load(root / "rows.npy")[:4])
    said = refused(
        "train", root / "run.toml", "-m", root / "model", "--text", tmp_path / "few.npy",
        "--out", tmp_path / "o",
    )  # fmt: skip
    assert "expected more than the 4 held out" in said


def test_a_start_of_another_kind(root, tmp_path, refused):
    import folders

    folders.write_saes(tmp_path / "saes")
    said = refused(
        "train", root / "run.toml", "-m", root / "model", "--text", root / "rows.npy",
        "--out", tmp_path / "o", "--set", f"start={tmp_path / 'saes'}",
    )  # fmt: skip
    assert "is topk of width 32" in said and "of width 24" in said


def test_rows_longer_than_the_context(root, tmp_path, refused):
    np.save(tmp_path / "long.npy", np.zeros((9, 65), int))
    said = refused(
        "train", root / "run.toml", "-m", root / "model", "--text", tmp_path / "long.npy",
        "--out", tmp_path / "o", "--set", "row=65",
    )  # fmt: skip
    assert "row is 65 tokens, the model's context is 64" in said


TEXT = "hi hi 12 hi. " * 60


def texts(tmp_path):
    import pyarrow
    import pyarrow.parquet as parquet

    halves = [TEXT[: len(TEXT) // 2], TEXT[len(TEXT) // 2 :]]
    lines = "".join(json.dumps({"text": half, "more": 1}) + "\n" for half in halves)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(pyarrow.table({"text": halves, "n": [1, 2]}), tmp_path / "a.parquet")
    return halves


def test_every_kind_of_text_becomes_the_same_rows(small, tmp_path):
    """Rows by a loop over the tokenizer's ids, with the BOS first and between documents."""
    halves = texts(tmp_path)
    bos = small.tokenizer.bos_id
    encode = [small.tokenizer.encode(half, bos=False) for half in halves]
    for name, ids in {
        "a.txt": small.tokenizer.encode(TEXT, bos=False),
        "a.jsonl": [*encode[0], bos, *encode[1]],
        "a.jsonl.gz": [*encode[0], bos, *encode[1]],
        "a.parquet": [*encode[0], bos, *encode[1]],
    }.items():
        expected = [[bos, *ids[i : i + 16]] for i in range(0, len(ids) - 15, 16)]
        rows = read_rows(
            tmp_path / name, tokenizer=small.tokenizer, length=17, vocab=small.config.vocab
        )
        np.testing.assert_array_equal(rows, expected, err_msg=name)
    without = read_rows(
        tmp_path / "a.txt",
        tokenizer=small.tokenizer,
        length=16,
        vocab=small.config.vocab,
        bos=False,
    )
    np.testing.assert_array_equal(without[0], small.tokenizer.encode(TEXT, bos=False)[:16])


def bad_texts(tmp_path):
    import pyarrow
    import pyarrow.parquet as parquet

    (tmp_path / "a.doc").write_text("x")
    (tmp_path / "short.txt").write_text("hi")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 40)
    (tmp_path / "broken.jsonl").write_text('{"text": "hi"}\n{"text": \n')
    (tmp_path / "other.jsonl").write_text('{"body": "hi"}\n')
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "hi"}\n' * 99)[:-9])
    (tmp_path / "no.parquet").write_bytes(b"PAR1 not really")
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "other.parquet")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    np.save(tmp_path / "float.npy", np.zeros((3, 17)))
    np.save(tmp_path / "flat.npy", np.zeros(17, int))
    np.save(tmp_path / "long.npy", np.zeros((3, 18), int))
    np.save(tmp_path / "empty.npy", np.zeros((0, 17), int))
    np.save(tmp_path / "vocab.npy", np.full((3, 17), 10**6))
    np.save(tmp_path / "minus.npy", np.full((3, 17), -1))
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "long.npy").read_bytes()[:200])


BAD = {
    "none.txt": "no such file",
    "a.doc": "not text that qkattr reads",
    "short.txt": "expected at least 16",
    "latin.txt": "not UTF-8",
    "broken.jsonl": "line 2 is not JSON",
    "other.jsonl": 'line 1 has no "text"',
    "torn.jsonl.gz": "cannot read",
    "no.parquet": "cannot read",
    "other.parquet": 'no column "text"',
    "numbers.parquet": "give text only",
    "float.npy": "expected integers",
    "flat.npy": "expected integers",
    "long.npy": "3 rows of 18 tokens, expected rows of 17",
    "empty.npy": "0 rows of 17 tokens",
    "vocab.npy": "token id 1000000",
    "minus.npy": "token id -1",
    "object.npy": "cannot read",
    "cut.npy": "cannot read",
}


@pytest.mark.parametrize("name", BAD)
def test_texts(name, small, tmp_path):
    bad_texts(tmp_path)
    with pytest.raises(InputError) as refusal:
        read_rows(tmp_path / name, tokenizer=small.tokenizer, length=17, vocab=small.config.vocab)
    assert BAD[name] in str(refusal.value) and "\n" not in str(refusal.value)
    assert ";" in str(refusal.value)


def test_text_without_a_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(InputError, match="the model has no tokenizer; give a .npy of ids"):
        read_rows(tmp_path / "a.txt", tokenizer=None, length=17, vocab=99)


def test_settings_as_a_file_reads_them(tmp_path):
    (tmp_path / "run.toml").write_text(toml())
    from qkattr.train.config import read_config

    assert read_config(tmp_path / "run.toml").seed == 3
