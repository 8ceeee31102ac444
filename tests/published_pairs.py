"""Published models with their SAEs, laid out in a cache of the hub: the names of files and of
tensors, the types, attributes and tokenizer files are the published ones; the sizes are small and
the weights random.

Every model has as many blocks as the published one, and every set as many SAEs.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import published_models
import torch
from published_models import PUBLISHED, D
from safetensors.numpy import load_file, save_file

from qkattr.load.registry import registry

M, CONTEXT, COMMIT = 64, 64, "a" * 40
BLOCKS = {"pythia-70m": 6, "pythia-70m-deduped": 6, "gpt2": 12, "gemma-2-2b": 26,
          "gemma-3-270m": 18, "qwen3-1.7b-base": 28, "llama-3.1-8b": 32}  # fmt: skip
FACTS = Path(__file__).parent / "published" / "saes"
TYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}
Tensors = dict[str, np.ndarray]


def snapshot(cache: Path, repo: str) -> Path:
    """Where the files of a repository lie in the cache."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    for name in ("refs", "blobs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


# Models


@dataclasses.dataclass(frozen=True)
class Model:
    """repo: the published one. like: whose config it has, `changes` made. tokens: the special ones,
    by their ids here. ids: attributes of the config that are ids of tokens. first: the token that
    tokenizer.json puts before a text. files: beside config.json."""

    repo: str
    like: str
    dtype: type
    tokens: tuple[str, ...]
    files: dict[str, Any]
    ids: dict[str, Any]
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    first: str | None = None
    shards: int = 1
    edit: Callable[[Tensors], Tensors] = lambda tensors: tensors

    def write(self, cache: Path) -> Path:
        folder = snapshot(cache, self.repo)
        self._write_tokenizer(folder)
        _write_weights(folder, self.edit(self._made()), self.shards, self.dtype)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder

    @property
    def config(self) -> dict[str, Any]:
        """As published but for sizes and ids of tokens."""
        said = PUBLISHED[self.like]["files"]["config.json"] | self.changes
        small = published_models.shrunk(said)
        sizes = {"num_hidden_layers": None, "n_layer": None, "layer_types": None}
        sizes |= {"vocab_size": 256 + len(self.tokens)}
        sizes |= dict(max_position_embeddings=None, n_positions=CONTEXT, n_ctx=CONTEXT)
        kept = {n: said[n] if size is None else size for n, size in sizes.items() if n in said}
        return small | kept | self.ids

    def _made(self) -> Tensors:
        with tempfile.TemporaryDirectory() as folder:
            published_models.write_model(Path(folder), self.config | {"torch_dtype": "float32"})
            return load_file(Path(folder) / "model.safetensors")

    def _write_tokenizer(self, folder: Path) -> None:
        named = [dict(id=i, content=token) for i, token in enumerate(self.tokens)]
        single = [{"SpecialToken": {"id": self.first}}] if self.first else []
        tokenizer = dict(added_tokens=named, post_processor={"single": single})
        published_models.write_tokenizer(folder, dict(files=self.files, tokenizer=tokenizer))


def _write_weights(folder: Path, tensors: Tensors, shards: int, dtype: type) -> None:
    tensors = {n: t.astype(dtype) if t.dtype == np.float32 else t for n, t in tensors.items()}
    if shards == 1:
        return save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    index: dict[str, Any] = dict(metadata={"total_size": 1}, weight_map={})
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _pythia(mask: type) -> Callable[[Tensors], Tensors]:
    """With the buffers that older versions of transformers saved. mask: their type of masks."""

    def edit(tensors: Tensors) -> Tensors:
        for layer in range(6):
            at = f"gpt_neox.layers.{layer}.attention"
            tensors[f"{at}.bias"] = np.tril(np.ones((1, 1, CONTEXT, CONTEXT), mask))
            tensors[f"{at}.masked_bias"] = np.asarray(-np.inf, np.float32)  # -1e9 in float16
            tensors[f"{at}.rotary_emb.inv_freq"] = np.ones(1, np.float32)
        return tensors

    return edit


def _gpt2(tensors: Tensors) -> Tensors:
    """GPT-2's names have no prefix, and its masks lie among them."""
    tensors = {n.removeprefix("transformer."): t for n, t in tensors.items() if "lm_head" not in n}
    mask = np.tril(np.ones((1, 1, CONTEXT, CONTEXT), np.float32))
    return tensors | {f"h.{layer}.attn.bias": mask for layer in range(12)}


def _qwen(tensors: Tensors) -> Tensors:
    """Tied, and the embedding lies in the file twice."""
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


END = "<|endoftext|>"
GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_GEMMA_FILES = {
    "generation_config.json": dict(_from_model_config=True, bos_token_id=2, eos_token_id=1),
    "tokenizer_config.json": dict(
        add_bos_token=True, add_eos_token=False, bos_token="<bos>", eos_token="<eos>",
        pad_token="<pad>", unk_token="<unk>", tokenizer_class="GemmaTokenizer",
        added_tokens_decoder={str(i): dict(content=t, special=True) for i, t in enumerate(GEMMA)},
    ),
    "special_tokens_map.json": {"bos_token": dict(content="<bos>"), "eos_token": "<eos>"},
}  # fmt: skip
_NEOX_FILES = {
    "tokenizer_config.json": dict(
        unk_token=END, bos_token=END, eos_token=END, add_prefix_space=False,
        special_tokens_map_file="special_tokens_map.json", name_or_path="EleutherAI/gpt-neox-20b",
        tokenizer_class="GPTNeoXTokenizer",
    ),
    "special_tokens_map.json": dict(bos_token=END, eos_token=END, unk_token=END),
}  # fmt: skip
_SIX = dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_hidden_layers=6)


def pythia(name: str, mask: type) -> Model:
    return Model(
        repo=f"EleutherAI/{name}", like="EleutherAI/pythia-14m", dtype=np.float16,
        tokens=(END, "<|padding|>"), files=_NEOX_FILES, ids=dict(bos_token_id=0, eos_token_id=0),
        changes=_SIX, edit=_pythia(mask),
    )  # fmt: skip


MODELS = {
    "pythia-70m": pythia("pythia-70m", np.uint8),
    "pythia-70m-deduped": pythia("pythia-70m-deduped", np.bool_),
    "gpt2": Model(
        repo="openai-community/gpt2", like="openai-community/gpt2", dtype=np.float32,
        tokens=(END,), ids=dict(bos_token_id=0, eos_token_id=0), edit=_gpt2,
        files={"tokenizer_config.json": {"model_max_length": 1024},
               "generation_config.json": dict(bos_token_id=0, eos_token_id=0)},
    ),
    "gemma-2-2b": Model(
        repo="google/gemma-2-2b", like="google/gemma-2-9b", dtype=np.float32, tokens=GEMMA,
        files=_GEMMA_FILES, ids={}, changes=dict(num_hidden_layers=26), first="<bos>", shards=3,
    ),
    "gemma-3-270m": Model(
        repo="google/gemma-3-270m", like="google/gemma-3-270m-it", dtype=ml_dtypes.bfloat16,
        tokens=GEMMA, files=_GEMMA_FILES, ids={}, first="<bos>",
    ),
    "qwen3-1.7b-base": Model(
        repo="Qwen/Qwen3-1.7B-Base", like="Qwen/Qwen3-1.7B", dtype=ml_dtypes.bfloat16,
        tokens=(END, "<|im_start|>", "<|im_end|>"), ids=dict(bos_token_id=0, eos_token_id=0),
        changes=dict(max_position_embeddings=32768), shards=2, edit=_qwen,
        files={
            "generation_config.json": dict(bos_token_id=0, do_sample=False, eos_token_id=0),
            "tokenizer_config.json": dict(
                add_bos_token=False, add_prefix_space=False, bos_token=None, eos_token=END,
                pad_token=END, tokenizer_class="Qwen2Tokenizer", unk_token=None,
                added_tokens_decoder={"0": dict(content=END, special=True)},
            ),
        },
    ),
    "llama-3.1-8b": Model(
        repo="meta-llama/Llama-3.1-8B", like="meta-llama/Llama-3.1-8B", dtype=ml_dtypes.bfloat16,
        tokens=("<|begin_of_text|>", "<|end_of_text|>"), first="<|begin_of_text|>", shards=4,
        ids=dict(bos_token_id=0, eos_token_id=1),
        files={
            "generation_config.json": dict(bos_token_id=0, do_sample=True, eos_token_id=1),
            "tokenizer_config.json": dict(
                bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>",
                clean_up_tokenization_spaces=True, tokenizer_class="PreTrainedTokenizerFast",
                added_tokens_decoder={"0": dict(content="<|begin_of_text|>", special=True)},
            ),
            "special_tokens_map.json": {"bos_token": {"content": "<|begin_of_text|>"}},
        },
    ),
}  # fmt: skip


# SAEs


def write_saes(
    root: Path,
    facts: str,
    place: Callable[[int], str],
    layers: range,
    *,
    d: int = D,
    m: int = M,
    said: Callable[[int], dict[str, Any]] = lambda layer: {},
) -> dict[int, Tensors]:
    """One SAE a layer in the layout of `facts`, at `place`: the tensors written, by layer.

    said: what a layer's config has other than the one that is known of the set.
    """
    known = json.loads((FACTS / f"{facts}.json").read_text())
    (file, tensors), *_ = ((f, t) for f, t in known["tensors"].items() if t)
    configs = {path: c for path, c in known["config"].items() if " (" not in path}
    path, config = next(iter(configs.items()), ("", None))
    sizes = sorted({size for _, shape in tensors.values() for size in shape})
    shrink = dict(zip(sizes, (d, m), strict=True))
    made = {}
    for layer in layers:
        rng = np.random.default_rng(layer)
        at = root / place(layer)
        at.mkdir(parents=True, exist_ok=True)
        made[layer] = {
            name: _random(rng, name, [shrink[size] for size in shape]).astype(TYPES[kind])
            for name, (kind, shape) in tensors.items()
        }
        _save(at / file.replace("{L}", str(layer)), made[layer])
        if config is not None:
            name = path.rpartition("/")[2]
            (at / name).write_text(json.dumps(_of_layer(config, layer, shrink) | said(layer)))
    return made


def _random(rng: np.random.Generator, name: str, shape: list[int]) -> np.ndarray:
    values = 0.3 * rng.normal(size=shape)
    return 0.5 + abs(values) if name == "threshold" else values


def _save(path: Path, tensors: Tensors) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix == ".npz":
        np.savez(path, **tensors)
    else:
        torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, path)


def _of_layer(config: dict[str, Any], layer: int, shrink: dict[int, int]) -> dict[str, Any]:
    """A config with another layer and the sizes that are used here."""
    text = re.sub(r"(blocks|layers)\.\d+", rf"\1.{layer}", json.dumps(config))
    said = json.loads(text)
    return {
        name: layer if name == "hook_point_layer" else M / D if name == "expansion_factor" else
        shrink.get(value, value) if type(value) is int else value
        for name, value in said.items()
    }  # fmt: skip


def pythia_saes(root: Path) -> dict[int, Tensors]:
    for hook in ("mlp", "attention"):
        write_saes(root, "sae-pythia-70m-32k", lambda layer: f"layers.{layer}.{hook}", range(6))  # noqa: B023
    return write_saes(root, "sae-pythia-70m-32k", lambda layer: f"layers.{layer}", range(6))


def res_jb(root: Path) -> dict[int, Tensors]:
    pre = write_saes(root, "gpt2-small-res-jb", lambda i: f"blocks.{i}.hook_resid_pre", range(12))
    last = dict(hook_point="blocks.11.hook_resid_post", hook_point_layer=11)
    post = write_saes(
        root, "gpt2-small-res-jb", lambda i: "blocks.11.hook_resid_post", range(11, 12),
        said=lambda i: last,
    )  # fmt: skip
    return {layer - 1: tensors for layer, tensors in pre.items()} | post


def gemma_scope(root: Path, embedding: bool = True) -> dict[int, Tensors]:
    """The L0s that the registry has, and another one and another width beside them."""
    l0 = registry().saes["gemma-scope-2b-pt-res"].l0_of_layer["16k"]
    for width, add in (("16k", 200), ("65k", 0)):
        write_saes(
            root, "gemma-scope-2b-pt-res",
            lambda i: f"layer_{i}/width_{width}/average_l0_{l0[i] + add}", range(26),  # noqa: B023
        )  # fmt: skip
    if embedding:
        at = "embedding/width_4k/average_l0_21"
        write_saes(root, "gemma-scope-2b-pt-res", lambda i: at, range(1))
    return write_saes(
        root, "gemma-scope-2b-pt-res", lambda i: f"layer_{i}/width_16k/average_l0_{l0[i]}",
        range(26),
    )  # fmt: skip


def gemma_scope_2(root: Path) -> dict[int, Tensors]:
    """The variants and hooks that lie beside the ones that are chosen, in a few layers."""

    def write(site: str, size: str, layers: range, hook: str = "output") -> dict[int, Tensors]:
        def said(layer: int) -> dict[str, Any]:
            point = f"model.layers.{layer}.{hook}"
            return dict(
                model_name="google/gemma-3-270m-pt", l0=20 if size.endswith("small") else 120,
                hf_hook_point_in=point, hf_hook_point_out=point,
            )  # fmt: skip

        return write_saes(
            root, "gemma-scope-2-resid-post", lambda i: f"{site}/layer_{i}_width_{size}", layers,
            said=said,
        )  # fmt: skip

    write("resid_post_all", "16k_l0_big", range(18))
    write("resid_post_all", "262k_l0_small", range(18))
    write("attn_out_all", "16k_l0_small", range(18), "self_attn.o_proj.input")
    write("mlp_out_all", "16k_l0_small", range(18), "post_feedforward_layernorm.output")
    return write("resid_post_all", "16k_l0_small", range(18))


def qwen_scope(root: Path) -> dict[int, Tensors]:
    made = write_saes(root, "qwen-scope", lambda i: "", range(28))
    (root / "README.md").write_text("the card")
    return made


def llama_norm(layer: int) -> float:
    return 1.0 + layer / 4


def llama_threshold(layer: int) -> float:
    return llama_norm(layer) / 30


def llama_scope(root: Path) -> dict[int, Tensors]:
    def said(layer: int) -> dict[str, Any]:
        norm = llama_norm(layer)
        return dict(
            jump_relu_threshold=llama_threshold(layer),
            dataset_average_activation_norm={"in": norm, "out": norm},
        )

    folder = "Llama3_1-8B-Base-L{}R-8x"
    return write_saes(root, "llama-scope-lxr-8x", folder.format, range(32), said=said)
