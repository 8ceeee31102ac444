"""Times the effects of targets on SmolLM2, and measures their memory, beside a forward pass.

    python benchmarks/effects.py [--tokens 15 256] [--targets 1 4] [--repeat 7] [--json FILE]

Each program is compiled ahead of time, without the persistent cache; the calls then run in turn,
and the median counts. Memory is what XLA plans for the program: its temporaries and its results
together, the weights and the prompt's arrays left out. `plain` is the forward pass that keeps the
boundaries alone; `effects` carries R logits back, with and without the arrays of the heads (head
effects and score derivatives, `[L, R, N, T, S]` each). `at places` is `effects_at` with
`pair_effects`, for 8 places (block, head, query, key).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np

import qkattr
from qkattr.graph.effects import effects_at, target_effects
from qkattr.graph.targets import logit_covectors
from qkattr.model.transformer import forward
from qkattr.qk.effects import pair_effects
from qkattr.sharding import pad_tokens
from qkattr.subject import subject as open_subject

AUNT_SALLY = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
N_PLACES = 8


def seconds(call) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def prepared(function, *arguments, **static):
    """`(call, compile seconds, MiB of temporaries and results)` of a jitted function."""
    start = time.perf_counter()
    program = function.lower(*arguments, **static).compile()
    took = time.perf_counter() - start
    plan = program.memory_analysis()
    mib = (plan.temp_size_in_bytes + plan.output_size_in_bytes) / 2**20
    return lambda: program(*arguments), took, mib


def targets(bundle, subject, n: int, n_real: int):
    """The n likeliest logits of the last position."""
    tokens = jax.lax.top_k(subject.logits, n)[1]
    read = subject.boundaries[-1, n_real - 1]
    g, constant = logit_covectors(
        bundle.params, read, tokens, jnp.full(n, -1), cfg=bundle.config
    )  # fmt: skip
    return jnp.full(n, bundle.config.n_blocks), jnp.full(n, n_real - 1), g, constant


def some_places(config, n_real: int):
    rng = np.random.default_rng(0)
    query = rng.integers(1, n_real, N_PLACES)
    heads = (rng.integers(0, size, N_PLACES) for size in (config.n_blocks, config.n_heads))
    return jnp.asarray(np.stack([*heads, query, rng.integers(0, query)], 1))


def bench(bundle, ids, counts: list[int], repeat: int) -> list[dict]:
    """All programs at one prompt length."""
    subject = open_subject(bundle, ids)
    padded, cfg = jnp.asarray(pad_tokens(ids)), bundle.config.block
    prompt = bundle.params.blocks, subject.boundaries, subject.components
    programs = {
        "plain": prepared(
            forward, bundle.params, padded, cfg=bundle.config, capture=("boundaries",)
        )
    }
    for n in counts:
        into = targets(bundle, subject, n, len(ids))
        for heads in (False, True):
            name = f"effects, {n} target(s), {'with' if heads else 'without'} heads"
            programs[name] = prepared(target_effects, *prompt, *into, cfg=cfg, heads=heads)
        covector = programs[name][0]().covector
        places = some_places(bundle.config, len(ids))
        at = prepared(effects_at, *prompt, covector, places, cfg=cfg)
        pairs = prepared(pair_effects, *prompt, places, at[0]().derivative, cfg=cfg)
        programs[f"at places, {n} target(s)"] = (
            lambda at=at[0], pairs=pairs[0]: (at(), pairs()),
            at[1] + pairs[1],
            max(at[2], pairs[2]),
        )
    for call, _, _ in programs.values():
        seconds(call)
    rounds = [[seconds(call) for call, _, _ in programs.values()] for _ in range(repeat)]
    took = [statistics.median(column) for column in zip(*rounds, strict=True)]
    return [
        dict(name=name, tokens=len(ids), bucket=len(padded), seconds=s, of_plain=s / took[0],
             compile=compiled, mib=mib)
        for (name, (_, compiled, mib)), s in zip(programs.items(), took, strict=True)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[15, 256])
    parser.add_argument("--targets", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", help="also write the figures here")
    asked = parser.parse_args()
    bundle = qkattr.load("smollm2", "smollm2")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    text = resources.files("qkattr").joinpath("sample.txt").read_text(encoding="utf-8")
    long, short = bundle.tokenize(text)[0], bundle.tokenize(AUNT_SALLY)[0]
    rows = []
    for n in asked.tokens:
        rows += bench(bundle, short if n == len(short) else long[:n], asked.targets, asked.repeat)
        print(f"\n{n} tokens\n{'':38}{'s':>8}{'of plain':>10}{'compile s':>11}{'MiB':>8}")
        for row in rows:
            if row["tokens"] == n:
                cells = f"{row['seconds']:8.3f}{row['of_plain']:10.2f}{row['compile']:11.1f}"
                print(f"{row['name']:38}{cells}{row['mib']:8.0f}")
    if asked.json:
        with open(asked.json, "w") as f:
            json.dump(rows, f, indent=1)


if __name__ == "__main__":
    main()
