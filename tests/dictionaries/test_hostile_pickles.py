"""Pickles of the instructions that PyTorch itself writes, made to take for ever or to crash.

A restricted `pickle.Unpickler` that allows the same instructions hangs on the first two and dies of
the third (Python 3.11): it hashes a key before anybody sees it.
"""

import os
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from test_hostile_files import BOUNDED, WITHIN, program, refused

#: Bytes of a pickle that is read at all; nearly as many are made.
MOST = 2**20 - 100
SECONDS = 60  # for all of them; each takes less than one, and would take hours
TWICE = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
NUMBER = b"\x8a\xff" + b"\x7f" * 255  # of 255 bytes
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0000X\x03\0\0\0cpu\x8a\x01\x06tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
KEY = b"X" + struct.pack("<I", MOST // 2) + b"k" * (MOST // 2)


def axes(count, first):
    """A tensor of so many axes, all as long as one number."""
    shape = b"(" + first + b"q\0" + b"h\0" * (count - 1) + b"t"
    return TENSOR + b"(" + STORAGE + b"K\0" + shape + b"(K\0q\x01" + b"h\x01" * (count - 1) + b"t"


TAIL = b"\x89ccollections\nOrderedDict\n)RtR"
HOSTILE = {
    "a key of 2^60 tuples": (program(b"})" + TWICE + b"Ns"), "a key that is no text"),
    "such a key among others": (
        program(b"}(X\x01\0\0\0aN)" + TWICE + b"Nu"),
        "a key that is no text",
    ),
    "a key of a million tuples in one another": (
        program(b"})" + b"\x85" * (MOST - 100) + b"Ns"),
        "a key that is no text",
    ),
    "such a key of an OrderedDict": (
        program(b"ccollections\nOrderedDict\n)R)" + b"\x85" * (MOST - 100) + b"Ns"),
        "a key that is no text",
    ),
    "an OrderedDict made of 2^60 tuples": (
        program(b"ccollections\nOrderedDict\n)" + TWICE + b"\x85R"),
        "an OrderedDict made of something",
    ),
    "a storage of 2^60 tuples": (program(b")" + TWICE + b"Q"), "more than tensors"),
    "a shape of a quarter of a million large numbers": (
        program(b"}X\x05\0\0\0W_enc" + axes(MOST // 4 - 300, NUMBER) + TAIL + b"s"),
        "a tensor that is none",
    ),
    "a shape of as many ones": (
        program(b"}X\x05\0\0\0W_enc" + axes(MOST // 4 - 300, b"K\x01") + TAIL + b"s"),
        "a tensor that is none",
    ),
    "one long key in itself 9,000 times": (
        program(b"}" + KEY + b"q\0" + b"}h\0" * 9000 + b"N" + b"s" * 9001),
        "a name of more than 1000 characters",
    ),
    "short keys in one another": (
        program((b"}X\x01\0\0\0a") * 2000 + b"N" + b"s" * 2000),
        "a name of more than 1000 characters",
    ),
}  # fmt: skip


def write(path, pickled):
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", np.arange(6, dtype="<f4").tobytes())
    return path


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="measures memory as Linux does")
def test_hostile_pickles_take_neither_time_nor_memory(tmp_path):
    files = [write(tmp_path / f"{i}.pt", p) for i, (p, _) in enumerate(HOSTILE.values())]
    done = subprocess.run(
        [sys.executable, "-c", WITHIN, str(BOUNDED), *map(str, files)],
        capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    assert len(done.stdout.split()) == len(HOSTILE)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(tmp_path, name):
    pickled, message = HOSTILE[name]
    assert len(pickled) < 2**20  # or its size alone would be refused
    write(tmp_path / "x-L0_2" / "layer1.sae.pt", pickled)
    refused(tmp_path, message)
