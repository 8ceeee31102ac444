"""Small models and SAEs as folders on disk, in the formats that users bring."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from qkattr.load.dictionaries import Options, SaeFiles, check_set, find_saes, map_sae, recognise
from qkattr.load.dictionaries.header import stated
from qkattr.load.models.hf import open_checkpoint, read_config
from qkattr.load.models.weights import read_params

BLOCKS, D, HEADS, KV_HEADS, HEAD_DIM, MLP, WIDTH, CONTEXT = 2, 16, 4, 2, 4, 24, 32, 64
BOS = "<s>"
#: Tokens that a page or a terminal must not act on.
HOSTILE = [
    "<script>alert(1)</script>",
    "[bold red]x[/]",
    "\x1b[31mred\x1b]0;title\x07",
    "\x9b31m",
    "a\0b",
    "\u202eevil\u202c שלום",
    "{{ 7*7 }}",
    "x" * 100_000,
]
MERGES = [("h", "i"), ("Ġ", "hi"), ("Ġ", "Ġ"), ("1", "2")]
TOKENS = [
    BOS,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *("".join(pair) for pair in MERGES),
]
VOCAB = len(TOKENS) + len(HOSTILE)


def write_model(folder, *, seed=0, blocks=BLOCKS, d=D, tokenizer=False, edit=lambda tensors: None):
    """A Llama-family folder; `edit` may change its tensors before they are written."""
    folder.mkdir(parents=True)
    config = dict(
        model_type="llama",
        hidden_size=d,
        intermediate_size=MLP,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    kv, width = KV_HEADS * HEAD_DIM, HEADS * HEAD_DIM
    shapes = {"model.embed_tokens.weight": (VOCAB, d), "model.norm.weight": (d,)}
    for b in range(blocks):
        at = f"model.layers.{b}"
        shapes |= {
            f"{at}.input_layernorm.weight": (d,),
            f"{at}.post_attention_layernorm.weight": (d,),
            f"{at}.self_attn.q_proj.weight": (width, d),
            f"{at}.self_attn.k_proj.weight": (kv, d),
            f"{at}.self_attn.v_proj.weight": (kv, d),
            f"{at}.self_attn.o_proj.weight": (d, width),
            f"{at}.mlp.gate_proj.weight": (MLP, d),
            f"{at}.mlp.up_proj.weight": (MLP, d),
            f"{at}.mlp.down_proj.weight": (d, MLP),
        }
    tensors = {}
    for name, shape in shapes.items():
        scale, mean = (0.5, 0.0) if len(shape) == 2 else (0.1, 1.0)
        tensors[name] = (mean + scale * rng.normal(size=shape)).astype(np.float32)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    if tokenizer:
        _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder):
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(TOKENS)}, merges=MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    added = [AddedToken(t, normalized=False, special=True) for t in (BOS, *HOSTILE)]
    inner.add_special_tokens(added)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS}))


def write_saes(folder, *, seed=0, boundaries=range(1, BLOCKS + 1), d=D, edit=lambda tensors: None):
    """SAELens topk SAEs, one at each of the boundaries."""
    rng = np.random.default_rng(seed)
    for b in boundaries:
        hook = f"blocks.{b - 1}.hook_resid_post"
        config = dict(
            architecture="topk",
            d_in=d,
            d_sae=WIDTH,
            k=5,
            dtype="float32",
            metadata=dict(hook_name=hook, model_name="small", prepend_bos=True),
        )
        w_dec = rng.normal(size=(WIDTH, d))
        w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
        tensors = dict(
            W_enc=np.ascontiguousarray(w_dec.T),
            W_dec=w_dec,
            b_enc=0.1 * rng.normal(size=WIDTH),
            b_dec=0.1 * rng.normal(size=d),
        )
        tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
        edit(tensors)
        (folder / hook).mkdir(parents=True)
        (folder / hook / "cfg.json").write_text(json.dumps(config))
        save_file(tensors, folder / hook / "sae_weights.safetensors")
    return folder


def write_packed(root):
    """A model, and SAEs for it as a folder and as a packed file."""
    from qkattr.load.dictionaries.packing import pack_saes

    write_model(root / "model", tokenizer=True)
    write_saes(root / "saes")
    pack_saes(root / "saes", root / "packed.gguf")
    return root


def load_hf(folder, dtype="float32"):
    """The config and the weights of a model folder."""
    config = read_config(folder)
    return config, read_params(open_checkpoint(folder), config, dtype=dtype)


def listed(folder):
    """A folder with the names of its files, as readers of SAEs see it."""
    return next(at for at in SaeFiles(folder).folders() if at.path == folder)


def load_sae(folder, options=None):
    """The SAE of one folder, whatever hook it was trained on."""
    at = listed(folder)
    (found,) = recognise(at).find(at, options or Options())
    return map_sae(stated(found.read(), options or Options()))


def check_saes(path, config, *, missing="error"):
    """What `load_saes` checks before it reads weights."""
    found = find_saes(path)
    check_set(found.headers, path, config, missing, found.notes)
