"""Published model folders: each is read as `transformers` reads it, or refused with the reason."""

from __future__ import annotations

import re

import folders
import jax
import numpy as np
import published_models
import pytest
import torch
import transformers
from families import LOGITS
from published_models import PUBLISHED
from tiny import within

from qkattr.errors import InputError
from qkattr.load.models.families import FAMILIES, from_hf
from qkattr.load.text.tokenizer import Tokenizer
from qkattr.model.transformer import forward

CONFIGS = {name: p for name, p in PUBLISHED.items() if "config.json" in p["files"]}
#: Refused by config.json; what another file tells is refused by the types or names of tensors.
REFUSED = {n for n, p in CONFIGS.items() if p.get("refused") and p.get("told_by") != "tensors"}
READ = sorted(n for n, p in CONFIGS.items() if not p.get("refused"))
PROMPT = np.random.default_rng(0).integers(1, published_models.V, 9).astype(np.int32)


def config_of(name: str) -> dict:
    return CONFIGS[name]["files"]["config.json"]


def test_the_table_covers_every_family():
    assert len(READ) >= 60
    assert {config_of(name)["model_type"] for name in READ} == set(FAMILIES)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_configs_are_read_or_refused(name):
    if name in REFUSED:
        with pytest.raises(InputError, match=re.escape(CONFIGS[name]["line"])):
            from_hf(config_of(name))
    else:
        from_hf(config_of(name))


@pytest.mark.parametrize("name", READ)
def test_logits_equal_those_of_transformers(tmp_path, name):
    """Of a random model with the published config and small sizes."""
    model = published_models.write_model(tmp_path, published_models.shrunk(config_of(name)))
    with torch.no_grad():
        expected = model(torch.tensor(PROMPT)[None].long()).logits[0].numpy()
    config, params = folders.load_hf(tmp_path)
    with jax.disable_jit():  # every model would be compiled for its own constants
        logits, _ = forward(params, jax.numpy.asarray(PROMPT), cfg=config, capture=())
    within(f"{name}: logits", logits, expected, LOGITS)


TOKENIZERS = sorted(
    name
    for name, p in PUBLISHED.items()
    if p.get("tokenizer") and p["files"].get("config.json", {}).get("model_type") in FAMILIES
)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_bos_is_that_of_transformers(tmp_path, name):
    published_models.write_tokenizer(tmp_path, PUBLISHED[name])
    ours = Tokenizer.from_folder(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    if theirs.bos_token_id is not None or ours.named_by.endswith("tokenizer_config.json"):
        assert ours.bos_id == theirs.bos_token_id
    else:  # only the ids of the model's own configs tell
        assert ours.bos is None or "bos_token_id" in ours.named_by
