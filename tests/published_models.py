"""The published folders of `tests/published/models`, shrunk: every attribute as it was published
but for the sizes, random weights by `transformers`, and a tokenizer of the named tokens alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

FOLDER = Path(__file__).parent / "published" / "models"
PUBLISHED = {
    found["repo"]: found
    for found in (json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json")))
}
D, F, V, CONTEXT, WINDOW = 24, 20, 48, 32, 4
#: The names of the sizes, with those of GPT-2.
_NAMES = {
    "n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings", "n_ctx": "max_position_embeddings",
    "n_inner": "intermediate_size", "n_vocab": "vocab_size",
}  # fmt: skip


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The config with small sizes, where it names them; what it leaves out it still leaves out."""
    config = copy.deepcopy(config)
    if isinstance(config.get("text_config"), dict):
        sizes = dict(_small("gemma3_text", config["text_config"]))
        return config | dict(text_config=config["text_config"] | sizes, vision_config=_VISION)
    return config | _small(config["model_type"], config)


_VISION = dict(
    model_type="siglip_vision_model", hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=2, image_size=8, patch_size=4,
)  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {}


def _small(family: str, config: dict[str, Any]) -> dict[str, Any]:
    """Values for all sizes, of the same form: as many query heads share a key head, or all do."""
    if family not in _DEFAULTS:
        _DEFAULTS[family] = transformers.AutoConfig.for_model(family).to_dict()
    said = _DEFAULTS[family] | config
    heads = said.get("num_attention_heads", said.get("n_head"))
    shared = said.get("num_key_value_heads") or heads
    blocks = 6 if family.startswith("gemma3") else 2
    small: dict[str, Any] = dict(
        hidden_size=D, num_attention_heads=4, num_hidden_layers=blocks, intermediate_size=F,
        max_position_embeddings=CONTEXT, vocab_size=V, max_window_layers=1,
        num_key_value_heads=4 if shared == heads else 1 if shared == 1 else 2,
    )  # fmt: skip
    if said.get("head_dim"):
        small["head_dim"] = 8
    if said.get("sliding_window"):
        small["sliding_window"] = WINDOW
    if config.get("layer_types"):
        small["layer_types"] = config["layer_types"][:blocks]
    if config.get("pad_token_id") is not None:
        small["pad_token_id"] = 0
    theirs = {name: small.get(ours) for name, ours in _NAMES.items() if config.get(name)}
    named = {name: value for name, value in small.items() if name in _sizes(family) | {*config}}
    return named | theirs


def _sizes(family: str) -> set[str]:
    """Sizes that must be small although a config leaves them to the defaults."""
    if family == "gpt2":
        return {"n_embd"}
    own = {"hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"}
    own |= {"vocab_size", "head_dim", "sliding_window", "max_position_embeddings"}
    return own if family == "gpt_neox" else own | {"num_key_value_heads"}


def write_model(folder: Path, config: dict[str, Any]) -> torch.nn.Module:
    """A model as `transformers` makes it of the config, saved beside the config as it is here."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    read = transformers.AutoConfig.from_pretrained(folder)
    sees = read.model_type == "gemma3"
    make = (
        transformers.Gemma3ForConditionalGeneration._from_config
        if sees
        else transformers.AutoModelForCausalLM.from_config
    )
    model = make(read, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config = transformers.GenerationConfig()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return model


def write_tokenizer(folder: Path, published: dict[str, Any]) -> None:
    """The published files, and a byte-level tokenizer that has the named tokens at their ids."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in published["files"].items():
        (folder / name).write_text(json.dumps(content))
    named = {token["content"]: token["id"] for token in published["tokenizer"]["added_tokens"]}
    free = (id for id in range(10**6) if id not in set(named.values()))
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(named))
    vocab = named | dict(zip(alphabet, free, strict=False))
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in named])
    first = _first(published["tokenizer"].get("post_processor"))
    if first:
        inner.post_processor = processors.TemplateProcessing(
            single=[first, "$A"], special_tokens=[(first, named[first])]
        )
    inner.save(str(folder / "tokenizer.json"))


def _first(processor: dict[str, Any] | None) -> str | None:
    """The token that the published post-processor puts first."""
    single = (processor or {}).get("single") or [{}]
    return single[0].get("SpecialToken", {}).get("id") if isinstance(single, list) else None
