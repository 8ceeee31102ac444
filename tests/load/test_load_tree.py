"""Parameter trees of JAX programs against the same weights from a Hugging Face folder."""

import dataclasses

import families
import flax.nnx as nnx
import folders
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from qkattr.errors import InputError
from qkattr.load.models.tree import GEMMA, GEMMA_2, GEMMA_3, LLAMA, Leaf, from_tree, load_orbax
from qkattr.model.transformer import forward
from qkattr.types import Params

TOKENS = jnp.array([0, 40, 41, 42, 40, 7])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The config and params of a folder, and its tensors."""
    tensors = {}
    folder = tmp_path_factory.mktemp("tree") / "model"
    folders.write_model(folder, edit=tensors.update)
    return *folders.load_hf(folder), tensors


def llama_tree(tensors):
    """As a Flax Llama keeps it: nested, kernels transposed."""
    tree = {}
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        if path[-1] == "embed_tokens":
            node["embedding"] = tensor
        else:
            node["kernel" if tensor.ndim == 2 else last] = tensor.T
    return tree


def same(a: Params, b: Params):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_llama_gives_the_logits_of_the_folder(model):
    config, params, tensors = model
    read = from_tree(llama_tree(tensors), config, LLAMA)
    same(read, params)
    ours, theirs = (forward(p, TOKENS, cfg=config, capture=())[0] for p in (read, params))
    np.testing.assert_array_equal(ours, theirs)


def test_what_is_above_the_leaves_is_found_out(model):
    config, params, tensors = model
    same(from_tree({"params": {"x": llama_tree(tensors)}}, config, LLAMA), params)


def test_untied_and_bfloat16(model):
    config, _, tensors = model
    table = np.random.default_rng(0).normal(size=(folders.VOCAB, folders.D)).astype(np.float32)
    tree = llama_tree(tensors) | {"lm_head": {"kernel": table.T}}
    params = from_tree(tree, dataclasses.replace(config, tied=False), LLAMA, dtype="bfloat16")
    np.testing.assert_array_equal(params.unembed_DV, jnp.asarray(table.T, jnp.bfloat16))
    assert params.blocks.wq_DNH.dtype == jnp.bfloat16
    assert params.blocks.norm_attn.weight.dtype == params.norm_final.weight.dtype == jnp.float32


def gemma_tree(params, *, transposed, flat, w=True):
    """DeepMind's layout of the weights of `params`."""
    b, tree = params.blocks, {}

    def leaf(path, value, key="w"):
        node = tree
        parts = [*path.split("/"), key] if key else path.split("/")
        if flat:  # orbax keeps whole paths as keys
            parts = ["transformer/" + "/".join(parts[:-1]), parts[-1]]
        else:
            parts = ["transformer", *parts]
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = np.asarray(value)

    leaf("embedder", params.embed_VD, "input_embedding")
    leaf("final_norm", params.norm_final.weight - 1, "scale")
    for i in range(b.wq_DNH.shape[0]):
        at, w_key = f"layer_{i}", "w" if w else None
        leaf(f"{at}/attn/q_einsum", b.wq_DNH[i].transpose(1, 0, 2))
        kv = jnp.stack([b.wk_DKH[i], b.wv_DKH[i]]).transpose(0, 2, 1, 3)
        leaf(f"{at}/attn/kv_einsum", kv)
        leaf(f"{at}/attn/attn_vec_einsum", b.wo_NHD[i])
        gating = jnp.stack([b.w_gate_DF[i], b.w_up_DF[i]])
        leaf(f"{at}/mlp/gating_einsum", gating.mT if transposed else gating, w_key)
        leaf(f"{at}/mlp/linear", b.w_down_FD[i], w_key)
        norms = {
            "pre_attention_norm": b.norm_attn,
            "pre_ffw_norm": b.norm_mlp,
            "post_attention_norm": b.norm_attn_post,
            "post_ffw_norm": b.norm_mlp_post,
        }
        for name, norm in norms.items():
            if norm is not None:
                leaf(f"{at}/{name}", norm.weight[i] - 1, "scale")
        for name, gain in (("_query_norm", b.norm_q), ("_key_norm", b.norm_k)):
            if gain is not None:
                leaf(f"{at}/attn/{name}", gain[i] - 1, "scale")
    return tree


def close(a: Params, b: Params):
    """Equal but for the rounding of 1 + (w - 1)."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), a, b)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("transposed, w", [(True, True), (False, False)])
def test_gemma_gives_the_logits_of_the_folder(model, transposed, flat, w):
    config, params, _ = model
    read = from_tree(gemma_tree(params, transposed=transposed, flat=flat, w=w), config, GEMMA)
    close(read, params)
    ours, theirs = (forward(p, TOKENS, cfg=config, capture=())[0] for p in (read, params))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_gemma_with_post_norms_and_qk_norm(model):
    config, params, _ = model
    gain = params.blocks.norm_attn
    heads = jnp.linspace(0.5, 1.5, config.head_dim)[None].repeat(config.n_blocks, 0)
    blocks = params.blocks.replace(norm_attn_post=gain, norm_mlp_post=gain)
    second = params.replace(blocks=blocks)
    third = params.replace(blocks=blocks.replace(norm_q=heads, norm_k=heads))
    for table, whole in ((GEMMA_2, second), (GEMMA_3, third)):
        tree = gemma_tree(whole, transposed=True, flat=True)
        close(from_tree(tree, config, table), whole)
    with pytest.raises(InputError, match="layer_0/attn/_key_norm/scale, .* the table has no use"):
        from_tree(tree, config, GEMMA_2)
    with pytest.raises(InputError, match="the tree lacks transformer/layer_0/attn/_query_norm"):
        from_tree(gemma_tree(second, transposed=True, flat=True), config, GEMMA_3)


def test_blocks_stacked_in_one_leaf(model):
    config, params, _ = model
    b = params.blocks
    names = ("wq_DNH", "wk_DKH", "wv_DKH", "wo_NHD", "w_gate_DF", "w_up_DF", "w_down_FD")
    table = {n: Leaf(f"blocks/{n}", "L " + " ".join(n.rpartition("_")[2])) for n in names}
    table["wq_DNH"] = Leaf("blocks/wq_DNH", "L D (N H)")
    table |= {n: Leaf(f"blocks/{n}", "L D") for n in ("norm_attn", "norm_mlp")}
    table |= {"embed_VD": Leaf("embed", "V D"), "norm_final": Leaf("norm", "D")}
    tree = {n: getattr(b, n) for n in names}
    tree["wq_DNH"] = b.wq_DNH.reshape(*b.wq_DNH.shape[:2], -1)
    tree |= {"norm_attn": b.norm_attn.weight, "norm_mlp": b.norm_mlp.weight}
    tree = dict(blocks=tree, embed=params.embed_VD, norm=params.norm_final.weight)
    same(from_tree(tree, config, table), params)


def own_layout(params: Params, *, stacked: bool):
    """A tree with every field as it is, a leaf a block or all blocks in one, and its table."""
    tree, table = {}, {}
    fields = {
        n: getattr(params, n) for n in ("embed_VD", "unembed_DV", "position_PD", "norm_final")
    }
    fields |= {n: getattr(params.blocks, n) for n in params.blocks.__dataclass_fields__}
    norms = {n: norm for n, norm in fields.items() if hasattr(norm, "weight")}
    fields |= {n: norm.weight for n, norm in norms.items()}
    fields |= {f"{n}.bias": norm.bias for n, norm in norms.items()}
    for name, value in fields.items():
        if value is None or name in ("inv_freq", "window"):
            continue
        suffix = name.rpartition("_")[2]
        head_norm = {"norm_q": "N H", "norm_k": "K H"}.get(name, "D")
        axes = " ".join(suffix) if suffix.isupper() else head_norm
        if not hasattr(params.blocks, name.split(".")[0]):
            tree[name], table[name] = value, Leaf(name, axes)
        elif stacked:
            first, *rest = axes.split()
            tree[name] = np.moveaxis(np.asarray(value), 0, 1)
            table[name] = Leaf(name, " ".join([first, "L", *rest]))
        else:
            tree |= {
                f"block{b}": tree.get(f"block{b}", {}) | {name: v} for b, v in enumerate(value)
            }
            table[name] = Leaf(f"block{{}}/{name}", axes)
    return tree, table


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "pythia", "gemma2", "olmo2-grouped", "qwen2", "phi3"])
def test_every_family_reads_from_a_tree_what_its_folder_gives(name, stacked):
    """LayerNorms, biases, the embedding's factor and norms over all heads included."""
    config, params = folders.load_hf(families.saved(name))
    tree, table = own_layout(params, stacked=stacked)
    for dtype in ("float32", "bfloat16"):
        expected = folders.load_hf(families.saved(name), dtype=dtype)[1]
        read = from_tree(tree, config, table, dtype=dtype)
        same(read, expected)
        assert jax.tree.map(lambda a: a.dtype, read) == jax.tree.map(lambda a: a.dtype, expected)


def test_queries_are_divided_by_depth_where_the_config_says_so():
    config, params = folders.load_hf(families.saved("gpt2-by-depth"))
    tree, table = own_layout(params, stacked=False)
    for b in range(config.n_blocks):
        for name in ("wq_DNH", "bq_NH"):
            tree[f"block{b}"][name] = np.asarray(tree[f"block{b}"][name]) * np.float32(b + 1)
    read = from_tree(tree, config, table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), read, params)


def test_leaves_of_several_fields(model):
    """Side by side along any axis, with heads merged or within each."""
    config, params = folders.load_hf(families.saved("gpt2"))
    tree, table = own_layout(params, stacked=False)
    for block in (tree[f"block{b}"] for b in range(config.n_blocks)):
        q, k, v = (np.asarray(block.pop(n)) for n in ("wq_DNH", "wk_DKH", "wv_DKH"))
        flat = [a.reshape(config.d_model, -1) for a in (q, k, v)]
        block["qkv"] = np.concatenate(flat, 1)
        biases = [np.asarray(block.pop(n)) for n in ("bq_NH", "bk_KH", "bv_KH")]
        block["bias"] = np.stack(biases, 1).reshape(-1)
    for name in ("wq_DNH", "wk_DKH", "wv_DKH", "bq_NH", "bk_KH", "bv_KH"):
        del table[name]
    table["wq_DNH wk_DKH wv_DKH"] = Leaf("block{}/qkv", "D (N H)+(K H)+(K H)")
    table["bq_NH bk_KH bv_KH"] = Leaf("block{}/bias", "N3H")
    same(from_tree(tree, config, table), params)


class Block(nnx.Module):
    def __init__(self, rngs, d, n, k, h, f):
        linear = lambda a, b: nnx.Linear(a, b, use_bias=False, rngs=rngs)
        self.q, self.k, self.v, self.o = (
            linear(*s) for s in ((d, n * h), (d, k * h), (d, k * h), (n * h, d))
        )
        self.gate, self.up, self.down = linear(d, f), linear(d, f), linear(f, d)
        self.norm, self.mlp_norm = (nnx.RMSNorm(d, rngs=rngs) for _ in range(2))


class Decoder(nnx.Module):
    def __init__(self, rngs, c):
        self.embed = nnx.Embed(c.vocab, c.d_model, rngs=rngs)
        sizes = (c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, c.d_mlp)
        self.blocks = nnx.List([Block(rngs, *sizes) for _ in range(c.n_blocks)])
        self.final = nnx.RMSNorm(c.d_model, rngs=rngs)


NNX = {
    "wq_DNH": Leaf("blocks/{}/q/kernel", "D (N H)"),
    "wk_DKH": Leaf("blocks/{}/k/kernel", "D (K H)"),
    "wv_DKH": Leaf("blocks/{}/v/kernel", "D (K H)"),
    "wo_NHD": Leaf("blocks/{}/o/kernel", "(N H) D"),
    "w_gate_DF": Leaf("blocks/{}/gate/kernel", "D F"),
    "w_up_DF": Leaf("blocks/{}/up/kernel", "D F"),
    "w_down_FD": Leaf("blocks/{}/down/kernel", "F D"),
    "norm_attn": Leaf("blocks/{}/norm/scale", "D"),
    "norm_mlp": Leaf("blocks/{}/mlp_norm/scale", "D"),
    "embed_VD": Leaf("embed/embedding", "V D"),
    "norm_final": Leaf("final/scale", "D"),
}


def test_an_nnx_module_and_its_states(model):
    config = model[0]
    module = Decoder(nnx.Rngs(0), config)
    params = from_tree(module, config, NNX)
    for tree in (nnx.state(module), nnx.to_pure_dict(nnx.state(module))):
        same(from_tree(tree, config, NNX), params)
    q = module.blocks[1].q.kernel[...].reshape(config.d_model, config.n_heads, config.head_dim)
    np.testing.assert_array_equal(params.blocks.wq_DNH[1], q)


def test_orbax_checkpoints(model, tmp_path):
    config, params, _ = model
    tree = jax.tree.map(jnp.asarray, gemma_tree(params, transposed=True, flat=True))
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "checkpoint", tree)
    close(load_orbax(tmp_path / "checkpoint", config, GEMMA), params)
    with pytest.raises(InputError, match="no such folder"):
        load_orbax(tmp_path / "absent", config, GEMMA)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is not a whole orbax checkpoint"):
        load_orbax(tmp_path / "empty", config, GEMMA)


def spoiled(tree, path, value):
    *keys, last = path.split("/")
    node = tree
    for key in keys:
        node = node[key]
    node[last] = value
    return tree


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("model/norm/weight", np.ones(9), r"calls for \[16\] \(norm_final.weight as \[D\]\)"),
        (
            "model/layers/1/mlp/up_proj/kernel",
            np.ones((24, 16)),
            r"calls for \[16, 24\] \(w_up_DF as \[D F\]\)",
        ),
        ("model/layers/0/mlp/up_proj/kernel", np.full((16, 24), np.nan), "holds NaN"),
        (
            "model/layers/0/mlp/extra",
            np.ones(3),
            "the tree holds model/layers/0/mlp/extra, for which",
        ),
        (
            "model/layers/1/mlp/up_proj",
            {},
            "lacks model/layers/1/mlp/up_proj/kernel, .* \\(w_up_DF",
        ),
        ("model/embed_tokens", {}, "the tree has 0 leaves model/embed_tokens/embedding, expected"),
    ],
)
def test_trees_that_do_not_fit(model, path, value, message):
    config, _, tensors = model
    with pytest.raises(InputError, match=message):
        from_tree(spoiled(llama_tree(tensors), path, value), config, LLAMA)


def test_misspelt_fields_and_dtypes(model):
    config, _, tensors = model
    with pytest.raises(InputError, match="'wq_DHN', which is no field"):
        from_tree(llama_tree(tensors), config, LLAMA | {"wq_DHN": Leaf("x", "D")})
    with pytest.raises(InputError, match="'wq_DNH.bias', which is no field"):
        from_tree(llama_tree(tensors), config, LLAMA | {"wq_DNH.bias": Leaf("x", "D")})
    with pytest.raises(InputError, match="'norm_mlp_post.bias', which is no field|no norm"):
        from_tree(llama_tree(tensors), config, LLAMA | {"norm_mlp_post.bias": Leaf("x", "D")})
    with pytest.raises(InputError, match="dtype is 'int8', expected one of"):
        from_tree(llama_tree(tensors), config, LLAMA, dtype="int8")


@pytest.mark.parametrize("axes", ["D N", "X D", "D (N K)", "N D H F", "D N+K H", "", "D (N H"])
def test_axes_of_other_letters(model, axes):
    config, _, tensors = model
    table = LLAMA | {"wq_DNH": Leaf("model/layers/{}/self_attn/q_proj/kernel", axes)}
    with pytest.raises(InputError, match="the table reads wq_DNH from .* write them as in"):
        from_tree(llama_tree(tensors), config, table)


def test_tables_that_lack_a_field(model):
    config, _, tensors = model
    for name in ("wo_NHD", "embed_VD", "w_up_DF"):
        with pytest.raises(InputError, match=f"the table lacks {name}; give a leaf for each"):
            from_tree(llama_tree(tensors), config, {n: LLAMA[n] for n in LLAMA if n != name})


@pytest.mark.parametrize("shape", [(3, 16, 4, 4), (1, 16, 4, 4), (2, 16, 4), (16, 2, 4, 4)])
def test_all_blocks_are_as_many_as_the_config_says(model, shape):
    config, _, tensors = model
    tree = llama_tree(tensors) | {"q": np.ones(shape)}
    for layer in tree["model"]["layers"].values():
        del layer["self_attn"]["q_proj"]
    with pytest.raises(InputError, match=r"q has shape .* calls for \[2, 16, 4, 4\]"):
        from_tree(tree, config, LLAMA | {"wq_DNH": Leaf("q", "L D N H")})


def test_a_leaf_of_integers_is_no_weight(model):
    config, _, tensors = model
    tree = spoiled(llama_tree(tensors), "model/norm/weight", np.ones(16, np.int32))
    with pytest.raises(InputError, match="model/norm/weight is int32, expected"):
        from_tree(tree, config, LLAMA)
