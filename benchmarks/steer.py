"""What a sweep over scales costs, beside a plain batched forward of as many prompts.

    python benchmarks/steer.py [--repeat 15]

Interleaved in one process; medians. The sweep: 11 scales of the 4 strongest key features of each
block in the 7 heads with the largest loadings, Aunt Sally (15 tokens, padded to 16), norm scales
frozen and live, other heads live and frozen. The forward: 11 copies of the prompt, unpadded,
vmapped, logits of the last token. Host work (placing edits, tables) is in "steer", not in "sweep".
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import qkattr
from qkattr.experiments.edits import at_scales
from qkattr.experiments.runs import edited_runs
from qkattr.experiments.steer import make_edits, patterns_of
from qkattr.model.transformer import residual_stream, unembed
from qkattr.sharding import pad_tokens

PROMPT = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
SCALES = np.linspace(-1, 2, 11).tolist()


@partial(jax.jit, static_argnames="cfg")
def plain(params, tokens, *, cfg):
    """`[B, V]` last logits of a batch of prompts."""

    def one(row):
        x, _ = residual_stream(params, row, cfg=cfg, capture=())
        return unembed(params, x[-1], cfg=cfg)

    return jax.vmap(one)(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=15)
    repeat = parser.parse_args().repeat
    bundle = qkattr.load("smollm2", "smollm2")
    result = qkattr.trace(bundle, PROMPT, qk=0)
    subject = result.subject
    edits = qkattr.choose_edits(result, source=" Sally", target=-1, heads=7, features=4)
    padded, last = jnp.asarray(pad_tokens(subject.ids)), len(subject.ids) - 1
    batch = jnp.tile(jnp.asarray(subject.ids), (len(SCALES), 1))

    def sweep(**how):
        arrays = at_scales(make_edits(subject, edits, **how)[0], SCALES)
        rows = jnp.asarray([last])
        return lambda: edited_runs(bundle.params, padded, last, rows, arrays, cfg=bundle.config)

    cases = {
        "forward of 11 prompts": lambda: plain(bundle.params, batch, cfg=bundle.config),
        "sweep": sweep(),
        "sweep, live scales": sweep(live_scales=True),
        "sweep, others frozen": sweep(held=patterns_of(subject)),
        "steer (with tables)": lambda: qkattr.steer(result, edits, scales=SCALES),
    }
    times = {name: [] for name in cases}
    for i in range(repeat + 1):
        for name, run in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i:  # the first compiles
                times[name].append(time.perf_counter() - start)
    first = times["forward of 11 prompts"]
    for name, taken in times.items():
        ratio = statistics.median(t / f for t, f in zip(taken, first, strict=True))
        print(f"{name:24} {1e3 * statistics.median(taken):8.1f} ms   x {ratio:.2f}")


if __name__ == "__main__":
    main()
