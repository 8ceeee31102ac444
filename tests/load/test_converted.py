"""The folder that a GGUF file is converted to: the same model, whatever happens to the folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys

import folders
import jax
import numpy as np
import pytest
from test_gguf import FILES, VOCABULARY, write

from qkattr.errors import InputError
from qkattr.load.models import converted
from qkattr.load.models.converted import open_converted
from qkattr.load.models.gguf import open_gguf
from qkattr.load.models.weights import read_params
from qkattr.load.text.gguf_tokenizer import tokenizer_from_gguf

FOLDER = {
    "config.json",
    "manifest.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
TEXTS = ["ab a", "b  ab", "<unk>", ""]


def with_vocabulary(writer):
    for key, value in VOCABULARY.items():
        add = writer.add_array if isinstance(value, list) else writer.add_string
        add(f"tokenizer.ggml.{key}", value)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """The only file of its folder."""
    folder = write(FILES["llama-tied"], tmp_path_factory.mktemp("made"), edit=with_vocabulary)
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    shutil.copy(folder / "m.gguf", path)
    return path


@pytest.fixture
def folder(gguf, tmp_path):
    """A converted folder."""
    opened(gguf, tmp_path / "folder")
    return tmp_path / "folder"


def opened(gguf, folder):
    return open_converted(gguf, source(gguf), folder)


def source(gguf):
    return hashlib.sha256(gguf.read_bytes()).hexdigest()


def from_folder(found):
    return isinstance(found.checkpoint, converted._Checked)


def check_equal(found, gguf):
    """The config, the tokenizer and the bits of all weights are those of the GGUF file."""
    file = open_gguf(gguf)
    theirs = tokenizer_from_gguf(file.reader)
    assert found.config == file.config
    for text in TEXTS:
        assert found.tokenizer.encode(text) == theirs.encode(text)
    for name in ("bos", "eos", "template", "bos_id", "vocab"):
        assert getattr(found.tokenizer, name) == getattr(theirs, name)
    ours = read_params(found.checkpoint, found.config)
    expected = read_params(file, file.config)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_equals_the_gguf_file(gguf, tmp_path):
    for _ in range(2):
        found = opened(gguf, tmp_path / "folder")
        assert from_folder(found)
        check_equal(found, gguf)
        assert {path.name for path in (tmp_path / "folder").iterdir()} == FOLDER


def test_the_folder_is_a_hugging_face_model(gguf, folder):
    file = open_gguf(gguf)
    config, params = folders.load_hf(folder)
    expected = read_params(file, file.config)
    assert config == file.config
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_second_time_nothing_is_written_or_dequantised(gguf, folder, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(converted, "open_gguf", lambda path: pytest.fail("it was opened"))
    found = opened(gguf, folder)
    read_params(found.checkpoint, found.config)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    """One bit in the last byte, which is a weight's where it is a weight file."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def empty(path):
    path.write_bytes(b"")


def hostile(path):
    path.write_text(json.dumps({"a": "b"}))


def absent(path):
    path.unlink()


def as_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, flip, empty, hostile, absent])
@pytest.mark.parametrize("name", sorted(FOLDER))
def test_a_damaged_folder_is_written_again(gguf, folder, name, damage):
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / name)
    check_equal(opened(gguf, folder), gguf)
    check_equal(opened(gguf, folder), gguf)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


@pytest.mark.parametrize("name", sorted(FOLDER))
def test_a_folder_where_a_file_should_be(gguf, folder, name):
    """Which cannot be written over: the model comes from the GGUF file."""
    as_folder(folder / name)
    check_equal(opened(gguf, folder), gguf)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("change", [dict(version=99), dict(source="0" * 64), dict(more=1)])
def test_a_folder_of_another_file_or_version(gguf, folder, change):
    path = folder / "manifest.json"
    right = path.read_bytes()
    path.write_text(json.dumps(json.loads(right) | change))
    check_equal(opened(gguf, folder), gguf)
    assert path.read_bytes() == right


@pytest.mark.parametrize("damage", [cut, flip, empty, absent])
def test_weights_damaged_after_they_were_opened(gguf, folder, damage):
    found = opened(gguf, folder)
    damage(folder / "model.safetensors")
    check_equal(found, gguf)
    assert not (folder / "manifest.json").exists()
    assert from_folder(opened(gguf, folder)) and (folder / "manifest.json").exists()


def test_a_full_disk(gguf, tmp_path):
    """A limit on the size of files stands for it, at every file of the folder."""
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from qkattr.load.models.converted import open_converted\n"
        "from qkattr.load.models.gguf import open_gguf\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "gguf, folder = map(Path, sys.argv[1:3])\n"
        "for limit in (0, 100, 1000, 10_000):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "    found = open_converted(gguf, sys.argv[3], folder)\n"
        "    assert found.config == open_gguf(gguf).config\n"
        "    left = {path.name for path in folder.iterdir()}\n"
        "    assert 'manifest.json' not in left, left\n"
        "    assert not any(name.startswith('.') for name in left), left\n"
    )
    folder = tmp_path / "folder"
    subprocess.run([sys.executable, "-c", script, gguf, folder, source(gguf)], check=True)
    assert from_folder(opened(gguf, folder))


def test_a_disk_with_too_little_room_is_not_filled(gguf, tmp_path, monkeypatch):
    room = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(converted.shutil, "disk_usage", lambda path: room)
    check_equal(opened(gguf, tmp_path / "folder"), gguf)
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_file_where_the_folder_should_be(gguf, tmp_path):
    (tmp_path / "folder").write_text("x")
    check_equal(opened(gguf, tmp_path / "folder"), gguf)
    assert (tmp_path / "folder").read_text() == "x"


def test_interrupted_while_it_is_written(gguf, tmp_path, monkeypatch):
    def interrupt(tensor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(converted.zlib, "crc32", interrupt)
        with pytest.raises(KeyboardInterrupt):
            opened(gguf, tmp_path / "folder")
    assert list((tmp_path / "folder").iterdir()) == []
    assert from_folder(opened(gguf, tmp_path / "folder"))


def test_what_a_killed_process_left_behind_is_removed(gguf, tmp_path):
    """Once it is old: another process may be writing now."""
    old, new = (tmp_path / f".model.safetensors.{name}" for name in ("old", "new"))
    for left in (old, new):
        left.write_bytes(b"part")
    os.utime(old, (0, 0))
    opened(gguf, tmp_path)
    assert not old.exists() and new.exists()


def test_several_processes_at_once(gguf, tmp_path):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from qkattr.load.models.converted import open_converted\n"
        "found = open_converted(Path(sys.argv[1]), sys.argv[3], Path(sys.argv[2]))\n"
        "read, names = found.checkpoint.read, sorted(found.checkpoint.shapes())\n"
        "print(*(read(name).sum() for name in names))\n"
    )
    folder = tmp_path / "folder"
    command = [sys.executable, "-c", script, gguf, folder, source(gguf)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0] * 4 and len(said) == 1
    assert {path.name for path in folder.iterdir()} == FOLDER
    assert from_folder(opened(gguf, folder))


def test_a_damaged_gguf_file_is_refused(gguf, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf.read_bytes()[:-500])
    with pytest.raises(InputError, match="m.gguf is not a whole GGUF file"):
        opened(path, tmp_path / "folder")
    right = source(gguf)
    shutil.copy(gguf, path)
    flip(path)
    with pytest.raises(InputError, match=f"m.gguf is damaged: .* expected {right}; delete it"):
        open_converted(path, right, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.slow
def test_smollm2_is_the_model_of_its_gguf_file(bundle):
    """Results that were saved before the conversion still know their model."""
    from qkattr.load import smollm2

    path = smollm2.cached_file()
    _, found = smollm2.open_smollm2()
    file = open_gguf(path)
    theirs = tokenizer_from_gguf(file.reader)
    assert bundle.model_hash.startswith("a16fb738c584")
    assert found.config == file.config and found.tokenizer.bos == "<|endoftext|>"
    assert found.tokenizer.template == theirs.template and found.tokenizer.eos == theirs.eos
    for text in ("Hello, world!\n\tx", "naïve 日本 🙂", "a  12 3.14", "<|im_start|>user<|im_end|>"):
        assert found.tokenizer.encode(text, bos=False) == theirs.encode(text, bos=False)
    for name in file.shapes():
        np.testing.assert_array_equal(found.checkpoint.read(name), file.read(name))
