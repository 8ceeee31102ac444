"""Weights of JAX programs: a parameter tree of Flax or an orbax checkpoint -> `Params`.

A tree is a `Checkpoint` whose tensors are its leaves, named by their paths. A table says, for every
field of `BlockWeights` and `Params`, where its leaf lies and what axes the leaf has, in the
language of `families.tables`:

    "wq_DNH": Leaf("layer_{}/attn/q_einsum/w", "N D H")         axes in another order
    "wk_DKH": Leaf("layer_{}/attn/kv_einsum/w", "0 K D H")      the first of two stacked matrices
    "wo_NHD": Leaf("layers/{}/o_proj/kernel", "(N H) D")        merged axes
    "w_up_DF": Leaf("blocks/up", "L D F")                       all blocks in one leaf
    "w_gate_DF w_up_DF": Leaf("block_{}/in/kernel", "D F+F")    two fields side by side in one leaf
    "norm_attn": Leaf("layer_{}/pre_attention_norm/scale", "D", plus=1.0)

`{}` is the block's number. Every shape follows from the model's config and is checked before
anything is copied; a leaf that no field takes is refused. What is above the leaves
(`params/transformer/...`) is found out. A tree holds weights alone: scales, activation, windows,
rotary and the embedding's factor are those of the config and its family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qkattr.config import ModelConfig
from qkattr.errors import InputError, some
from qkattr.load.models.families import FAMILIES
from qkattr.load.models.families.tables import Layout, Row, sizes_of
from qkattr.load.models.weights import read_params
from qkattr.load.tensors.mapped import FLOATS
from qkattr.types import BlockWeights, Params


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Where a field is. path: keys joined by slashes. axes: letters, `(N H)` for merged ones, and
    a number where one of several stacked matrices is meant. plus: added to the values."""

    path: str
    axes: str
    plus: float = 0.0


#: By field; several leaves are alternatives, of which the first one that fits is taken.
TreeTable = Mapping[str, "Leaf | tuple[Leaf, ...]"]


#: The Flax Llama of transformers: Hugging Face's names with transposed matrices.
LLAMA: TreeTable = {
    "norm_attn": Leaf("model/layers/{}/input_layernorm/weight", "D"),
    "norm_mlp": Leaf("model/layers/{}/post_attention_layernorm/weight", "D"),
    "wq_DNH": Leaf("model/layers/{}/self_attn/q_proj/kernel", "D (N H)"),
    "wk_DKH": Leaf("model/layers/{}/self_attn/k_proj/kernel", "D (K H)"),
    "wv_DKH": Leaf("model/layers/{}/self_attn/v_proj/kernel", "D (K H)"),
    "wo_NHD": Leaf("model/layers/{}/self_attn/o_proj/kernel", "(N H) D"),
    "w_gate_DF": Leaf("model/layers/{}/mlp/gate_proj/kernel", "D F"),
    "w_up_DF": Leaf("model/layers/{}/mlp/up_proj/kernel", "D F"),
    "w_down_FD": Leaf("model/layers/{}/mlp/down_proj/kernel", "F D"),
    "embed_VD": Leaf("model/embed_tokens/embedding", "V D"),
    "norm_final": Leaf("model/norm/weight", "D"),
    "unembed_DV": Leaf("lm_head/kernel", "D V"),
}


def _alternatives(*leaves: tuple[str, str]) -> tuple[Leaf, ...]:
    return tuple(Leaf(f"layer_{{}}/{path}", axes) for path, axes in leaves)


def _gating(number: int) -> tuple[Leaf, ...]:
    """Gate and up, stacked, either way round."""
    paths, axes = ("mlp/gating_einsum/w", "mlp/gating_einsum"), ("F D", "D F")
    return _alternatives(*((path, f"{number} {a}") for path in paths for a in axes))


def _gain(path: str, axes: str = "D") -> Leaf:
    """Stored less one."""
    return Leaf(f"{path}/scale", axes, plus=1.0)


#: DeepMind's Gemma: the first generation, and with post-norms and QK-norm the later ones.
GEMMA: TreeTable = {
    "norm_attn": _gain("layer_{}/pre_attention_norm"),
    "norm_mlp": _gain("layer_{}/pre_ffw_norm"),
    "wq_DNH": _alternatives(("attn/q_einsum/w", "N D H"), ("attn/qkv_einsum/w", "0 N D H")),
    "wk_DKH": _alternatives(("attn/kv_einsum/w", "0 K D H"), ("attn/qkv_einsum/w", "1 K D H")),
    "wv_DKH": _alternatives(("attn/kv_einsum/w", "1 K D H"), ("attn/qkv_einsum/w", "2 K D H")),
    "wo_NHD": Leaf("layer_{}/attn/attn_vec_einsum/w", "N H D"),
    "w_gate_DF": _gating(0),
    "w_up_DF": _gating(1),
    "w_down_FD": _alternatives(("mlp/linear/w", "F D"), ("mlp/linear", "F D")),
    "embed_VD": Leaf("embedder/input_embedding", "V D"),
    "norm_final": _gain("final_norm"),
}
GEMMA_2: TreeTable = GEMMA | {
    "norm_attn_post": _gain("layer_{}/post_attention_norm"),
    "norm_mlp_post": _gain("layer_{}/post_ffw_norm"),
}
GEMMA_3: TreeTable = GEMMA_2 | {
    "norm_q": _gain("layer_{}/attn/_query_norm", "H"),
    "norm_k": _gain("layer_{}/attn/_key_norm", "H"),
}


def from_tree(
    tree: Any, config: ModelConfig, table: TreeTable, *, dtype: str = "float32"
) -> Params:
    """The `Params` of a model whose weights are a pytree: nested dicts, a Flax state or module.

    Args:
      config: of the model; its sizes are what the leaves' shapes are compared with.
      table: by field; the bias of a LayerNorm is `norm_attn.bias`. `unembed_DV` is left out where
        the config ties it to the embedding.
      dtype: of matrices, "float32" or "bfloat16".

    Raises:
      InputError: a leaf is missing, has another shape, is taken by no field, or is not finite; or
        the table has a field that is none, lacks one, or spells axes that are none.
    """
    leaves = _Tree(_flat(tree))
    return read_params(leaves, config, dtype=dtype, layout=_layout(table, config, leaves.shapes()))


def load_orbax(
    folder: str | Path, config: ModelConfig, table: TreeTable, *, dtype: str = "float32"
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


@dataclasses.dataclass(frozen=True)
class _Tree:
    """The leaves of a tree, by path, as a `Checkpoint`."""

    leaves: Mapping[str, Any]
    where: str = "the tree"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: tuple(leaf.shape) for path, leaf in self.leaves.items()}

    def type(self, name: str) -> str:
        kind = str(self.leaves[name].dtype)
        return _TYPES.get(kind, kind)

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self.leaves[name])


_TYPES = {str(dtype): name for name, dtype in FLOATS.items()}
_NORMS = {"norm_attn", "norm_mlp", "norm_attn_post", "norm_mlp_post", "norm_final"}
_OF_BLOCKS = frozenset(BlockWeights.__dataclass_fields__)
#: What a table may have, and whether it must; the rest follows from the config.
_FIELDS = {
    field.name: field.default is dataclasses.MISSING
    for kind in (BlockWeights, Params)
    for field in dataclasses.fields(kind)
    if field.name not in ("inv_freq", "window", "blocks", "embed_scale")
} | dict.fromkeys((f"{norm}.bias" for norm in _NORMS), False)


def _layout(table: TreeTable, config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> Layout:
    """Of alternatives the first that is there and fits; else the first that is there."""
    options, sizes = {key: _rows(key, entry) for key, entry in table.items()}, sizes_of(config)
    _check(options, sizes)
    above = _above([row.tensor for row in options["embed_VD"]], found)
    block, outside = [], []
    for key, rows in options.items():
        rows = [row.below(above) for row in rows]
        there = [row for row in rows if row.at(0).tensor in found]
        fits = (row for row in there if row.fits(found[row.at(0).tensor], sizes))
        of_block = key.split()[0].split(".")[0] in _OF_BLOCKS
        if not (config.tied and key == "unembed_DV"):
            (block if of_block else outside).append(next(fits, (there or rows)[0]))
    scaled = config.family in FAMILIES and FAMILIES[config.family].scaled_embedding
    return Layout(
        tuple(block),
        tuple(outside),
        scaled_embedding=scaled,
        source="the table",
        remedy="give the table of the tree's layout and the config of its model",
    )


def _rows(key: str, entry: Leaf | tuple[Leaf, ...]) -> list[Row]:
    """The rows of an entry's leaves."""
    fields = " ".join(f"{f}.weight" if f in _NORMS else f for f in key.split())
    leaves = (entry,) if isinstance(entry, Leaf) else entry
    return [Row(leaf.path, leaf.axes, fields, leaf.plus) for leaf in leaves]


def _check(options: Mapping[str, list[Row]], sizes: Mapping[str, int]) -> None:
    """Raise `InputError` unless a table's fields and axes are those that there are."""
    given = [field for key in options for field in key.split()]
    if wrong := [f for f in given if f not in _FIELDS or f.removesuffix(".bias") not in given]:
        raise InputError(f"the table has {wrong[0]!r}, which is no field of BlockWeights or Params")
    if absent := [f for f, needed in _FIELDS.items() if needed and f not in given]:
        raise InputError(f"the table lacks {some(absent)}; give a leaf for each")
    for row in (row for rows in options.values() for row in rows):
        try:
            _ = row.shapes(sizes), row.shape(sizes)
        except (KeyError, ValueError) as e:
            raise InputError(
                f"the table reads {row.fields} from [{row.axes}], which is not made of its axes; "
                'write them as in "D (N H)" for wq_DNH'
            ) from e


def _above(asked: list[str], found: Mapping[str, Any]) -> str:
    """What is above the embedding in the tree but not in the table."""
    above = {p.removesuffix(end) for p in found for end in asked if f"/{p}".endswith(f"/{end}")}
    if len(above) != 1:
        raise InputError(
            f"the tree has {len(above)} leaves {asked[0]}, expected one; it holds "
            f"{some(sorted(found), 6)}; give the table of its layout"
        )
    return above.pop()


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
