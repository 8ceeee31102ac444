"""Weights of JAX programs: a parameter tree of Flax or an orbax checkpoint -> `Params`.

A table says, for every field of `BlockWeights` and `Params`, where its leaf lies and what axes the
leaf has:

    "wq_DNH": Leaf("layer_{}/attn/q_einsum/w", "N D H")         axes in another order
    "wk_DKH": Leaf("layer_{}/attn/kv_einsum/w", "0 K D H")      the first of two stacked matrices
    "wo_NHD": Leaf("layers/{}/o_proj/kernel", "(N H) D")        merged axes
    "w_up_DF": Leaf("blocks/up", "L D F")                       all blocks in one leaf
    "norm_attn": Leaf("layer_{}/pre_attention_norm/scale", "D", plus=1.0)

`{}` is the block's number. Axes are the letters of `types`, so that every shape follows from the
model's config and is checked before anything is copied; a leaf that no field takes is refused. What
is above the leaves (`params/transformer/...`) is found out. Nothing else of a model is read from a
tree: scales, activation, windows and rotary are the config's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkattr.config import ModelConfig
from qkattr.errors import InputError, some
from qkattr.load.models.checkpoint import DTYPES
from qkattr.load.models.weights import per_block
from qkattr.load.tensors.mapped import check_finite
from qkattr.types import BlockWeights, Norm, Params


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Where a field is. path: keys joined by slashes. axes: letters, `(N H)` for merged ones, and
    a number where one of several stacked matrices is meant. plus: added to the values."""

    path: str
    axes: str
    plus: float = 0.0


#: By field; several leaves are alternatives, of which the first one that fits is taken.
Table = Mapping[str, "Leaf | tuple[Leaf, ...]"]


def _llama(block: str) -> dict[str, Leaf]:
    """Flax's Llama: Hugging Face's names with transposed matrices."""
    attention, mlp = f"{block}/self_attn", f"{block}/mlp"
    return {
        "norm_attn": Leaf(f"{block}/input_layernorm/weight", "D"),
        "norm_mlp": Leaf(f"{block}/post_attention_layernorm/weight", "D"),
        "wq_DNH": Leaf(f"{attention}/q_proj/kernel", "D (N H)"),
        "wk_DKH": Leaf(f"{attention}/k_proj/kernel", "D (K H)"),
        "wv_DKH": Leaf(f"{attention}/v_proj/kernel", "D (K H)"),
        "wo_NHD": Leaf(f"{attention}/o_proj/kernel", "(N H) D"),
        "w_gate_DF": Leaf(f"{mlp}/gate_proj/kernel", "D F"),
        "w_up_DF": Leaf(f"{mlp}/up_proj/kernel", "D F"),
        "w_down_FD": Leaf(f"{mlp}/down_proj/kernel", "F D"),
    }


#: The Flax Llama of transformers, and what has its layout.
LLAMA: Table = {
    **_llama("model/layers/{}"),
    "embed_VD": Leaf("model/embed_tokens/embedding", "V D"),
    "norm_final": Leaf("model/norm/weight", "D"),
    "unembed_DV": Leaf("lm_head/kernel", "D V"),
}


def _gemma() -> dict[str, Leaf | tuple[Leaf, ...]]:
    """Einsum weights; gate and up stacked, either way round; gains stored less one."""
    block, attention = "layer_{}", "layer_{}/attn"
    gating = [
        Leaf(f"{block}/mlp/gating_einsum{w}", axes) for w in ("/w", "") for axes in ("FD", "DF")
    ]

    def stacked(number: int) -> tuple[Leaf, ...]:
        return tuple(dataclasses.replace(g, axes=f"{number} {' '.join(g.axes)}") for g in gating)

    return {
        "norm_attn": Leaf(f"{block}/pre_attention_norm/scale", "D", plus=1.0),
        "norm_mlp": Leaf(f"{block}/pre_ffw_norm/scale", "D", plus=1.0),
        "wq_DNH": (
            Leaf(f"{attention}/q_einsum/w", "N D H"),
            Leaf(f"{attention}/qkv_einsum/w", "0 N D H"),
        ),
        "wk_DKH": (
            Leaf(f"{attention}/kv_einsum/w", "0 K D H"),
            Leaf(f"{attention}/qkv_einsum/w", "1 K D H"),
        ),
        "wv_DKH": (
            Leaf(f"{attention}/kv_einsum/w", "1 K D H"),
            Leaf(f"{attention}/qkv_einsum/w", "2 K D H"),
        ),
        "wo_NHD": Leaf(f"{attention}/attn_vec_einsum/w", "N H D"),
        "w_gate_DF": stacked(0),
        "w_up_DF": stacked(1),
        "w_down_FD": (Leaf(f"{block}/mlp/linear/w", "F D"), Leaf(f"{block}/mlp/linear", "F D")),
        "embed_VD": Leaf("embedder/input_embedding", "V D"),
        "norm_final": Leaf("final_norm/scale", "D", plus=1.0),
    }


#: DeepMind's Gemma: the first generation, and with post-norms and QK-norm the later ones.
GEMMA: Table = _gemma()
GEMMA_2: Table = GEMMA | {
    "norm_attn_post": Leaf("layer_{}/post_attention_norm/scale", "D", plus=1.0),
    "norm_mlp_post": Leaf("layer_{}/post_ffw_norm/scale", "D", plus=1.0),
}
GEMMA_3: Table = GEMMA_2 | {
    "norm_q": Leaf("layer_{}/attn/_query_norm/scale", "H", plus=1.0),
    "norm_k": Leaf("layer_{}/attn/_key_norm/scale", "H", plus=1.0),
}

_TOKEN = re.compile(r"\d|[A-Z]|\([A-Z ]+\)")
_NORMS = ("norm_attn", "norm_mlp", "norm_attn_post", "norm_mlp_post", "norm_final")


def from_tree(tree: Any, config: ModelConfig, table: Table, *, dtype: str = "float32") -> Params:
    """The `Params` of a model whose weights are a pytree: nested dicts, a Flax state or module.

    Args:
      config: of the model; its sizes are what the leaves' shapes are compared with.
      table: by field; the bias of a LayerNorm is `norm_attn.bias`. `unembed_DV` is left out where
        the config ties it to the embedding.
      dtype: of matrices, "float32" or "bfloat16".

    Raises:
      InputError: a leaf is missing, has another shape, is taken by no field, or is not finite.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    leaves = _Leaves(tree, config, table)
    fields: dict[str, Any] = {}
    for name in _needed(table, config):
        array = leaves.field(name)
        small = array.ndim - (name in _OF_BLOCKS or name.split(".")[0] in _OF_BLOCKS) < 2
        fields[name] = jnp.asarray(array, jnp.float32 if small else DTYPES[dtype])
    leaves.refuse_the_rest()
    for name in [n for n in fields if n in _NORMS]:
        fields[name] = Norm(weight=fields[name], bias=fields.pop(f"{name}.bias", None))
    blocks = {name: fields.pop(name) for name in list(fields) if name in _OF_BLOCKS}
    return Params(blocks=BlockWeights(**blocks, **per_block(config)), **fields)


def load_orbax(
    folder: str | Path, config: ModelConfig, table: Table, *, dtype: str = "float32"
) -> Params:
    """`from_tree` of an orbax checkpoint: the folder of one step, read on the host whatever devices
    it was written on.

    Raises:
      InputError: orbax is not installed, the folder is no checkpoint; or see `from_tree`.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as e:
        raise InputError("orbax is not installed; pip install orbax-checkpoint") from e
    path = Path(folder).resolve()
    if not path.is_dir():
        raise InputError(f"no such folder: {folder}; give the folder of one orbax checkpoint")
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found: Any = reader.metadata(path)
            shapes = found.item_metadata.tree
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=how))
    except (OSError, ValueError, KeyError, AttributeError) as e:
        raise InputError(
            f"{folder} is not a whole orbax checkpoint ({str(e).splitlines()[0]:.200}); give the "
            f"folder of one step, which has _METADATA in it"
        ) from e
    return from_tree(tree, config, table, dtype=dtype)


_OF_BLOCKS = frozenset(BlockWeights.__dataclass_fields__)


def _needed(table: Table, config: ModelConfig) -> list[str]:
    """The fields to fill, in which a misspelt one is refused."""
    known = _OF_BLOCKS | set(Params.__dataclass_fields__) - {"blocks"}
    for name in table:
        if name.removesuffix(".bias") not in known:
            raise InputError(f"the table has {name!r}, which is no field of BlockWeights or Params")
    return [name for name in table if not (config.tied and name == "unembed_DV")]


class _Leaves:
    """The leaves of a tree by path, and which of them have been used."""

    def __init__(self, tree: Any, config: ModelConfig, table: Table):
        self.leaves, self.table, self.config = _flat(tree), table, config
        self.unused = set(self.leaves)
        self.prefix = self._prefix()
        self.sizes = dict(
            D=config.d_model, N=config.n_heads, K=config.n_kv_heads, H=config.head_dim,
            F=config.d_mlp, V=config.vocab, P=config.context, L=config.n_blocks,
        )  # fmt: skip

    def _prefix(self) -> str:
        """What is above the embedding in the tree but not in the table."""
        asked = [leaf.path for leaf in _options(self.table["embed_VD"])]
        found = {
            path.removesuffix(end)
            for path in self.leaves
            for end in asked
            if path == end or path.endswith("/" + end)
        }
        if len(found) != 1:
            raise InputError(
                f"the tree has {len(found)} leaves {asked[0]}, expected one; it holds "
                f"{some(sorted(self.leaves), 6)}; give the table of its layout"
            )
        return found.pop()

    def field(self, name: str) -> np.ndarray:
        """One field, of all blocks stacked if it is of a block."""
        blocks = self.config.n_blocks if name.split(".")[0] in _OF_BLOCKS else None
        leaf = self._choose(name)
        if blocks is None or "L" in leaf.axes:
            return self._read(name, leaf, leaf.path)
        return np.stack([self._read(name, leaf, leaf.path.format(i)) for i in range(blocks)])

    def _choose(self, name: str) -> Leaf:
        """The first leaf that is there and fits; else the first that is there."""
        options = _options(self.table[name])
        there = [leaf for leaf in options if self.prefix + leaf.path.format(0) in self.leaves]
        fitting = (
            leaf
            for leaf in there
            if self._fits(self.leaves[self.prefix + leaf.path.format(0)].shape, leaf)
        )
        return next(fitting, (there or list(options))[0])

    def _axes(self, leaf: Leaf) -> list[str]:
        return _TOKEN.findall(leaf.axes)

    def _size(self, token: str) -> int | None:
        """An axis's size; None for one that is indexed."""
        if token.isdigit():
            return None
        return math.prod(self.sizes[letter] for letter in re.findall(r"[A-Z]", token))

    def _fits(self, shape: tuple[int, ...], leaf: Leaf) -> bool:
        axes = self._axes(leaf)
        return len(shape) == len(axes) and all(
            size > int(token) if token.isdigit() else size == self._size(token)
            for size, token in zip(shape, axes, strict=True)
        )

    def _read(self, name: str, leaf: Leaf, path: str) -> np.ndarray:
        path = self.prefix + path
        if path not in self.leaves:
            raise InputError(
                f"the tree has no {path}, which {name} is read from; it holds "
                f"{some(sorted(self.unused), 6)}; give the table of its layout"
            )
        array = self.leaves[path]
        if not self._fits(array.shape, leaf):
            sizes = ", ".join(
                f"{k}={self.sizes[k]}" for k in sorted(set(leaf.axes) & set("DNKHFVPL"))
            )
            raise InputError(
                f"{path} has shape {list(array.shape)}, {name} calls for [{leaf.axes}] with "
                f"{sizes}; the tree and the config must belong to one model"
            )
        self.unused.discard(path)
        array = np.asarray(array)
        check_finite(array, path, "the tree")
        array = self._arranged(array, leaf, name)
        # In bfloat16 1 + w would round to steps of 1/128.
        return array.astype(np.float32) + np.float32(leaf.plus) if leaf.plus else array

    def _arranged(self, array: np.ndarray, leaf: Leaf, name: str) -> np.ndarray:
        """Indexed, unmerged, and in the order of the field's own axes."""
        axes = self._axes(leaf)
        array = array[tuple(int(t) if t.isdigit() else slice(None) for t in axes)]
        letters = [letter for t in axes for letter in re.findall(r"[A-Z]", t)]
        array = array.reshape([self.sizes[letter] for letter in letters])
        order = [letter for letter in ("L", *_field_axes(name, letters)) if letter in letters]
        return array.transpose([letters.index(letter) for letter in order])

    def refuse_the_rest(self) -> None:
        if self.unused:
            raise InputError(
                f"the tree holds {some(sorted(self.unused), 6)}, which no field of the table "
                f"takes; give the table of its layout"
            )


def _field_axes(name: str, letters: list[str]) -> str:
    """The axes of a field: the letters after the underscore; a norm's are its leaf's own."""
    suffix = name.rpartition("_")[2]
    return suffix if suffix.isupper() else "".join(letter for letter in letters if letter != "L")


def _options(entry: Leaf | tuple[Leaf, ...]) -> tuple[Leaf, ...]:
    return (entry,) if isinstance(entry, Leaf) else entry


def _flat(tree: Any) -> dict[str, Any]:
    """Every array by its path. A Flax variable's `.value` is no key of its own."""
    flat = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
            keys = keys[:-1]
        if hasattr(leaf, "shape"):
            flat["/".join(_key(key) for key in keys)] = leaf
    return flat


def _key(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
