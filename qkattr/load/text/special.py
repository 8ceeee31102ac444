"""Which token is the BOS, and which the EOS, of a tokenizer's folder: as `transformers` finds them.

    tokenizer_config.json       bos_token, also where it is null: then there is none
    special_tokens_map.json     goes before it in folders whose tokenizer_config.json lists no
                                added_tokens_decoder
    the tokenizer's class       what it takes by itself: "<|endoftext|>" for GPT-2
    config.json, generation_config.json     bos_token_id
    tokenizer.json              the special token that it puts first by itself

The last two lines `transformers` does not ask; they are asked here where it knows of no token and
no file says that there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from qkattr.errors import InputError
from qkattr.files import read_json_object

_END = "<|endoftext|>"

#: The BOS and EOS of a tokenizer's class where no file names them.
_OF_CLASS: dict[str, tuple[str | None, str]] = {
    "CodeLlamaTokenizer": ("<s>", "</s>"),
    "GPT2Tokenizer": (_END, _END),
    "GPTNeoXTokenizer": (_END, _END),
    "GemmaTokenizer": ("<bos>", "<eos>"),
    "LlamaTokenizer": ("<s>", "</s>"),
    "Qwen2Tokenizer": (None, _END),
}
#: The class of a family where the files name none.
_OF_FAMILY = {
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}
#: Families whose class is not believed: transformers reads tokenizer.json by itself.
_BARE = ("mistral", "olmo2", "phi3")

CONFIG = "tokenizer_config.json"


def special_tokens(folder: Path, inner: tokenizers.Tokenizer) -> dict[str, tuple[str | None, str]]:
    """The "bos" and the "eos" of a folder, each with the file that names it.

    Raises:
      InputError: a file is no JSON object, or a token is neither text nor `{"content": text}`.
    """
    raw = {name: _optional(folder / name) for name in (CONFIG, "special_tokens_map.json")}
    named = dict.fromkeys(raw[CONFIG], CONFIG)
    if "added_tokens_decoder" not in raw[CONFIG]:
        named |= dict.fromkeys(raw["special_tokens_map.json"], "special_tokens_map.json")
    found = {}
    for i, kind in enumerate(("bos", "eos")):
        key = f"{kind}_token"
        if key in named:
            found[kind] = (_text(raw[named[key]][key], key, named[key]), named[key])
        else:
            found[kind] = next(_unnamed(folder, inner, raw[CONFIG], i), (None, ""))
    return found


def class_of(folder: Path) -> str | None:
    """The class of a folder's tokenizer, without "Fast"; None where nothing says it."""
    return _class_name(_optional(folder / CONFIG), _optional(folder / "config.json"))


def _unnamed(
    folder: Path, inner: tokenizers.Tokenizer, config: dict[str, Any], i: int
) -> Iterator[tuple[str | None, str]]:
    """What is left to go by where no file names the token, the best first. i: 0 BOS, 1 EOS."""
    model = _optional(folder / "config.json")
    name = _class_name(config, model)
    if name in _OF_CLASS:
        token = _OF_CLASS[name][i]
        if token is None or inner.token_to_id(token) is not None:
            yield token, name
    key = ("bos_token_id", "eos_token_id")[i]
    said_of_text = model.get("text_config")
    text_part = said_of_text if isinstance(said_of_text, dict) else {}
    for file, said in (
        ("config.json", model | {key: model.get(key, text_part.get(key))}),
        ("generation_config.json", _optional(folder / "generation_config.json")),
    ):
        ids = said.get(key)
        id = ids[0] if isinstance(ids, list) and ids else ids
        if type(id) is int and 0 <= id < 2**31 and inner.id_to_token(id) is not None:
            yield inner.id_to_token(id), f"{key} of {file}"
    if i == 0:
        first = inner.encode("a").ids[:1]
        if first and first[0] in inner.get_added_tokens_decoder():
            yield inner.id_to_token(first[0]), "tokenizer.json"


def _class_name(config: dict[str, Any], model: dict[str, Any]) -> str | None:
    """The tokenizer's class, as its files or its model's family say."""
    family = model.get("model_type")
    if family in _BARE:
        return None
    if family == "qwen2":  # its files are known to name other classes
        return _OF_FAMILY[family]
    said = config.get("tokenizer_class") or model.get("tokenizer_class")
    if isinstance(said, str):
        return said.removesuffix("Fast")
    return _OF_FAMILY.get(family) if isinstance(family, str) else None


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _text(value: Any, key: str, file: str) -> str | None:
    """A token, written as a string or as `{"content": ...}`."""
    value = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(value, str):
        raise InputError(f"{file}: {key} should be a string, got {value!r:.40}; restore the file")
    return value
