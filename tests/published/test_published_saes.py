"""The published SAE sets, laid out on disk from what is known of their files, against `expect`.

A safetensors file has its real shapes and no bytes: a hole, of which only the header is read. Other
files are written, with fewer features.
"""

import json
import math
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from qkattr.errors import InputError
from qkattr.load.dictionaries.find import find_saes
from qkattr.load.registry import registry

SETS = {p.stem: json.loads(p.read_text()) for p in (Path(__file__).parent / "saes").glob("*.json")}
NEEDED = {"set", "origin", "format", "model", "blocks", "files", "other_hooks", "config", "tensors"}
NEEDED |= {"expect", "why", "prepend_bos", "normalize", "license"}
BYTES = {"F32": 4, "BF16": 2, "I64": 8}
FEATURES = 128
#: Formats without a config.
BARE = ("gemma-scope", "goodfire", "qresearch")
FILLED = {"W": "16k", "N": "100", "i": "0", "...": "x"}


def whole(facts):
    """The configs that are whole and of the present revision, by path."""
    return {path: config for path, config in facts["config"].items() if " (" not in path}


def weights(facts):
    """The tensors of each file that qkattr might open, by its name in an SAE's folder."""
    kinds = (".safetensors", ".npz", ".pt", ".pth")
    return {f: t for f, t in facts["tensors"].items() if f.endswith(kinds) and " (" not in f and t}


LAID_OUT = sorted(
    name
    for name, facts in SETS.items()
    if weights(facts) and (whole(facts) or facts["format"] in BARE)
)


def filled(template, facts):
    """A path with its first layer and its first choices."""
    known = FILLED | {"L": str(facts.get("layers", [0])[0])}
    return re.sub(r"\{([^{}]*)\}", lambda m: known.get(m[1], m[1].split(",")[0]), template)


def write_hole(path, tensors):
    """A safetensors file of these types and shapes, all zeros but for the average norms."""
    header, at, norms = {}, 0, []
    for name, (kind, shape) in tensors.items():
        size = BYTES[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        norms += [at] if name.startswith("dataset_average") else []
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
        for norm in norms:
            file.seek(8 + len(text) + norm)
            file.write(struct.pack("<f", 10.0))


def write_weights(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        return write_hole(path, tensors)
    width = max(size for _, shape in tensors.values() for size in shape)
    shapes = {
        name: [FEATURES if size == width else size for size in shape]
        for name, (_, shape) in tensors.items()
    }
    if path.suffix == ".npz":
        np.savez(path, **{name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    else:
        torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, path)


def narrowed(config, facts):
    """The config, with as many features as the file is written with."""
    if any(file.endswith(".safetensors") for file in weights(facts)):
        return config
    fewer = {name: FEATURES for name in ("d_sae", "dict_size")} | {"num_layers": 1}
    shown = {name: fewer.get(name, value) for name, value in config.items()}
    return {n: narrowed(v, facts) if isinstance(v, dict) else v for n, v in shown.items()}


def lay_out(root, facts):
    """The set as it was downloaded: one SAE of each hook, the neighbours' configs as its own."""
    paths = whole(facts) or {facts["files"][0]: None}
    for path, config in paths.items():
        folder, _, name = path.rpartition("/")
        beside = facts["other_hooks"] if facts["expect"] == "reads" and "{L}" in path else ()
        for template in (folder, *beside):
            at = root / filled(template, facts)
            for file, tensors in weights(facts).items():
                write_weights(at / filled(file, facts), tensors)
            if config is not None:
                (at / name).write_text(json.dumps(narrowed(config, facts)))


def outcome(root, facts):
    try:
        headers = find_saes(root).headers.values()
    except InputError:
        return "refused"
    d_model = facts.get("d_model")
    return "refused" if any(d_model not in (None, h.d_in) for h in headers) else "reads"


@pytest.mark.parametrize("name", LAID_OUT)
def test_a_published_set_does_what_is_expected(name, tmp_path):
    facts = SETS[name]
    root = tmp_path / (facts["set"] or name).split("/")[-1]
    lay_out(root, facts)
    assert outcome(root, facts) == facts["expect"], facts["why"]


def test_the_facts_have_their_keys():
    for name, facts in SETS.items():
        assert set(facts) >= NEEDED, name
        assert facts["expect"] in ("reads", "refused"), name
        assert facts["why"] and facts["origin"], name


def test_configs_are_as_long_as_published():
    """Written again, in one of the usual ways, a whole config has the bytes that the hub names."""
    checked = 0
    for name, facts in SETS.items():
        for path, size in facts.get("sizes", {}).items():
            if path not in facts["config"] or not isinstance(size, int):
                continue
            config = facts["config"][path]
            lengths = {len(json.dumps(config, indent=indent)) for indent in (None, 2, 4)}
            assert size in lengths | {length + 1 for length in lengths}, (name, path)
            checked += 1
    assert checked >= 7


def test_weights_are_as_large_as_published():
    """The tensors fill a file whose bytes the hub names, but for its header."""
    checked = 0
    for name, facts in SETS.items():
        for file, tensors in weights(facts).items():
            size = facts.get("sizes", {}).get(file)
            if isinstance(size, int):
                total = sum(BYTES[kind] * math.prod(shape) for kind, shape in tensors.values())
                assert 0 < size - total < 2000, (name, file)
                checked += 1
    assert checked >= 7


def test_every_set_of_the_registry_is_among_them():
    named = {entry for facts in SETS.values() for entry in facts.get("registry", [])}
    assert named >= set(registry().saes)
