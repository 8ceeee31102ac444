"""Tokens a second of training every boundary at once, beside the same loop in PyTorch.

    python benchmarks/training.py [--repeat 3]

Both train TopK SAEs (width 2304, k 32) after all 30 blocks of SmolLM2 on the same rows, in float32,
interleaved; medians are printed, and their ratio. The PyTorch loop is the plain one: the model's
forward by transformers, dense encoder and decoder, autograd, Adam, unit rows, auxiliary loss left
out. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from qkattr.load.bundle import load
from qkattr.train.config import TrainConfig
from qkattr.train.run import _fresh
from qkattr.train.step import init_state, train_step
from qkattr.train.stream import Stream

ROWS, ROW, WIDTH, K = 16, 128, 2304, 32


def torch_model(bundle):
    import torch
    import transformers

    c, p = bundle.config, bundle.params
    config = transformers.LlamaConfig(
        hidden_size=c.d_model, intermediate_size=c.d_mlp, num_hidden_layers=c.n_blocks,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, vocab_size=c.vocab,
        rms_norm_eps=c.block.eps, tie_word_embeddings=True,
    )  # fmt: skip
    # Speed does not depend on the weights' values: random ones serve.
    del p
    return transformers.LlamaModel(config).eval(), torch


class TorchLoop:
    """One step: forward without gradient, then every boundary's SAE."""

    def __init__(self, bundle):
        self.model, self.torch = torch_model(bundle)
        torch = self.torch
        torch.set_num_threads(2)
        d = bundle.config.d_model
        w = torch.nn.functional.normalize(torch.randn(WIDTH, d), dim=1)
        self.saes = [
            [t.clone().requires_grad_() for t in (w, w, torch.zeros(WIDTH), torch.zeros(d))]
            for _ in range(bundle.config.n_blocks)
        ]
        self.adam = [torch.optim.Adam(sae, lr=1e-4) for sae in self.saes]

    def step(self, tokens):
        torch = self.torch
        began = time.perf_counter()
        with torch.no_grad():
            ids = torch.as_tensor(np.asarray(tokens, np.int64))
            states = self.model(ids, output_hidden_states=True).hidden_states[1:]
        middle = time.perf_counter()
        for sae, adam, x in zip(self.saes, self.adam, states, strict=True):
            w_enc, w_dec, b_enc, b_dec = sae
            x = x[:, 1:].reshape(-1, x.shape[-1])
            v, index = ((x - b_dec) @ w_enc.T + b_enc).topk(K, dim=-1)
            a = torch.zeros(len(x), WIDTH).scatter(1, index, v.relu())
            loss = (x - a @ w_dec - b_dec).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                w_dec /= w_dec.norm(dim=1, keepdim=True)
        return middle - began, time.perf_counter() - middle


class JaxLoop:
    def __init__(self, bundle, rows):
        self.cfg = TrainConfig(
            width=WIDTH, k=K, tokens=10**8, batch=ROWS * (ROW - 1), buffer=ROWS, row=ROW, lr=1e-4
        )
        self.stream = Stream(bundle.params, rows, bundle.config, self.cfg)
        mean, _ = self.stream.measure()
        self.state = init_state(_fresh(bundle.config, self.cfg, mean), cfg=self.cfg)
        self.done = 0

    def step(self):
        began = time.perf_counter()
        x, weight = jax.block_until_ready(self.stream.batch(self.done))
        middle = time.perf_counter()
        self.state, seen = train_step(self.state, x, weight, cfg=self.cfg, at_once=False)
        jax.block_until_ready(seen.loss)
        self.done += 1
        return middle - began, time.perf_counter() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    bundle = load("smollm2")
    rng = np.random.default_rng(0)
    rows = rng.integers(1, bundle.config.vocab, (ROWS * (repeat + 3), ROW))
    rows[:, 0] = 0
    mine, theirs = JaxLoop(bundle, rows), TorchLoop(bundle)
    a, b = jnp.zeros((2048, 576)), jnp.zeros((576, WIDTH))
    matmul = jax.jit(lambda a, b: a @ b)
    times: dict[str, list] = {"jax": [], "torch": [], "matmul": []}
    for i in range(repeat + 1):
        for name, step in (
            ("jax", mine.step),
            ("torch", lambda i=i: theirs.step(rows[i * ROWS : (i + 1) * ROWS])),
        ):
            taken = step()
            if i:  # the first one compiles
                times[name].append(taken)
        began = time.perf_counter()
        jax.block_until_ready(matmul(a, b))
        times["matmul"].append(time.perf_counter() - began)
    tokens = ROWS * (ROW - 1)
    found = {}
    for name in ("jax", "torch"):
        forward, saes = (statistics.median(column) for column in zip(*times[name], strict=True))
        found[name] = dict(
            tokens_per_second=round(tokens / (forward + saes), 1),
            forward_s=round(forward, 2),
            saes_s=round(saes, 2),
        )
    rate = 2 * 2048 * 576 * WIDTH / statistics.median(times["matmul"][1:]) / 1e9
    found["ratio"] = round(
        found["jax"]["tokens_per_second"] / found["torch"]["tokens_per_second"], 2
    )
    found["saes_over_forward"] = round(found["jax"]["saes_s"] / found["jax"]["forward_s"], 2)
    found["matmul_gflops"] = round(rate, 1)
    found["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
