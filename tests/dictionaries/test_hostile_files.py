"""Files made to run code, to fill the memory or to lie: one line, nothing executed, little read."""

import collections
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import folders
import layouts
import numpy as np
import pytest
import torch
from test_formats import MODEL

from qkattr.errors import InputError
from qkattr.load.dictionaries import find_saes, load_saes
from qkattr.load.tensors.npz import open_npz
from qkattr.load.tensors.torch_file import open_torch

D, M = layouts.D, layouts.M
BOUNDED = 2**28  # bytes that reading a hostile file may take, of address space beyond the start


def qwen(folder, rng=None):
    """A whole file of Qwen Scope, to be spoilt."""
    layouts.qwen_scope(folder, np.random.default_rng(0))
    return next(folder.rglob("*.pt"))


def members(path):
    with zipfile.ZipFile(path) as file:
        return {info.filename: file.read(info) for info in file.infolist()}


def rewrite(path, edit, compression=zipfile.ZIP_STORED):
    content = members(path)
    edit(content, next(n for n in content if n.endswith("data.pkl")))
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in content.items():
            file.writestr(name, data)


def refused(folder, message):
    with pytest.raises(InputError, match=message) as caught:
        load_saes(folder, MODEL, missing="raw")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


class Runs:
    """Pickles to a call of `os.system`."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pt_that_would_run_code(tmp_path, protocol):
    path, proof = qwen(tmp_path), tmp_path / "executed"
    torch.save({"W_enc": Runs(f"touch {proof}")}, path, pickle_protocol=protocol)
    refused(tmp_path, "it would import (posix|nt).system.*may run code; save its state_dict")
    assert not proof.exists()


def program(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


@pytest.mark.parametrize(
    "pickled, message",
    [
        (program(b"cbuiltins\neval\n", b"X\x01\0\0\0011\x85R"), "it would import builtins.eval"),
        (program(b"ctorch\nFloatStorage.__init__.__globals__\n"), "it would import torch.FloatS"),
        (program(b"(ios\nsystem\n"), "instruction INST"),
        (program(b"}q\x00(h\x00h\x00u"), "a key that is no text"),
        (program(b"N}b"), "an object with a state"),
        (program(b"K\x01K\x02\x85R"), "a call of what was not imported"),
        (program(b"K\x01Q"), "TypeError|not|a storage|more than tensors"),
        (program(b"\x8d" + struct.pack("<Q", 2**62)), "more than tensors"),
        (program(b"h\x09"), "more than tensors"),
        (program(b"R"), "more than tensors"),
        (program(b"u"), "more than tensors"),
        (program(b"Nr" + struct.pack("<I", 2**32 - 1)), "has no W_enc"),
        (b"\x80\x02}", "more than tensors"),
        (b"", "more than tensors"),
        (program(b"(" * 1000), "more than tensors|has no W_enc"),
    ],
)
def test_pickles_that_are_refused(tmp_path, pickled, message):
    path = qwen(tmp_path)
    rewrite(path, lambda content, name: content.update({name: pickled}))
    refused(tmp_path, message)


def test_dicts_in_dicts_a_million_million_times(tmp_path):
    inner = {str(i): None for i in range(1000)}
    for _ in range(6):
        inner = {str(i): inner for i in range(1000)}
    path = qwen(tmp_path)
    rewrite(path, lambda c, name: c.update({name: pickle.dumps(inner, protocol=2)}))
    refused(tmp_path, "more than 10000 values")


def fake(shape, strides, count=6, offset=0):
    """A state dict whose W_enc has any shape, over a storage of some floats."""
    name = "ctorch._utils\n_rebuild_tensor_v2\n"
    number = lambda n: b"\x8a\x08" + struct.pack("<q", n)  # noqa: E731
    many = lambda ns: b"(" + b"".join(map(number, ns)) + b"t"  # noqa: E731
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0000X\x03\0\0\0cpu"
    storage += number(count) + b"tQ"
    tail = b"\x89ccollections\nOrderedDict\n)RtR"
    tensor = name.encode() + b"(" + storage + number(offset) + many(shape) + many(strides) + tail
    return program(b"}X\x05\0\0\0W_enc" + tensor + b"s")


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(shape=(3, 2), strides=(2, 1)), "lacks W_dec"),
        (dict(shape=(10**9, 10**9), strides=(0, 0)), "beyond its storage of 6"),
        (dict(shape=(2**62, 4), strides=(1, 1)), "beyond its storage of 6"),
        (dict(shape=(3, 2), strides=(3, 1)), "beyond its storage of 6"),
        (dict(shape=(3, 2), strides=(2, 1), offset=1), "beyond its storage of 6"),
        (dict(shape=(3, 2), strides=(-2, 1)), "a tensor that is none"),
        (dict(shape=(3,), strides=(2, 1)), "a tensor that is none"),
        (dict(shape=(3, 2), strides=(2, 1), count=2**40), "storage 0 has 24 bytes"),
    ],
)
def test_tensors_that_lie(tmp_path, how, message):
    path = tmp_path / "x-L0_2" / "layer1.sae.pt"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", fake(**how))
        file.writestr("archive/data/0", np.arange(6, dtype="<f4").tobytes())
    refused(tmp_path, message)


def test_old_and_foreign_files(tmp_path):
    path = qwen(tmp_path)
    whole = path.read_bytes()
    torch.save({"W_enc": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    refused(tmp_path, "is not a zip: an old PyTorch file")
    for keep in (3, 40, len(whole) // 2, -1):
        path.write_bytes(whole[:keep])
        refused(tmp_path, "is not a whole file")
    path.write_bytes(whole)
    rewrite(path, lambda content, name: content.pop(name))
    refused(tmp_path, "no data.pkl")
    path.write_bytes(whole)
    rewrite(path, lambda content, name: None, zipfile.ZIP_DEFLATED)
    refused(tmp_path, "PyTorch compresses nothing")
    path.write_bytes(whole)
    rewrite(path, lambda c, name: c.update({name.replace("data.pkl", "byteorder"): b"big"}))
    refused(tmp_path, "big-endian")


def test_what_torch_saves_is_what_is_read(tmp_path):
    """Views, transposes, parameters, nesting, halves: as torch.load has them."""
    base = torch.arange(24.0).reshape(4, 6)
    saved = collections.OrderedDict(
        whole=base, turned=base.T, part=base[1:3, ::2], half=base.half(), short=base.bfloat16(),
        number=torch.tensor(7), parameter=torch.nn.Parameter(base), nested={"a": base[0], "n": 3},
        text="x", empty=torch.zeros(0, 3), scalar=torch.tensor(0.5), values=[1, (2.5, None, True)],
    )  # fmt: skip
    for protocol in (2, 4):
        torch.save(saved, tmp_path / "x.pt", pickle_protocol=protocol)
        file = open_torch(tmp_path / "x.pt", "x.pt")
        tensors = {n: t for n, t in saved.items() if isinstance(t, torch.Tensor)}
        assert set(file.shapes()) == {*tensors, "nested.a"}
        for name, tensor in tensors.items():
            assert file.shapes()[name] == tuple(tensor.shape)
            got, expected = file.read(name), tensor.detach().float().numpy()
            np.testing.assert_array_equal(np.asarray(got, np.float32), expected)
            assert not got.flags.writeable
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "x.pt")  # has a state of its own: _metadata
    file = open_torch(tmp_path / "x.pt", "x.pt")
    np.testing.assert_array_equal(file.read("weight"), module.weight.detach().numpy())


# npz


def npz(folder, **arrays):
    path = folder / "layer_1" / "width_16k" / "average_l0_9" / "params.npz"
    path.parent.mkdir(parents=True)
    if arrays:
        np.savez(path, **arrays)
    return path


def test_a_zip_bomb(tmp_path):
    path = npz(tmp_path)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, dict(descr="<f4", fortran_order=False, shape=(D, 2**26))
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("W_enc.npy", "w", force_zip64=True) as member:
            member.write(head.getvalue())
            for _ in range(D):
                member.write(bytes(2**28 // D))
    refused(tmp_path, "claims to hold .* made to fill the memory")


def directory(path, edit):
    """The central directory's records changed where they lie."""
    data = bytearray(path.read_bytes())
    edit(data, data.index(b"PK\1\2"))
    path.write_bytes(bytes(data))


def test_sizes_that_lie(tmp_path):
    arrays = layouts.weights(np.random.default_rng(0))
    path = npz(tmp_path, **arrays)
    whole = path.read_bytes()

    def lie(at, value, form="<I"):
        path.write_bytes(whole)
        directory(path, lambda data, i: struct.pack_into(form, data, i + at, value))

    for at in (20, 24):  # compressed and whole size
        lie(at, 2**31)
        refused(tmp_path, "is not a whole file")
    lie(8, 1, "<H")  # encrypted
    refused(tmp_path, "encrypted")
    lie(10, 14, "<H")  # LZMA
    refused(tmp_path, "is not a whole file")
    lie(42, 10**6)  # where the member is
    refused(tmp_path, "is not a whole file")
    path.write_bytes(whole.replace(b"(8, 24)", b"(8, 99)"))
    refused(tmp_path, "its 768 bytes are not that many")
    path.write_bytes(whole.replace(b"(8, 24)", b"(-8,24)"))
    refused(tmp_path, "is not a whole file")
    for keep in (0, 10, len(whole) // 2, -3):
        path.write_bytes(whole[:keep])
        refused(tmp_path, "is not a whole file")


WHOLE = dict(
    W_enc=np.ones((D, M)), W_dec=np.ones((M, D)), b_enc=np.ones(M), b_dec=np.ones(D),
    threshold=np.ones(M),
)  # fmt: skip


@pytest.mark.parametrize(
    "arrays, message",
    [
        (dict(WHOLE, b_dec=np.array([{}] * D, object)), r"b_dec is \|O, expected floats"),
        (dict(WHOLE, b_dec=np.zeros(D, ">f4")), "b_dec is >f4, expected floats"),
        (dict(WHOLE, W_enc=np.zeros((D, M), np.int32)), "W_enc is <i4, expected floats"),
        (dict(W_enc=np.zeros(3)), r"has no W_enc \[d_in, d_sae\]"),
        (dict(other=np.zeros(3)), r"has no W_enc \[d_in, d_sae\]"),
        (dict(W_enc=np.zeros((D, M))), "lacks W_dec"),
    ],
)
def test_arrays_that_are_refused(tmp_path, arrays, message):
    npz(tmp_path, **arrays)
    refused(tmp_path, message)


def test_arrays_that_cannot_be_read_are_listed_only(tmp_path):
    """One of objects is a pickle: it is never made."""
    np.savez(tmp_path / "x.npz", a=np.ones(2), seen=np.array([{}], object), step=np.arange(3))
    file = open_npz(tmp_path / "x.npz", "x.npz")
    assert file.shapes() == {"a": (2,), "seen": (1,), "step": (3,)}
    np.testing.assert_array_equal(file.read("a"), [1, 1])
    for name in ("seen", "step"):
        with pytest.raises(
            InputError, match=f"x.npz: {name}.npy is .*, expected little-endian floats"
        ):
            file.read(name)


def test_compressed_arrays_are_read_whole(tmp_path):
    arrays = dict(a=np.arange(12.0).reshape(3, 4), b=np.asfortranarray(np.ones((3, 5), np.float16)))
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        file = open_npz(tmp_path / "x.npz", "x.npz")
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.read(name), array)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    at = data.index(b"a.npy") + 30
    data[at : at + 20] = bytes(20)
    (tmp_path / "x.npz").write_bytes(bytes(data))
    with pytest.raises(InputError, match="is not a whole file"):
        open_npz(tmp_path / "x.npz", "x.npz").read("a")


# safetensors


def test_a_safetensors_header_of_two_gigabytes(tmp_path):
    layouts.gemma_scope_2(tmp_path, np.random.default_rng(0))
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(struct.pack("<Q", 2**31) + path.read_bytes()[8:])
    refused(tmp_path, "is not a whole safetensors file")


def test_a_safetensors_shape_that_lies(tmp_path):
    layouts.gemma_scope_2(tmp_path, np.random.default_rng(0))
    path = next(tmp_path.rglob("*.safetensors"))
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    header["w_enc"]["shape"] = [D, 2**50]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])
    refused(tmp_path, "is not a whole safetensors file")


WITHIN = """
import resource
import sys
from pathlib import Path
import qkattr.load.dictionaries
from qkattr.errors import InputError
from qkattr.load.tensors.npz import open_npz
from qkattr.load.tensors.torch_file import open_torch
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[1]),) * 2)
for path in map(Path, sys.argv[2:]):
    try:
        (open_npz if path.suffix == ".npz" else open_torch)(path, path.name)
    except InputError as e:
        print(len(str(e)))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="measures memory as Linux does")
def test_hostile_files_take_little_memory(tmp_path):
    """A memo index of 4 billion, a byte string of 2^62, a tensor of 10^18 and a bomb."""
    for i, pickled in enumerate(
        (
            program(b"Nr" + struct.pack("<I", 2**32 - 1) + b"0(e"),
            program(b"\x8e" + struct.pack("<Q", 2**62)),
            fake((10**9, 10**9), (0, 0)),
        )
    ):
        with zipfile.ZipFile(tmp_path / f"{i}.pt", "w") as file:
            file.writestr("archive/data.pkl", pickled)
            file.writestr("archive/data/0", bytes(24))
    test_a_zip_bomb(tmp_path)
    files = [*map(str, tmp_path.glob("*.pt")), *map(str, tmp_path.rglob("*.npz"))]
    done = subprocess.run(
        [sys.executable, "-c", WITHIN, str(BOUNDED), *files],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    assert len(done.stdout.split()) == 4


# Configs

VALUES = (None, True, -1, 10**9, 10**400, 1e308, "x", [], ["x"], {}, {"x": 1})


def places(config, *above):
    for name, value in config.items():
        yield *above, name
        if isinstance(value, dict):
            yield from places(value, *above, name)


CONFIGURED = ("gemma scope 2", "llama scope", "llamascopium", "sparsify", "saelens",
              "dictionary_learning, BatchTopKSAE", "dictionary_learning, AutoEncoderTopK",
              "qwen scope, config")  # fmt: skip


@pytest.mark.parametrize("case", CONFIGURED)
def test_any_value_of_any_attribute_is_read_or_refused(tmp_path, case):
    """Nothing but `InputError` may come of a wrong config, and no array is made for it."""
    if case == "saelens":
        folders.write_saes(tmp_path, boundaries=[1], d=D)
    else:
        layouts.CASES[case](tmp_path, np.random.default_rng(0))
    path = next(p for p in tmp_path.rglob("*.json"))
    text = path.read_text()
    for *above, name in places(json.loads(text)):
        for value in VALUES:
            inner = config = json.loads(text)
            for step in above:
                inner = inner[step]
            inner[name] = value
            path.write_text(json.dumps(config))
            try:
                find_saes(tmp_path).read(2)
            except InputError as e:
                assert "\n" not in str(e) and len(str(e)) < 500
