"""The container of GGUF files against the gguf package's own reader, and damaged files."""

from __future__ import annotations

import struct
import time

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant
from gguf import GGUFValueType as Kind

from qkattr.errors import InputError
from qkattr.load.models.gguf import open_gguf
from qkattr.load.tensors.gguf_container import parse

SECONDS = 2.0  # for the vocabulary of Gemma 3; it takes about a quarter of it


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name="t", shape=(2,), kind=0, offset=0, sizes=None) -> bytes:
    sizes = len(shape) if sizes is None else sizes
    packed = struct.pack(f"<I{len(shape)}QIQ", sizes, *shape, kind, offset)
    return string(name) + packed


def file(*parts: bytes, tensors=0, entries=0, head=b"GGUF", version=3) -> bytes:
    return head + struct.pack("<IQQ", version, tensors, entries) + b"".join(parts)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A file with every kind of value, and tensors of several types."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind, value in {
        "UINT8": 200, "INT8": -3, "UINT16": 60000, "INT16": -300, "UINT32": 2**31, "INT32": -5,
        "FLOAT32": 0.1, "UINT64": 2**63, "INT64": -(2**40), "FLOAT64": 0.1, "BOOL": True,
        "STRING": "é日🙂",
    }.items():  # fmt: skip
        writer.add_key_value(f"one.{kind}", value, Kind[kind])
    for name, value in {
        "strings": ["a", "", "日本", "x" * 300], "ints": [1, -2, 3], "floats": [0.5, -1.25],
        "bools": [True, False],
    }.items():  # fmt: skip
        writer.add_array(f"many.{name}", value)
    rng = np.random.default_rng(0)
    writer.add_tensor("plain", rng.normal(size=(3, 5)).astype(np.float32))
    writer.add_tensor("half", rng.normal(size=(7,)).astype(np.float16))
    for kind in (Quant.Q4_1, Quant.Q8_0):
        raw = gguf.quantize(rng.normal(size=(4, 64)).astype(np.float32), kind)
        writer.add_tensor(kind.name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_equals_that_of_the_gguf_package(made):
    ours, theirs = parse(made), gguf.GGUFReader(made)
    fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.keys() == list(fields) and len(fields) == 17
    for key, field in fields.items():
        assert ours.get(key) == field.contents()
        assert type(ours.get(key)) is type(field.contents())
    assert ours.get("absent") is None and ours.get("absent", 3) == 3


def test_tensors_equal_those_of_the_gguf_package(made):
    ours, theirs = parse(made), gguf.GGUFReader(made)
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for expected in theirs.tensors:
        found = ours.tensors[expected.name]
        assert list(found.shape) == list(reversed(expected.shape)) and found.code == (
            expected.tensor_type
        )
        raw = np.ascontiguousarray(expected.data).view(np.uint8)
        np.testing.assert_array_equal(ours.bytes(found), raw)


def test_a_file_cut_anywhere_is_refused(made, tmp_path):
    """The package pads the end of the last tensor, whose bytes nothing needs."""
    whole, path = made.read_bytes(), tmp_path / "cut.gguf"
    last = gguf.GGUFReader(made).tensors[-1]
    for size in range(last.data_offset + last.n_bytes):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="cut.gguf is not a whole GGUF file") as e:
            open_gguf(path)
        assert "\n" not in str(e.value) and len(str(e.value)) < 300


HUGE = 2**63
DAMAGED = {
    "not a GGUF file": (file(head=b"GGML"), "does not begin with GGUF"),
    "an old version": (file(version=1), "its version is 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "entries that are not there": (file(entries=HUGE), "ends too early"),
    "tensors that are not there": (file(tensors=HUGE), "ends too early"),
    "a key longer than the file": (file(struct.pack("<Q", HUGE), entries=1), "ends after the file"),
    "a string longer than the file": (
        file(entry("k", 8, struct.pack("<Q", HUGE)), entries=1),
        "ends after the file",
    ),
    "a key that is not UTF-8": (file(entry(b"\xff", 7, b"\1"), entries=1), "not UTF-8"),
    "a value that is not UTF-8": (file(entry("k", 8, string(b"\xff")), entries=1), "not UTF-8"),
    "an unknown type": (file(entry("k", 13, b""), entries=1), "the type 13"),
    "an array of arrays": (file(entry("k", 9, struct.pack("<IQ", 9, 1)), entries=1), "the type 9"),
    "more numbers than the file": (
        file(entry("k", 9, struct.pack("<IQ", 0, HUGE)), entries=1),
        "ends too early",
    ),
    "more strings than the file": (
        file(entry("k", 9, struct.pack("<IQ", 8, HUGE)), entries=1),
        "ends too early",
    ),
    "a key twice": (file(*[entry("k", 7, b"\1")] * 2, entries=2), "'k' twice"),
    "an alignment of 0": (
        file(entry("general.alignment", 4, struct.pack("<I", 0)), entries=1),
        "power of two",
    ),
    "an alignment of 48": (
        file(entry("general.alignment", 4, struct.pack("<I", 48)), entries=1),
        "power of two",
    ),
    "an alignment in words": (
        file(entry("general.alignment", 8, string("32")), entries=1),
        "power of two",
    ),
    "a tensor twice": (file(tensor(), tensor(), bytes(99), tensors=2), "'t' twice"),
    "no sizes": (file(tensor(shape=()), bytes(99), tensors=1), "has 0 sizes"),
    "five sizes": (file(tensor(shape=(1,) * 5), bytes(99), tensors=1), "has 5 sizes"),
    "sizes without end": (file(tensor(sizes=2**32 - 1), tensors=1), "4294967295 sizes"),
    "sizes that overflow": (
        file(tensor(shape=(2**32, 2**32)), bytes(99), tensors=1),
        "ends at byte 73,786,976,294,838,206,",
    ),
    "an unknown type of tensor": (file(tensor(kind=99), bytes(99), tensors=1), "99 is not a valid"),
    "half a block": (file(tensor(shape=(33,), kind=8), bytes(99), tensors=1), "32"),
    "data elsewhere": (file(tensor(offset=HUGE), bytes(99), tensors=1), "ends at byte"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(case, tmp_path):
    content, message = DAMAGED[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a whole GGUF file") as e:
        open_gguf(path)
    assert message in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 300


def test_a_file_taken_away_after_it_was_opened(made, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(made.read_bytes())
    opened = parse(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="changed while it was read"):
        opened.bytes(opened.tensors["plain"])


def test_a_large_vocabulary_takes_less_than_two_seconds(tmp_path):
    path, n = tmp_path / "m.gguf", 262_144
    tokens = struct.pack("<IQ", 8, n) + b"".join(string(f"token{i}") for i in range(n))
    merges = struct.pack("<IQ", 8, 2 * n) + b"".join(string(f"a{i} b") for i in range(2 * n))
    scores = struct.pack("<IQ", 6, n) + np.arange(n, dtype="<f4").tobytes()
    entries = (entry("tokens", 9, tokens), entry("merges", 9, merges), entry("scores", 9, scores))
    path.write_bytes(file(*entries, entries=3))
    began = time.process_time()
    found = parse(path)
    assert len(found.get("merges")) == 2 * n and found.get("scores")[-1] == n - 1
    assert found.get("tokens")[-1] == f"token{n - 1}"
    assert time.process_time() - began < SECONDS
