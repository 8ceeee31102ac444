"""Times the QK analyses that look at everything, as rates beside plain matmuls of the same shapes.

    python benchmarks/qk.py [--tokens 64 256] [--widths 2304 16384] [--repeat 5] [--json FILE]

All marginals and the top pairs of all heads of SmolLM2 over a prompt, and the strongest pairs of a
head over a whole dictionary, without a prompt (random directions; head sizes 64 and 256). A rate is
the products that are needed (of pairs that a head sees, of slots that hold a component) by the
median time of the whole call, transfer to the host included; with projections, those of the
components to the heads count as well. The reference is a jitted float32 matmul whose
tiles have the same inner dimension, run in turn with what it is compared with. The loop is what one
would write without these: one jitted einsum for each (t, s) of a head, with its top-k. Peak memory
is that of the process, over what it was when the model and the prompt were there.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import qkattr
from qkattr.cli.common import use_compilation_cache
from qkattr.config import BlockConfig
from qkattr.kinds import NO_WINDOW
from qkattr.model.transformer import block
from qkattr.qk.marginals import block_marginals
from qkattr.qk.pairs import TILE, search_slots, top_pairs
from qkattr.qk.terms import every_query_component, key_components
from qkattr.qk.weights import HeadScales, weight_pairs
from qkattr.subject import subject as open_subject
from qkattr.types import BlockWeights

AUNT_SALLY = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
TOP = 64


def seconds(call) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def in_turn(calls: list, repeat: int) -> list[float]:
    """Median seconds of each call, after a first one that compiles."""
    for call in calls:
        seconds(call)
    rounds = [[seconds(call) for call in calls] for _ in range(repeat)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def reference(rows: int, inner: int, columns: int, times: int):
    """`times` jitted matmuls of one shape, and their operations."""
    a, b = jnp.ones((rows, inner)), jnp.ones((columns, inner))
    product = jax.jit(lambda a, b: jnp.einsum("RH,CH->RC", a, b, precision="highest"))
    return lambda: [product(a, b) for _ in range(times)][-1], 2 * rows * inner * columns * times


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def compared(name: str, calls: list, operations: float, plain, repeat: int, **more) -> dict:
    """A row: the seconds and rate of some calls, each run in turn with the plain matmul."""
    run, plain_operations = plain
    pairs = [in_turn([call, run], repeat) for call in calls]
    took, plain_took = (sum(column) for column in zip(*pairs, strict=True))
    rate, plain_rate = operations / took / 1e9, plain_operations * len(calls) / plain_took / 1e9
    row = dict(name=name, seconds=took, gflops=rate, plain_gflops=plain_rate,
               share=rate / plain_rate, **more)  # fmt: skip
    if more:
        row["share_with_projections"] = row["share"] * (1 + more["projections"] / operations)
    said = " ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    print(said, flush=True)
    return row


def of_prompt(bundle, n_tokens: int, repeat: int) -> list[dict]:
    """All marginals, and top pairs over everything: block by block, to the host."""
    text = bundle.tokenize(AUNT_SALLY * (1 + n_tokens // 14))[0][:n_tokens]
    subject = open_subject(bundle, text)
    config, blocks, parts = bundle.config, bundle.params.blocks, subject.components
    slots = search_slots(blocks, parts)
    how = dict(cfg=config.block, precision="highest")
    inputs = [
        jax.tree.map(lambda a, b=b: a[b], (blocks, subject.boundaries, parts))
        for b in range(config.n_blocks)
    ]
    per_pair, places = slot_pairs(subject, slots)
    h, d, a, n_heads = config.head_dim, config.d_model, parts.n_slots, config.n_heads
    vectors = parts.rows.shape[1] + 2 * len(parts.kind[0])
    projections = 2.0 * config.n_blocks * vectors * d * h * (n_heads + config.n_kv_heads)

    def ours(function, *more):
        return [lambda b=b: jax.device_get(function(*inputs[b], *(m[b] for m in more), **how))
                for b in range(config.n_blocks)]  # fmt: skip

    before = peak_gib()
    heads = config.n_blocks * n_heads
    rows = [
        compared(
            f"all marginals, {n_tokens} tokens", ours(marginals),
            heads * places * 2.0 * 2 * a * h,
            reference(a * n_tokens, h, max(64, n_tokens // 4), 16), repeat,
            projections=projections,
        ),
        compared(
            f"top pairs over everything, {n_tokens} tokens",
            ours(partial(top_pairs, top=TOP), slots), n_heads * per_pair * 2.0 * h,
            reference(TILE, h, TILE, 16), repeat, projections=projections,
        ),
    ]  # fmt: skip
    return [row | dict(memory_gib=peak_gib() - before) for row in rows]


def slot_pairs(subject, slots: np.ndarray) -> tuple[int, int]:
    """`(pairs of slots that a head sees, over all blocks; places (t, s))`."""
    n_slots, n = subject.components.n_slots, len(subject.ids)
    pairs = 0
    for of_block in slots:
        counts = np.bincount(of_block[of_block >= 0] // n_slots, minlength=n)
        pairs += int((counts * np.cumsum(counts)).sum())
    return pairs, n * (n + 1) // 2


def against_a_loop(bundle, n_tokens: int) -> list[dict]:
    """One block's heads by a jitted einsum per (t, s), beside the two functions."""
    text = bundle.tokenize(AUNT_SALLY * (1 + n_tokens // 14))[0][:n_tokens]
    subject = open_subject(bundle, text)
    config = bundle.config
    weights, x, parts = jax.tree.map(
        lambda a: a[12], (bundle.params.blocks, subject.boundaries, subject.components)
    )
    how = dict(cfg=config.block, precision="highest")
    slots = search_slots(bundle.params.blocks, subject.components)[12]
    _, seen = jax.jit(partial(block, **how))(weights, x)

    @jax.jit
    def parts_of(head):
        q = every_query_component(weights, parts, seen, head, **how)
        return q * config.block.scale, key_components(weights, parts, seen, head, **how)

    @jax.jit
    def one(q, k, t, s):
        terms = jnp.einsum("AH,CH->AC", q[t], k[s], precision="highest")
        best = [jax.lax.top_k(sign * terms.ravel(), TOP) for sign in (1, -1)]
        sums = [jax.lax.top_k(jnp.abs(terms.sum(axis)), 5) for axis in (0, 1)]
        return best, sums

    def loop():
        found = []
        for head in range(config.n_heads):
            q, k = parts_of(head)
            found += [one(q, k, t, s) for t in range(n_tokens) for s in range(t + 1)]
        return jax.device_get(found)

    def ours():
        pairs = top_pairs(weights, x, parts, slots, top=TOP, **how)
        return jax.device_get((pairs, block_marginals(weights, x, parts, **how)))

    took, loop_took = in_turn([ours, loop], 3)
    row = dict(name=f"one block, {n_tokens} tokens, against a loop over (t, s)", seconds=took,
               loop_seconds=loop_took, times=loop_took / took)  # fmt: skip
    print(row, flush=True)
    return [row]


def of_weights(width: int, head_dim: int, repeat: int) -> dict:
    """The strongest pairs of a random head over random directions."""
    d = 512
    keys = jax.random.split(jax.random.key(0), 3)
    empty = jnp.zeros((d, 1))
    weights = BlockWeights(
        wq_DNH=jax.random.normal(keys[0], (d, 1, head_dim)) / d**0.5,
        wk_DKH=jax.random.normal(keys[1], (d, 1, head_dim)) / d**0.5,
        wv_DKH=jnp.zeros((d, 1, head_dim)), wo_NHD=jnp.zeros((1, head_dim, d)),
        w_up_DF=empty, w_down_FD=empty.T, inv_freq=0.5 ** jnp.arange(head_dim // 2, dtype=float),
        window=jnp.int32(NO_WINDOW),
    )  # fmt: skip
    features = jax.random.normal(keys[2], (width, d))
    features = features / jnp.linalg.norm(features, axis=1, keepdims=True)
    config = BlockConfig(scale=head_dim**-0.5)
    before = peak_gib()
    row = compared(
        f"weights only, {width} x {width}, head size {head_dim}",
        [
            lambda: weight_pairs(
                weights, features, head=0, distance=1, scales=HeadScales(), top=TOP, cfg=config
            )
        ],
        2.0 * width * width * head_dim,
        reference(TILE, head_dim, TILE, 64),
        repeat,
    )
    return row | dict(memory_gib=peak_gib() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--widths", type=int, nargs="*", default=[2304, 16384])
    parser.add_argument("--loop-tokens", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json")
    asked = parser.parse_args()
    use_compilation_cache()
    rows = [of_weights(w, h, asked.repeat) for w in asked.widths for h in (64, 256)]
    bundle = qkattr.load("smollm2", "smollm2")
    for n in asked.tokens:
        rows += of_prompt(bundle, n, asked.repeat)
    rows += against_a_loop(bundle, asked.loop_tokens)
    if asked.json:
        with open(asked.json, "w") as f:
            json.dump(
                dict(device=str(jax.devices()[0]), jax=jax.__version__, rows=rows), f, indent=1
            )


if __name__ == "__main__":
    main()
