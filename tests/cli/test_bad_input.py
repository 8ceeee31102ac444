"""Wrong input and damaged files through the command line.

Each wrong input ends in exit code 2 with one line on stderr, and nothing on stdout.
"""

import errno
import os
import shutil

import folders
import numpy as np
import pytest

import qkattr
from qkattr import files
from qkattr.load import smollm2

IDS = "0,40,41,42,40"
PROMPT = "hi hi hi 12"
PLACE = ("--layer", "1", "--head", "2", "--query", "-1", "--key", "1")


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """model: without a tokenizer; text: with one; other: other weights; saes; a result of each."""
    root = tmp_path_factory.mktemp("bad_input")
    folders.write_model(root / "model")
    folders.write_model(root / "text", tokenizer=True)
    folders.write_model(root / "other", seed=1)
    folders.write_model(root / "nan", edit=spoil)
    folders.write_saes(root / "saes")
    folders.write_saes(root / "other_saes", seed=1)
    bundle = qkattr.load(root / "model", root / "saes")
    qkattr.trace(bundle, [int(i) for i in IDS.split(",")], qk=2).save(root / "result")
    return root


def spoil(tensors):
    next(iter(tensors.values()))[0, 0] = np.nan


@pytest.fixture
def trace(refused):
    return lambda *more: refused("trace", IDS, "--ids", "-m", "model", "-s", "saes", *more)


@pytest.fixture
def qk(refused):
    def run(prompt, place, model="model", ids=True):
        options = [part for name, value in place.items() for part in (f"--{name}", value)]
        ids = ["--ids"] if ids else []
        return refused("qk", prompt, *ids, "-m", model, "-s", "saes", *options)

    return run


# Models and SAEs


def test_no_such_model(refused):
    assert "no such model: 'absent'; give 'smollm2', a Hugging Face folder" in refused(
        "tokens", IDS, "--ids", "-m", "absent"
    )


def test_model_folder_without_config(refused, tmp_path):
    assert "has no config.json; give the folder" in refused("tokens", IDS, "--ids", "-m", tmp_path)


@pytest.mark.parametrize("name", ["m" * 5000, "a\0b", "\x1b[31m", "\udcff"])
def test_models_with_impossible_names(refused, name):
    line = refused("tokens", IDS, "--ids", "-m", name)
    assert "no such model" in line or "File name too long; give another path" in line


def damaged(folder, change):
    folders.write_model(folder)
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: whole[:-4],
        lambda whole: whole[:100],
        lambda whole: b"",
        lambda whole: b"\xff" * 8 + whole[8:],
        lambda whole: whole[:8] + b"!" + whole[9:],
    ],
)
def test_damaged_weights(refused, tmp_path, change):
    model = damaged(tmp_path / "model", change)
    assert "model.safetensors is not a whole safetensors file" in refused(
        "tokens", IDS, "--ids", "-m", model
    )


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight, which its config calls"),
        (lambda t: t.update(more=t["model.norm.weight"]), "holds more, for which its config has"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(9, np.float32)}),
            "model.norm.weight has shape [9], its config calls for [16]",
        ),
    ],
)
def test_wrong_tensors(refused, tmp_path, edit, message):
    model = folders.write_model(tmp_path / "model", edit=edit)
    assert message in refused("tokens", IDS, "--ids", "-m", model)


def test_weights_that_are_not_finite(refused):
    line = refused("trace", IDS, "--ids", "-m", "nan", "-s", "saes")
    assert "model.embed_tokens.weight holds NaN or infinite values" in line


def test_weights_that_overflow(refused, tmp_path):
    def huge(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][:] = 3e38

    model = folders.write_model(tmp_path / "model", edit=huge)
    assert "not finite" in refused("trace", IDS, "--ids", "-m", model, "-s", "saes")


def test_the_place_is_checked_before_weights_are_read(qk, refused):
    assert "head 4 is out of range" in qk(IDS, dict(layer=0, head=4, query=1, key=1), "nan")
    assert "position 9 is out of range" in refused(
        "heads", IDS, "--ids", "-m", "nan", "-s", "saes", "--from", 9, "--to", 1
    )
    assert "layer 9 is out of range" in refused(
        "trace", IDS, "--ids", "-m", "nan", "-s", "saes", "--score", "9.0.1.1"
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(d=24), "SAE at boundary 1 has d_in=24, the model has d_model=16; load the SAEs"),
        (dict(boundaries=(1, 2, 3)), "is for boundary 3, the model has 2 blocks; load the SAEs"),
        (dict(boundaries=(2,)), "has no SAE for boundary 1; expected one after every block, 1..2"),
        (dict(boundaries=()), "no such folder"),
        (dict(edit=lambda t: t["W_enc"].fill(np.inf)), "W_enc holds NaN or infinite values"),
        (dict(edit=lambda t: t.pop("b_dec")), "lacks b_dec"),
    ],
)
def test_saes_that_do_not_fit(refused, tmp_path, options, message):
    saes = folders.write_saes(tmp_path / "saes", **options)
    assert message in refused("trace", IDS, "--ids", "-m", "model", "-s", saes)


def test_truncated_sae(refused, tmp_path):
    saes = folders.write_saes(tmp_path / "saes")
    path = next(saes.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    line = refused("trace", IDS, "--ids", "-m", "model", "-s", saes)
    assert "sae_weights.safetensors is not a whole safetensors file" in line


def test_what_is_missing_on_the_command_line(refused, monkeypatch, tmp_path):
    assert "--model is missing; give" in refused("trace", IDS, "--ids", "-s", "saes")
    assert "--saes is missing; give" in refused("trace", IDS, "--ids", "-m", "model")
    assert "--saes is missing; give" in refused("check", "-m", "model")
    assert "; see `qkattr trace --help`" in refused("trace")
    monkeypatch.setattr(smollm2, "_DATA", tmp_path)
    assert "install qkattr again" in refused("trace", IDS, "--ids", "-m", "model", "-s", "smollm2")


# Prompts and places


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", "the prompt has no tokens; give at least one"),
        ("1,x", "--ids expects token ids separated by commas, as in 1,34,5; got '1,x'"),
        ("1,,2", "--ids expects token ids separated by commas"),
        (f"1,{folders.VOCAB}", f"token id {folders.VOCAB} at position 1 is outside the model's"),
        ("-1", "No such option"),
        (" -1", "token id -1 at position 0 is outside the model's vocabulary"),
        (",".join(["1"] * 65), "the prompt has 65 tokens, the model's context is 64; shorten it"),
    ],
)
def test_bad_ids(refused, prompt, message):
    for command in (["tokens"], ["trace", "-s", "saes"]):
        assert message in refused(*command, prompt, "--ids", "-m", "model")


def test_bad_text(refused):
    for prompt, message in (
        ("", "the prompt is empty; give some text"),
        ("hi" * 70, "tokens, the model's context is 64; shorten it"),
        ("a\ud800", "not valid Unicode"),
    ):
        assert message in refused("tokens", prompt, "-m", "text")
    assert "has no tokenizer that qkattr can read; give the prompt as token ids" in refused(
        "tokens", PROMPT, "-m", "model"
    )


@pytest.mark.parametrize(
    "place, message",
    [
        (dict(layer=2), "layer 2 is out of range: the model has blocks 0..1"),
        (dict(layer=-1), "layer -1 is out of range: the model has blocks 0..1"),
        (dict(head=4), "head 4 is out of range: the model has heads 0..3"),
        (dict(query=5), "position 5 is out of range: the prompt has 5 tokens; give one of 0..4"),
        (dict(key=-6), "position -6 is out of range: the prompt has 5 tokens"),
        (dict(query=1, key=2), "the key at 2 ('41') comes after the query at 1 ('40')"),
        (dict(query="Aunt"), "no token 'Aunt' in the prompt; `qkattr tokens` lists them"),
        (dict(query="x²#²"), "no token 'x²#²' in the prompt"),
        (dict(query="9" * 6000), "no token '999"),
    ],
)
def test_bad_places(qk, place, message):
    assert message in qk(IDS, dict(layer=0, head=0, query=-1, key=0) | place)


@pytest.mark.parametrize(
    "query, message",
    [
        (" hi", "token ' hi' is ambiguous: ' hi#1' at 2, ' hi#2' at 3; say which"),
        (" hi#3", "token ' hi' occurs 2 times, ' hi#3' asks for number 3; give #1..#2"),
        (" hi#0", "occurs 2 times"),
        ("ho", "no token 'ho' in the prompt"),
        ("x" * 100_000, "no token 'xxx"),
        ("\x1b[31m", r"no token '\x1b[31m' in the prompt"),
    ],
)
def test_bad_token_names(qk, query, message):
    place = dict(layer=0, head=0, query=query, key=0)
    line = qk(PROMPT, place, model="text", ids=False)
    assert message in line and len(line) < 400


def test_positions_of_heads(refused):
    for ends, message in (
        ((3, 1), "--from 3 comes after --to 1; attention is causal"),
        ((0, 7), "position 7 is out of range"),
    ):
        more = ("--from", ends[0], "--to", ends[1])
        for prompt in ((IDS, "--ids", "-m", "model", "-s", "saes"), ("./result",)):
            assert message in refused("heads", *prompt, *more)


# Options


@pytest.mark.parametrize(
    "options, message",
    [
        (["--linearisation", "x"], "linearisation 'x' is not known; give one of jacobian"),
        (["--read", "x"], "read 'x' is not known; give one of decoder, encoder"),
        (["--precision", "x"], "precision 'x' is not known; give one of default, high, highest"),
        (["--dtype", "float16"], "dtype 'float16' is not known; expected float32 or bfloat16"),
        (["--keep", "0"], "keep should lie in (0, 1], got 0.0"),
        (["--keep", "nan"], "keep should lie in (0, 1], got nan"),
        (["--keep", "1.1"], "keep should lie in (0, 1], got 1.1"),
        (["--logit-mass", "-inf"], "logit_mass should lie in (0, 1], got -inf"),
        (["--max-rows", "0"], "max_rows should lie in 1..65536, got 0"),
        (["--max-rows", "1000000000"], "max_rows should lie in 1..65536, got 1000000000"),
        (["--max-edges", "-1"], "max_edges should lie in 1..65536, got -1"),
        (["--max-slots", "0"], "max_slots should lie in 1..65536, got 0"),
        (["--max-logits", "0"], "max_logits should lie in 1..65536, got 0"),
        (["--qk", "-1"], "qk should be at least 0, got -1"),
        (["--through-qk", "-1"], "through_qk should be at least 0, got -1"),
        (["--contrast", "a", "a"], "contrast compares two tokens, both given are 'a'"),
        (["--contrast", "a"], "Option '--contrast' requires 2 arguments; see `qkattr"),
        (["--contrast", "a", "b", "--target", "c"], "target and contrast were both given"),
        (["--target", "hi"], "token 'hi' is text and the model has no tokenizer; give a token"),
        (["--score", "x"], "--score expects LAYER.HEAD.QUERY.KEY, as in 23.2.-1.6, got 'x'"),
        (["--score", "0.0.1"], "--score expects LAYER.HEAD.QUERY.KEY"),
        (["--score", "0.0.1.9"], "position 9 is out of range"),
        (["--score", "0.9.1.0"], "head 9 is out of range"),
        (["--max-rows", "abc"], "Invalid value for '--max-rows': "),
        (["--flag"], "No such option: --flag"),
    ],
)
def test_bad_options(trace, options, message):
    assert message in trace(*options)


def test_targets_of_several_tokens(refused):
    for target in ("hi hi", "", "é"):
        line = refused("trace", PROMPT, "-m", "text", "-s", "saes", "--target", target)
        assert "tokens" in line and "give one token" in line
    more = ("--contrast", "hi", " hi hi")
    assert "2 tokens" in refused("trace", PROMPT, "-m", "text", "-s", "saes", *more)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["qk", "x", "--layer", "abc"], "Invalid value for '--layer': "),
        (["qk", "x"], "Missing option '--layer'"),
        (["nosuch"], "No such command 'nosuch'"),
        (["--nosuch"], "No such option"),
        (["tokens", "a", "b"], "unexpected extra argument"),
        (["heads", "x", "--from", "1", "--to", "1", "--top", "0"], "Invalid value for '--top'"),
    ],
)
def test_usage(refused, arguments, message):
    line = refused(*arguments)
    assert message in line and "--help`" in line


def test_one_end_of_two(refused):
    for end in ("--from", "--to"):
        assert "--from and --to go together; give both" in refused("heads", "x", end, "1")


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "No such file or directory; give a text file"),
        (b"\xff\xfe", "it is not UTF-8 text; give a text file"),
        (b" \n", "the text is empty"),
        (b"hi", "tokens; give at least 16 tokens of text"),
    ],
)
def test_bad_texts_for_check(refused, tmp_path, text, message):
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_bytes(text)
    assert message in refused("check", "-m", "text", "-s", "saes", "--text", path)


def test_check_needs_a_tokenizer(refused):
    assert "has no tokenizer" in refused("check", "-m", "model", "-s", "saes")


# Output


def test_unwritable_output(trace, tmp_path):
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/absent/x"):
        assert "cannot write to" in trace("--out", out)
    assert "null byte" in trace("--out", "a\0b")
    assert (tmp_path / "file").read_text() == "kept"


def test_bad_input_leaves_no_folder(trace, tmp_path):
    trace("--out", tmp_path / "new" / "out", "--score", "0.9.1.0")
    assert list(tmp_path.iterdir()) == []


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_disk_full(trace, root, tmp_path, monkeypatch, fail_at):
    out = shutil.copytree(root / "result", tmp_path / "out")
    before, calls = content(out), []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    line = trace("--out", out, "--no-sink")
    assert "No space left on device; what was there is unchanged, make room" in line
    assert content(out) == before
