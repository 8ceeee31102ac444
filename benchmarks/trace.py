"""Times every stage of a trace of SmolLM2, beside plain matmuls of the same inner dimensions.

    python benchmarks/trace.py [--tokens 15 64 256] [--repeat 5] [--json FILE]

For each stage: cold (first call, compilation
included, in a process that may find programs in the persistent cache), warm (median), and, where
the stage is matmuls, the operations that are needed and their rate. Needed operations of the sweep,
per block, are the causal, group-summed edge contraction of the rows that were kept, and the pull of
R rows through MLP and heads; "all matmuls" adds what the design recomputes there: the block itself,
the projection of the directions in use to head values, their product with the covectors. The
reference rate is that of single jitted float32 matmuls of the same inner dimensions, interleaved
with the timings and measured in the same run, weighted by operations.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np

import qkattr
from qkattr.cli.common import use_compilation_cache
from qkattr.config import SweepConfig
from qkattr.graph.backward import sweep
from qkattr.graph.targets import direct_targets, logit_covectors
from qkattr.model.transformer import forward
from qkattr.options import TraceOptions
from qkattr.qk.terms import qk_terms_many
from qkattr.sharding import pad_tokens
from qkattr.sources.prompt import decompose_prompt
from qkattr.subject import subject as open_subject

AUNT_SALLY = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
N_PLACES = 8


def timed(call):
    """`(seconds, result)` of a call, waited for."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def matmul(m: int, k: int, n: int):
    """A jitted matmul to time, and its operations."""
    a, b = jnp.ones((m, k)), jnp.ones((k, n))
    product = jax.jit(lambda a, b: jnp.dot(a, b, precision="highest"))
    jax.block_until_ready(product(a, b))
    return lambda: product(a, b), 2 * m * k * n


class Reference:
    """Plain matmuls [R, D] x [D, F], [R, F] x [F, D] and [R, KH] x [KH, T C],
    timed between the stages.
    """

    def __init__(self, config, n_positions: int, n_slots: int, rows: int):
        kh = config.n_kv_heads * config.head_dim
        shapes = [
            (rows, config.d_model, config.d_mlp),
            (rows, config.d_mlp, config.d_model),
            (rows, kh, n_positions * n_slots),
        ]
        self.calls = [matmul(*shape) for shape in shapes]
        self.seconds: list[list[float]] = [[] for _ in shapes]

    def sample(self) -> None:
        for (call, _), seconds in zip(self.calls, self.seconds, strict=True):
            seconds.append(timed(call)[0])

    def rate(self) -> float:
        """GFLOP/s over all of them."""
        total = sum(ops for _, ops in self.calls)
        return total / sum(statistics.median(s) for s in self.seconds) / 1e9


def sweep_operations(config, swept, n_real: int, n_slots: int, n_rows: int, n_directions: int):
    """`(needed, all matmuls)` of one sweep."""
    d, f, h = config.d_model, config.d_mlp, config.head_dim
    n, k, blocks = config.n_heads, config.n_kv_heads, config.n_blocks
    valid, position = np.asarray(swept.kept.valid[1:]), np.asarray(swept.kept.position[1:])
    visible = int(((position + 1) * valid).sum())  # (row, source position) pairs over all blocks
    contraction = 2 * visible * n_slots * k * h
    rows = int(valid.sum())
    pull = 2 * rows * (3 * d * f + n * h * d)
    block = 2 * n_real * (2 * d * n * h + 2 * d * k * h + 2 * d * f)
    attention = 2 * 2 * n * h * n_real * (n_real + 1) // 2
    projections = 2 * n_directions * d * k * h + 2 * n_rows * d * n_directions
    return contraction + pull, contraction + pull + blocks * (block + attention + projections)


def qk_operations(config, n_real: int, n_directions: int, n_slots: int) -> int:
    """Of one place: the head's queries, keys and scores,
    and its components' projections and products.
    """
    d, h = config.d_model, config.head_dim
    project = 2 * d * h * (2 * n_real + n_directions + 2 * n_real + n_slots)
    return project + 2 * h * n_real * (n_real + 1) // 2 + 2 * h * n_slots * (n_slots * (n_real + 1))


def bench(bundle, ids, repeat: int) -> dict:
    """All stages for one prompt length."""
    config, opts = bundle.config, TraceOptions()
    padded, n_real = pad_tokens(ids), len(ids)
    subject = open_subject(bundle, ids)
    components = subject.components
    top, tokens = jax.lax.top_k(jax.nn.softmax(subject.logits), 10)
    g, constant = logit_covectors(
        bundle.params, subject.boundaries[-1, n_real - 1], tokens, jnp.full(10, -1), cfg=config
    )
    targets = direct_targets(
        np.full(10, config.n_blocks),
        np.full(10, n_real - 1),
        g,
        constant,
        top / top.sum(),
        padded_to=16,
    )
    rng = np.random.default_rng(0)
    query = rng.integers(0, n_real, N_PLACES)
    places = jnp.asarray(
        np.stack(
            [
                rng.integers(0, config.n_blocks, N_PLACES),
                rng.integers(0, config.n_heads, N_PLACES),
                query,
                rng.integers(0, query + 1),
            ],
            1,
        )
    )
    calls = {
        "forward": lambda: forward(
            bundle.params, jnp.asarray(padded), cfg=config, capture=("boundaries",)
        ),
        "encode": lambda: decompose_prompt(
            bundle.params, bundle.dictionaries, subject.boundaries, padded, n_real=n_real
        ),
        "sweep": lambda: sweep(
            bundle.params.blocks,
            subject.boundaries,
            components,
            targets,
            cfg=config.block,
            config=SweepConfig(),
        ),
        "qk": lambda: qk_terms_many(
            bundle.params.blocks, subject.boundaries, components, places, cfg=config.block
        ),
        "trace, whole": lambda: qkattr.trace(bundle, list(ids)).graph.edges.weight,
    }
    cold = {name: timed(call) for name, call in calls.items()}
    reference = Reference(config, len(padded), components.kind.shape[-1], opts.max_rows)
    warm = {name: [] for name in calls}
    for _ in range(repeat):
        for name, call in calls.items():
            reference.sample()
            warm[name].append(timed(call)[0])
    directions = int(np.asarray((components.rows != 0).any(-1)).sum(1).mean())
    swept = cold["sweep"][1]
    n_slots = components.kind.shape[-1]
    needed, everything = sweep_operations(config, swept, n_real, n_slots, opts.max_rows, directions)
    operations = {
        "sweep": needed,
        "sweep, all matmuls": everything,
        "qk": N_PLACES * qk_operations(config, n_real, directions, n_slots),
    }
    report = {
        "tokens": n_real,
        "bucket": len(padded),
        "rows kept": int(np.asarray(swept.kept.valid).sum()),
        "reference": reference.rate(),
        "stages": {},
    }
    for name, seconds in warm.items():
        report["stages"][name] = dict(cold=cold[name][0], warm=statistics.median(seconds))
    for name, ops in operations.items():
        seconds = report["stages"][name.split(",")[0]]["warm"]
        rate = ops / seconds / 1e9
        report["stages"].setdefault(name, dict(warm=seconds)).update(
            gflop=ops / 1e9, rate=rate, share=rate / report["reference"]
        )
    return report


def show(report: dict) -> None:
    """One prompt length as a table."""
    print(
        f"\n{report['tokens']} tokens (bucket {report['bucket']}), "
        f"{report['rows kept']} nodes kept; reference {report['reference']:.0f} GFLOP/s"
    )
    print(f"{'stage':22}{'cold s':>9}{'warm s':>9}{'GFLOP':>9}{'GFLOP/s':>9}{'of ref.':>9}")
    for name, s in report["stages"].items():
        cells = [f"{s[k]:9.3f}" if k in s else " " * 9 for k in ("cold", "warm")]
        cells += (
            [f"{s['gflop']:9.2f}{s['rate']:9.1f}{100 * s['share']:8.0f}%"] if "gflop" in s else []
        )
        print(f"{name:22}{''.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[15, 64, 256])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    use_compilation_cache()
    start = time.perf_counter()
    bundle = qkattr.load("smollm2", "smollm2")
    jax.block_until_ready(bundle.params)
    load = time.perf_counter() - start
    print(f"load {load:.1f} s; {jax.devices()[0].device_kind}, jax {jax.__version__}")
    text = resources.files("qkattr").joinpath("sample.txt").read_text(encoding="utf-8")
    long, short = bundle.tokenize(text)[0], bundle.tokenize(AUNT_SALLY)[0]
    reports = []
    for n in args.tokens:
        reports.append(bench(bundle, short if n == len(short) else long[:n], args.repeat))
        show(reports[-1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak resident memory {peak:.2f} GiB")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(dict(load=load, peak_gib=peak, reports=reports), f, indent=1)


if __name__ == "__main__":
    main()
