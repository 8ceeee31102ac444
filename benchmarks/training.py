"""Tokens a second of training every boundary at once, beside the same loop in PyTorch.

    python benchmarks/training.py [--repeat 5]

Both train TopK SAEs (width 2304, k 32) after all 30 blocks of SmolLM2 on the same rows, in float32,
each in a process of its own, a step of the one and a step of the other in turn; medians are
printed, and their ratio. The PyTorch loop is the plain one: the model's forward by transformers,
dense encoder and decoder, autograd, the gradient's part along unit rows removed, clipping, Adam,
rows rescaled, features that fired noted. In neither does a feature die in so few steps, so that
neither pays the auxiliary loss. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time

import numpy as np

ROWS, ROW, WIDTH, K = 16, 128, 2304, 32
TOKENS = ROWS * (ROW - 1)


class TorchLoop:
    """A step: forward without gradient, then every boundary's SAE."""

    def __init__(self, rows: np.ndarray):
        import torch
        import transformers

        from qkattr.load.opening import load

        self.torch, self.rows = torch, rows
        torch.set_num_threads(2)
        c = load("smollm2").config
        # Speed does not depend on the weights' values: random ones serve.
        config = transformers.LlamaConfig(
            hidden_size=c.d_model, intermediate_size=c.d_mlp, num_hidden_layers=c.n_blocks,
            num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, vocab_size=c.vocab,
            rms_norm_eps=c.block.eps, tie_word_embeddings=True,
        )  # fmt: skip
        self.model = transformers.LlamaModel(config).eval()
        w = torch.nn.functional.normalize(torch.randn(WIDTH, c.d_model), dim=1)
        self.saes = [
            [t.clone().requires_grad_() for t in (w, w, torch.zeros(WIDTH), torch.zeros(c.d_model))]
            for _ in range(c.n_blocks)
        ]
        self.adam = [torch.optim.Adam(sae, lr=1e-4) for sae in self.saes]
        self.silent = torch.zeros(c.n_blocks, WIDTH)

    def step(self, i: int) -> tuple[float, float]:
        torch = self.torch
        began = time.perf_counter()
        with torch.no_grad():
            ids = torch.as_tensor(self.rows[i * ROWS : (i + 1) * ROWS])
            states = self.model(ids, output_hidden_states=True).hidden_states[1:]
        middle = time.perf_counter()
        for sae, adam, silent, x in zip(self.saes, self.adam, self.silent, states, strict=True):
            w_enc, w_dec, b_enc, b_dec = sae
            x = x[:, 1:].reshape(-1, x.shape[-1])
            v, index = ((x - b_dec) @ w_enc.T + b_enc).topk(K, dim=-1)
            a = torch.zeros(len(x), WIDTH).scatter(1, index, v.relu())
            loss = (x - a @ w_dec - b_dec).square().mean()
            adam.zero_grad()
            loss.backward()
            with torch.no_grad():
                g = w_dec.grad
                g -= (g * w_dec).sum(1, keepdim=True) * w_dec
                torch.nn.utils.clip_grad_norm_(sae, 1.0)
                adam.step()
                w_dec /= w_dec.norm(dim=1, keepdim=True)
                silent += len(x)
                silent[(a > 0).any(0)] = 0
        return middle - began, time.perf_counter() - middle


class JaxLoop:
    """A step of `qkattr train`: the stream's batch, then every boundary's step."""

    def __init__(self, rows: np.ndarray):
        from qkattr.load.opening import load
        from qkattr.train.config import TrainConfig
        from qkattr.train.parts import Parts
        from qkattr.train.run import _fresh
        from qkattr.train.step import init_state
        from qkattr.train.stream import Stream

        model = load("smollm2")
        self.cfg = TrainConfig(
            width=WIDTH, k=K, tokens=10**8, batch=TOKENS, buffer=ROWS, row=ROW, lr=1e-4
        )
        self.stream = Stream(model.params, rows, model.config, self.cfg)
        mean, _ = self.stream.measure()
        state = init_state(_fresh(model.config, self.cfg, mean), cfg=self.cfg)
        self.parts = Parts(state, cfg=self.cfg, at_once=False)

    def step(self, i: int) -> tuple[float, float]:
        import jax

        began = time.perf_counter()
        x, weight = jax.block_until_ready(self.stream.batch(i))
        middle = time.perf_counter()
        jax.block_until_ready(self.parts.step(x, weight))
        return middle - began, time.perf_counter() - middle


def serve(loop: type, rows: np.ndarray, pipe) -> None:
    """Run the steps that are asked for, until None is; then say the peak memory in GiB."""
    worker = loop(rows)
    while (i := pipe.recv()) is not None:
        pipe.send(worker.step(i))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    # The speed does not depend on what the rows say.
    rows = np.random.default_rng(0).integers(1, 49152, (ROWS * (repeat + 3), ROW))
    rows[:, 0] = 0
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, loop in (("jax", JaxLoop), ("torch", TorchLoop)):
        pipes[name], other = spawn.Pipe()
        processes.append(spawn.Process(target=serve, args=(loop, rows, other), daemon=True))
        processes[-1].start()
        other.close()  # so that a worker that ends is noticed
        pipes[name].send(0)  # compiles
        pipes[name].recv()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pipes}
    for i in range(1, repeat + 2):
        for name, pipe in pipes.items():
            pipe.send(i)
            times[name].append(pipe.recv())
    found: dict = {}
    for name, pipe in pipes.items():
        pipe.send(None)
        forward, saes = (statistics.median(column) for column in zip(*times[name][1:], strict=True))
        found[name] = dict(
            tokens_per_second=round(TOKENS / (forward + saes), 1),
            forward_s=round(forward, 2),
            saes_s=round(saes, 2),
            peak_gib=round(pipe.recv(), 2),
        )
    jax, torch = found["jax"], found["torch"]
    found["ratio"] = round(jax["tokens_per_second"] / torch["tokens_per_second"], 2)
    found["saes_over_forward"] = round(jax["saes_s"] / jax["forward_s"], 2)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
