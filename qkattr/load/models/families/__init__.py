"""Model families: what a Hugging Face `config.json` says, and which tensor is which weight.

A family is one `Family`: a function that reads its config, and tables of its tensors. Nothing else
in qkattr knows families apart: what differs is a value of the config, or a weight that is there or
None.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from qkattr.config import ModelConfig
from qkattr.errors import InputError, quoted
from qkattr.load.models.families.gemma import GEMMA2, GEMMA3, GEMMA3_TEXT
from qkattr.load.models.families.gpt import GPT2, NEOX
from qkattr.load.models.families.llama import LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3
from qkattr.load.models.families.refused import REFUSED
from qkattr.load.models.families.tables import Family

#: By `model_type`.
FAMILIES: dict[str, Family] = {
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gemma3_text": GEMMA3_TEXT,
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "olmo2": OLMO2,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}


def from_hf(raw: Mapping[str, Any], accept: Collection[str] = ()) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face `config.json`.

    accept: attributes to pass over although they are not known to change nothing.

    Raises:
      InputError: the family is not known, an attribute is missing or of the wrong type, or one is
        not handled.
    """
    family = raw.get("model_type")
    if isinstance(family, str) and family in REFUSED:
        raise InputError(
            f"config.json: model_type {family!r} is refused: {REFUSED[family]}; "
            f"qkattr implements {', '.join(FAMILIES)}"
        )
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(
            f"config.json: model_type is {family!r:.60}; qkattr implements {', '.join(FAMILIES)}"
        )
    inner = raw.get("text_config")
    there = {*raw, *(inner if isinstance(inner, dict) else ())}
    if absent := [name for name in accept if name not in there]:
        raise InputError(
            f"accept names {quoted(absent[0])}, which config.json does not have; leave it out"
        )
    return FAMILIES[family].config(raw, accept)
