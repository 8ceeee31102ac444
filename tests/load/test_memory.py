"""Memory: checkpoints stream into it tensor by tensor, bfloat16 weights stay so, and what does not
fit ends in one line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
import subprocess
import sys

import families
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny import within

import qkattr
from qkattr.cli import options
from qkattr.cli.main import main

#: Peak of resident memory while weights are read, in their size: the issue's 10 % over it.
PEAK = 1.10

#: Llama 3.1 8B, its widths and vocabulary divided by so much; blocks and heads as they are.
SMALLER = 6
BLOCKS, HEADS, KV, HEAD = 32, 32, 8, 128 // SMALLER // 2 * 2
D, F, V = HEADS * HEAD, 14336 // SMALLER, 128256 // SMALLER

MEASURE = """
import sys
import jax
import qkattr
def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
jax.block_until_ready(jax.numpy.zeros(3))
load = qkattr.load  # imports the library, whose own size is not measured
before = memory("VmRSS")
params = load(sys.argv[1], dtype=sys.argv[2]).params
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(size, memory("VmHWM") - before, *params.blocks.wk_DKH[31, :3, 2, 1].tolist())
"""


def shapes():
    kv = HEAD * KV
    yield "model.embed_tokens.weight", (V, D)
    for b in range(BLOCKS):
        at = f"model.layers.{b}"
        yield f"{at}.input_layernorm.weight", (D,)
        yield f"{at}.post_attention_layernorm.weight", (D,)
        for name, shape in dict(q=(D, D), k=(kv, D), v=(kv, D), o=(D, D)).items():
            yield f"{at}.self_attn.{name}_proj.weight", shape
        for name, shape in dict(gate=(F, D), up=(F, D), down=(D, F)).items():
            yield f"{at}.mlp.{name}_proj.weight", shape
    yield "model.norm.weight", (D,)
    yield "lm_head.weight", (V, D)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """Four bfloat16 shards that take no room on disk: holes, but for one tensor."""
    folder = tmp_path_factory.mktemp("sparse")
    config = dict(
        model_type="llama", hidden_size=D, intermediate_size=F, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, num_key_value_heads=KV, vocab_size=V, rope_theta=5e5,
        max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    every, table = list(shapes()), {}
    for i in range(4):
        name, at, header = f"model-0000{i + 1}-of-00004.safetensors", 0, {}
        for tensor, shape in every[i::4]:
            stop = at + 2 * math.prod(shape)
            header[tensor] = dict(dtype="BF16", shape=shape, data_offsets=(at, stop))
            table[tensor], at = name, stop
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(file.tell() + at)
            if filled := header.get("model.layers.31.self_attn.k_proj.weight"):
                file.seek(8 + len(text) + filled["data_offsets"][0])
                file.write(tensor_31().tobytes())
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map=table)))
    assert sum(path.stat().st_blocks for path in folder.iterdir()) * 512 < 2**22
    return folder


def tensor_31():
    rows = np.random.default_rng(0).normal(size=(HEAD * KV, D))
    return rows.astype(ml_dtypes.bfloat16)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measures as Linux does")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_checkpoint_in_the_shape_of_8b_streams_tensor_by_tensor(sparse, dtype):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(sparse), dtype],
        capture_output=True, text=True, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    size, peak, *values = map(float, done.stdout.split())
    assert size > 2e8 and peak <= PEAK * size, f"{peak / size:.3f} of the weights at its peak"
    assert values == tensor_31()[2 * HEAD + 1, :3].astype(float).tolist()


def test_bfloat16_weights_are_read_as_float32():
    """They stay as they are; the graph is that of the same weights held in float32."""
    half = qkattr.load(families.saved("gemma2"), dtype="bfloat16")
    matrices = [w for w in jax.tree.leaves(half.params) if w.ndim > 2]
    assert len(matrices) > 6 and all(w.dtype == jnp.bfloat16 for w in matrices)
    params = jax.tree.map(
        lambda w: w.astype(jnp.float32) if w.dtype == jnp.bfloat16 else w, half.params
    )
    wide = dataclasses.replace(half, read_params=lambda: params)
    ours, theirs = (
        qkattr.trace(bundle, families.PROMPT, qk=0).graph.edges for bundle in (half, wide)
    )
    assert ours.weight.dtype == np.float32 and len(ours.weight) > 50
    within("edges of bfloat16 weights", ours.weight, theirs.weight, 1e-5, np.abs(ours.weight).max())


@pytest.mark.parametrize(
    "command, knob",
    [
        (["trace", "1,2", "--ids"], "lower --max-rows or --max-slots, shorten the prompt"),
        (["check"], "shorten the prompt or the text, give --dtype bfloat16"),
        (["features", "--text", "t", "--out", "o"], "lower --batch"),
        (["check", "--dtype", "bfloat16"], "shorten the prompt or the text, or use a larger"),
    ],
)
def test_out_of_memory_is_one_line_that_names_what_to_change(
    command, knob, monkeypatch, capsys, tmp_path
):
    """The error is XLA's own, of an array that no machine holds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").write_text("text")
    monkeypatch.setattr(options.Saes, "open", lambda self: jnp.zeros(2**48))
    assert main([*command, "-m", "m", "-s", "s"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("qkattr: out of memory for 1125899906842624 bytes; ") and knob in err
