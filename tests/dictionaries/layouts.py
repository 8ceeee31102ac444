"""SAEs written as each publisher lays them out, and what that publisher's own code computes.

`CASES[name](folder, rng)` writes one SAE below a folder and returns `(pipeline, options)`:
`pipeline(x)` gives activations and reconstruction in float64, a line for each of the publisher's.
"""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save_file

D, M, K = 8, 24, 5


def weights(rng, threshold=0.3):
    """W_enc `[D, M]`, W_dec `[M, D]` of uneven norms, biases, thresholds."""
    return dict(
        W_enc=rng.normal(size=(D, M)).astype(np.float32),
        W_dec=(rng.normal(size=(M, D)) * rng.uniform(0.5, 2, (M, 1))).astype(np.float32),
        b_enc=(0.3 * rng.normal(size=M)).astype(np.float32),
        b_dec=(0.3 * rng.normal(size=D)).astype(np.float32),
        threshold=(threshold + rng.uniform(size=M)).astype(np.float32),
    )


def wide(w):
    return {name: np.float64(value) for name, value in w.items()}


def relu(x):
    return np.maximum(x, 0)


def top(pre, k, by=None):
    """The k largest of each row, then relu."""
    by = pre if by is None else by
    keep = np.argsort(-by, axis=1)[:, :k]
    out = np.zeros_like(pre)
    np.put_along_axis(out, keep, relu(np.take_along_axis(pre, keep, 1)), 1)
    return out


def put(folder, name, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / name)


def put_json(folder, name, value):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))


def put_torch(folder, name, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({n: as_torch(t) for n, t in tensors.items()}, folder / name)


def as_torch(t):
    if getattr(t, "dtype", None) == ml_dtypes.bfloat16:
        return torch.tensor(t.astype(np.float32)).to(torch.bfloat16)
    return torch.tensor(np.ascontiguousarray(t) if np.ndim(t) else t)


# Gemma Scope


def jumprelu(w, factor=1.0, out=1.0):
    w = wide(w)

    def pipeline(x):
        pre = (x * factor) @ w["W_enc"] + w["b_enc"]
        a = relu(pre) * (pre > w["threshold"])
        return a, a @ w["W_dec"] * out + w["b_dec"]

    return pipeline


def gemma_scope(folder, rng, lower=False, save=np.savez, at="layer_1/width_16k/average_l0_105"):
    w = weights(rng)
    (folder / at).mkdir(parents=True)
    stored = {(n.lower() if lower else n): t for n, t in w.items()}
    save(folder / at / "params.npz", **stored)
    root = math.sqrt(D)
    return jumprelu(w, 1 / root, root) if at.startswith("embedding") else jumprelu(w)


def gemma_scope_2(folder, rng, config=True, site="resid_post_all", layer=1, **said):
    w, at = weights(rng), folder / site / f"layer_{layer}_width_16k_l0_small"
    put(at, "params.safetensors", {n.lower(): t for n, t in w.items()})
    if config:
        point = f"model.layers.{layer}.output"
        put_json(at, "config.json", dict(
            width=16384, model_name="google/gemma-3-270m-pt", architecture="jump_relu", l0=20,
            affine_connection=False, hf_hook_point_in=point, hf_hook_point_out=point, type="sae",
        ) | said)  # fmt: skip
    return jumprelu(w)


# Llama Scope


def open_moss(w, *, norm=None, token_wise=False, by_norm=True, act="jumprelu", bias=True, scale=1):
    """`normalize_activations`, `encode`, `decode`, `denormalize_activations` of llamascopium."""
    w = wide(w)
    sizes = np.linalg.norm(w["W_dec"], axis=1) if by_norm else np.ones(M)

    def pipeline(x):
        c = 1.0 if norm is None else math.sqrt(D) / norm
        if token_wise:
            c = math.sqrt(D) / np.linalg.norm(x, axis=1, keepdims=True)
        hidden = ((x * c) @ w["W_enc"] + w["b_enc"]) * sizes
        if act == "jumprelu":
            a = hidden * (hidden > w["threshold"] * scale)
        else:
            a = top(hidden, K) if act == "topk" else relu(hidden)
        a = a / sizes
        return a, (a @ w["W_dec"] + (w["b_dec"] if bias else 0)) / c

    return pipeline


HOOK = "blocks.1.hook_resid_post"


def linear(w):
    return {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"],
            "decoder.weight": w["W_dec"].T, "decoder.bias": w["b_dec"]}  # fmt: skip


def llama_scope(folder, rng, saelens=False, site="R", layer=1, into=HOOK, out=None):
    w, norm = weights(rng), 5.0
    at = folder / f"Llama3_1-8B-Base-L{layer}{site}-8x"
    put(at, "checkpoints/final.safetensors", linear(w))
    put_json(at, "hyperparams.json", dict(
        d_model=D, d_sae=M, hook_point_in=into, hook_point_out=out or into, act_fn="jumprelu",
        jump_relu_threshold=0.7, norm_activation="dataset-wise", top_k=50,
        dataset_average_activation_norm={"in": norm, "out": norm}, use_decoder_bias=True,
        apply_decoder_bias_to_pre_encoder=False, sparsity_include_decoder_norm=True,
    ))  # fmt: skip
    c = math.sqrt(D) / norm
    if saelens:
        (folder / "qkattr.toml").write_text('llama_scope_threshold = "saelens"\n')
        w["threshold"] = np.full(M, 0.7)
        return open_moss(w, norm=norm, by_norm=False, scale=c)
    w = wide(w)
    sizes = np.linalg.norm(w["W_dec"], axis=1)

    def pipeline(x):
        """`standardize_parameters_of_dataset_norm`, `transform_to_unit_decoder_norm`, and then the
        threshold, which is to the features what multiplies rows of norm 1."""
        hidden = (x @ w["W_enc"] + w["b_enc"] / c) * sizes
        written = hidden * (hidden > 0.7)
        return written / sizes * c, written @ (w["W_dec"].T / sizes).T + w["b_dec"] / c

    return pipeline


def r1_distill(folder, rng):
    w, norm, at = weights(rng), 4.0, folder / "L1R"
    stored = linear(w) | {"log_jumprelu_threshold": np.log(w["threshold"])}
    for side in ("in", "out"):
        stored[f"dataset_average_activation_norm.{side}"] = np.float32(norm)
    put(at, "sae_weights.safetensors", stored)
    put_json(at, "config.json", dict(d_model=D, expansion_factor=M // D, hook_point_in=HOOK,
                                     act_fn="jumprelu", norm_activation="dataset-wise",
                                     sparsity_include_decoder_norm=False))  # fmt: skip
    return open_moss(w, norm=norm, by_norm=False)


def llamascopium(folder, rng, act="jumprelu", norm="dataset-wise", by_norm=True, bias=True):
    w, average, at = weights(rng), 6.0, folder / "L1"
    names = {"W_E": "W_enc", "W_D": "W_dec", "b_E": "b_enc", "b_D": "b_dec"}
    stored = {n: w[s] for n, s in names.items() if bias or n != "b_D"}
    if act == "jumprelu":
        stored["activation_function.log_jumprelu_threshold"] = np.log(w["threshold"])
    stored[f"dataset_average_activation_norm.{HOOK}"] = np.float32(average)
    put(at, "sae_weights.safetensors", stored)
    put_json(at, "config.json", dict(
        sae_type="sae", d_model=D, expansion_factor=float(M // D), hook_point_in=HOOK,
        hook_point_out=HOOK, act_fn=act, top_k=K, norm_activation=norm, use_decoder_bias=bias,
        sparsity_include_decoder_norm=by_norm,
    ))  # fmt: skip
    norms = dict(norm=average if norm == "dataset-wise" else None, token_wise=norm == "token-wise")
    return open_moss(w, act=act, by_norm=by_norm, bias=bias, **norms)


# sparsify


def sparsify(folder, rng, hookpoint="layers.1", latents=M, **said):
    w = weights(rng)
    stored = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"],
              "W_dec": w["W_dec"], "b_dec": w["b_dec"]}  # fmt: skip
    put(folder / hookpoint, "sae.safetensors", stored)
    put_json(folder / hookpoint, "cfg.json", dict(
        activation="topk", expansion_factor=M // D, normalize_decoder=True, num_latents=latents,
        k=K, multi_topk=False, skip_connection=False, transcode=False, d_in=D,
    ) | said)  # fmt: skip
    w = wide(w)

    def pipeline(x):
        pre = relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
        a = top(pre, K)
        return a, a @ w["W_dec"] + w["b_dec"]

    return pipeline


# dictionary_learning


def dictionary_learning(
    folder, rng, kind, dtype=np.float32, at="resid_post_layer_1/trainer_0", layer=1, **said
):
    w = {n: t.astype(dtype) for n, t in weights(rng).items()}
    rest = {n: rng.normal(size=M).astype(dtype) for n in ("gate_bias", "mag_bias", "r_mag")}
    linear = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T}
    plain = {n: w[n] for n in ("W_enc", "W_dec", "b_enc", "b_dec")}
    one = dict(k=K, threshold=np.float32(0.4))
    stored = {
        "AutoEncoder": linear | {"encoder.bias": w["b_enc"], "bias": w["b_dec"]},
        "AutoEncoderNew": linear | {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]},
        "GatedAutoEncoder": linear | rest | {"decoder_bias": w["b_dec"]},
        "JumpReluAutoEncoder": plain | {"threshold": w["threshold"]},
        "AutoEncoderTopK": linear | {"encoder.bias": w["b_enc"], "b_dec": w["b_dec"]} | one,
        "BatchTopKSAE": linear | {"encoder.bias": w["b_enc"], "b_dec": w["b_dec"]} | one,
        "MatryoshkaBatchTopKSAE": plain | one | {"group_sizes": np.array([M // 2, M // 2])},
    }[kind]
    put_torch(folder / at, "ae.pt", stored)
    trainer = dict(dict_class=kind, activation_dim=D, dict_size=M, k=K, layer=layer,
                   lm_name="tiny", submodule_name=at.split("/")[0]) | said  # fmt: skip
    trainer = {n: v for n, v in trainer.items() if v is not None}
    put_json(folder / at, "config.json", dict(trainer=trainer, buffer=dict(ctx_len=128)))
    w, rest = wide(w), wide(rest)

    def pipeline(x):
        y = x if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - w["b_dec"]
        read = y @ w["W_enc"]
        pre = read + w["b_enc"]
        if kind == "GatedAutoEncoder":
            gate = read + rest["gate_bias"] > 0
            a = gate * relu(np.exp(rest["r_mag"]) * read + rest["mag_bias"])
        elif kind == "JumpReluAutoEncoder":
            a = relu(pre * (pre > w["threshold"]))
        elif kind == "AutoEncoderTopK":
            a = top(relu(pre), K)
        elif kind.endswith("SAE"):
            a = relu(pre) * (relu(pre) > 0.4)
        else:
            a = relu(pre)
        return a, a @ w["W_dec"] + w["b_dec"]

    return pipeline


def qwen_scope(folder, rng, dtype=np.float32, at=f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}", **said):
    """`said`: the set's config.json, which is left out where it is empty."""
    w = {n: t.astype(dtype) for n, t in weights(rng).items()}
    stored = dict(W_enc=w["W_enc"].T, W_dec=w["W_dec"].T, b_enc=w["b_enc"], b_dec=w["b_dec"])
    put_torch(folder / at, "layer1.sae.pt", stored)
    if said:
        put_json(folder / at, "config.json", said)
    w = wide(w)

    def pipeline(x):
        a = top(x @ w["W_enc"] + w["b_enc"], K)
        return a, a @ w["W_dec"] + w["b_dec"]

    return pipeline


def saelens(folder, rng, hook="blocks.1.hook_resid_post", at=None, **said):
    """A ReLU SAE of SAELens 6; `said` goes into its config, None taking out."""
    w = weights(rng)
    w.pop("threshold")
    at = folder / (at or hook)
    put(at, "sae_weights.safetensors", w)
    config = dict(architecture="standard", d_in=D, d_sae=M, normalize_activations="none",
                  metadata=dict(hook_name=hook, model_name="tiny"))  # fmt: skip
    put_json(at, "cfg.json", {n: v for n, v in (config | said).items() if v is not None})
    w = wide(w)

    def pipeline(x):
        a = relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
        return a, a @ w["W_dec"] + w["b_dec"]

    return pipeline


QWEN = dict(model_type="topk_sae", base_model="Qwen/Qwen3-1.7B-Base", d_model=D, d_sae=M, k=K,
            num_layers=28, hook_point="resid_post", dtype="float32")  # fmt: skip


def two_layers(folder, rng, name="Llama-3.1-8B-Instruct-SAE-l1.pth", tail="_linear", half=False):
    """Goodfire's, or without the tail qresearch's."""
    kind = ml_dtypes.bfloat16 if half else np.float32
    w = {n: t.astype(kind) for n, t in weights(rng).items()}
    put_torch(folder, name, {
        f"encoder{tail}.weight": w["W_enc"].T, f"encoder{tail}.bias": w["b_enc"],
        f"decoder{tail}.weight": w["W_dec"].T, f"decoder{tail}.bias": w["b_dec"],
    })  # fmt: skip
    w = wide(w)

    def pipeline(x):
        a = relu(x @ w["W_enc"] + w["b_enc"])
        return a, a @ w["W_dec"] + w["b_dec"]

    return pipeline


def case(write, **how):
    return lambda folder, rng: write(folder, rng, **how)


CLASSES = ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder",
           "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")  # fmt: skip
CASES = {
    "saelens": saelens,
    "saelens, of transformers": case(saelens, hook="model.layers.1"),
    "gemma scope": gemma_scope,
    "gemma scope, lowercase": case(gemma_scope, lower=True),
    "gemma scope, compressed": case(gemma_scope, save=np.savez_compressed),
    "gemma scope, embedding": case(gemma_scope, at="embedding/width_4k/average_l0_6"),
    "gemma scope 2": gemma_scope_2,
    "gemma scope 2, no config": case(gemma_scope_2, config=False),
    "llama scope": llama_scope,
    "llama scope, as saelens": case(llama_scope, saelens=True),
    "r1 distill": r1_distill,
    "llamascopium": llamascopium,
    "llamascopium, plain gate": case(llamascopium, by_norm=False),
    "llamascopium, topk": case(llamascopium, act="topk", norm="token-wise"),
    "llamascopium, relu": case(llamascopium, act="relu", norm="inference", bias=False),
    "sparsify": sparsify,
    "sparsify, expansion": case(sparsify, hookpoint="transformer.h.1", latents=0),
    **{f"dictionary_learning, {c}": case(dictionary_learning, kind=c) for c in CLASSES},
    "dictionary_learning, half": case(
        dictionary_learning, kind="BatchTopKSAE", dtype=ml_dtypes.bfloat16
    ),
    "qwen scope": qwen_scope,
    "qwen scope, config": case(qwen_scope, at="here", **QWEN),
    "goodfire": two_layers,
    "qresearch": case(
        two_layers, name="DeepSeek-R1-Distill-Llama-8B-SAE-l1.pt", tail="", half=True
    ),
    "qwen scope, float16": case(qwen_scope, dtype=np.float16),
}
