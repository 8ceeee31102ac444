"""What a feature is: the contexts of a token file that activate it most.

    python docs/contexts.py BOUNDARY:FEATURE ... [--rows 600] [--top 8]

Reads rows of $QKATTR_SHARED/smollm2/tokens.npy (each begins with a BOS), runs the model and prints,
for each feature, its density and strongest contexts, the activating token in brackets.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import qkattr
from qkattr.model.forward import residual_stream
from qkattr.sources.dictionary import activations

BATCH = 8


@partial(jax.jit, static_argnames=("cfg", "wanted"))
def stream(params, tokens, *, cfg, wanted):
    """`[B, len(wanted), T, D]` residual streams at the wanted boundaries."""

    def one(row):
        _, trace = residual_stream(params, row, cfg=cfg, capture=("boundaries",))
        return trace.boundaries[jnp.array(wanted)]

    return jax.vmap(one)(tokens)


@jax.jit
def chosen(dictionary, x, features):
    """`[B, T, X]` activations of the chosen features; position 0 does not count."""
    flat = activations(dictionary, x.reshape(-1, x.shape[-1]))[:, features]
    return flat.reshape(*x.shape[:2], -1).at[:, 0].set(0.0)


def context(bundle, row, t: int) -> str:
    """Ten tokens around position t."""
    text = [bundle.tokenizer.token(int(i)).replace("\n", "⏎") for i in row]
    return "".join(text[max(1, t - 9) : t]) + f"[{text[t]}]" + "".join(text[t + 1 : t + 4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", nargs="+", metavar="BOUNDARY:FEATURE")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--top", type=int, default=8)
    args = parser.parse_args()
    asked = defaultdict(list)
    for name in args.features:
        boundary, feature = name.split(":")
        asked[int(boundary)].append(int(feature))
    bundle = qkattr.load("smollm2", "smollm2")
    shared = Path(os.environ.get("QKATTR_SHARED") or "../shared")
    tokens = np.load(shared / "smollm2" / "tokens.npy", mmap_mode="r")
    rows = np.random.default_rng(0).choice(len(tokens), args.rows // BATCH * BATCH, replace=False)
    wanted = tuple(sorted(asked))
    found = {b: [] for b in wanted}
    for batch in rows.reshape(-1, BATCH):
        x = stream(
            bundle.params, jnp.asarray(tokens[batch], jnp.int32), cfg=bundle.config, wanted=wanted
        )
        for i, b in enumerate(wanted):
            a = chosen(bundle.dictionaries[b], x[:, i], np.array(asked[b]))
            found[b].append(np.asarray(a))
    for b in wanted:
        a = np.concatenate(found[b])
        for i, feature in enumerate(asked[b]):
            best = np.argsort(-a[..., i].max(1))[: args.top]
            print(f"\n{b}:{feature}  active on {100 * (a[:, 1:, i] > 0).mean():.2f} % of positions")
            for r in best:
                t = int(a[r, :, i].argmax())
                if a[r, t, i] > 0:
                    print(f"  {a[r, t, i]:6.2f}  {context(bundle, tokens[rows[r]], t)}")


if __name__ == "__main__":
    main()
