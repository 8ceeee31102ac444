"""The table of config attributes against the installed `transformers`: what its classes write, what
they assume, and whether a model computes the same whatever the inert attributes say."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import families
import msgspec
import numpy as np
import pytest
import torch
import transformers
from tiny import within

from qkattr.load.models.families import FAMILIES, attributes, from_hf

DOCS = Path(__file__).parents[2] / "docs"
PACKAGE = Path(transformers.__file__).parent
#: A model of each family, of those in `families`.
MODELS = {
    "gpt2": "gpt2",
    "gpt_neox": "pythia",
    "llama": "llama3.2",
    "mistral": "mistral",
    "qwen2": "qwen2-windowed",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3-text",
    "gemma3": "gemma3",
    "olmo2": "olmo2",
    "phi3": "phi3",
}
#: float32 with another order of operations: `reorder_and_upcast_attn` scales before the product.
ROUNDING = 2e-5


def class_of(family: str) -> type:
    return getattr(transformers, families.MODELS[MODELS[family]].config)


def known(family: str) -> set[str]:
    """What the table knows of a family's configs."""
    arithmetic = attributes.table().base["arithmetic"]
    rest = (attributes.used(family), attributes.inert(family), attributes.fixed(family))
    return {"model_type", *arithmetic}.union(*rest)


def test_the_table_has_the_families_that_are_read():
    assert set(attributes.table().families) == set(FAMILIES) == set(MODELS)


def test_all_that_the_base_class_writes_is_in_the_table():
    writes = set(transformers.PretrainedConfig().to_dict())
    writes |= {field.name for field in dataclasses.fields(transformers.PretrainedConfig)}
    writes |= set(transformers.GenerationConfig().to_dict())
    for family in FAMILIES:
        assert writes <= known(family), f"{sorted(writes - known(family))} of {family}"


@pytest.mark.parametrize("family", MODELS)
def test_all_that_a_class_writes_is_in_the_table(family):
    class_ = class_of(family)
    writes = set(class_().to_dict()) | {field.name for field in dataclasses.fields(class_)}
    assert writes <= known(family), f"{sorted(writes - known(family))} of {family}"


@pytest.mark.parametrize("family", MODELS)
def test_defaults_are_those_of_the_class(family):
    fields = {field.name: field.default for field in dataclasses.fields(class_of(family))}
    for name, default in attributes.defaults(family).items():
        if name in fields:
            assert fields[name] == default, f"{family}: {name}"


@pytest.mark.parametrize("family", MODELS)
def test_defaults_of_older_attributes_are_those_of_rotary(family):
    config, defaults = class_of(family)(), attributes.defaults(family)
    if family == "gemma3_text":
        rope = config.rope_parameters
        assert rope["full_attention"]["rope_theta"] == defaults["rope_theta"]
        assert rope["sliding_attention"]["rope_theta"] == defaults["rope_local_base_freq"]
    elif hasattr(config, "rope_parameters"):
        rope, neox = config.rope_parameters, family == "gpt_neox"
        share = "rotary_pct" if neox else "partial_rotary_factor"
        assert rope["rope_theta"] == defaults["rotary_emb_base" if neox else "rope_theta"]
        assert rope.get("partial_rotary_factor", 1.0) == defaults.get(share, 1.0)


@pytest.mark.parametrize("family", MODELS)
def test_a_config_without_its_inert_attributes_says_the_same(family):
    def without(config: dict, family: str) -> dict:
        inert = attributes.inert(family)
        config = {name: value for name, value in config.items() if name not in inert}
        if "text_config" in config:
            config["text_config"] = without(config["text_config"], "gemma3_text")
        return config

    raw = json.loads((families.saved(MODELS[family]) / "config.json").read_text())
    full, bare = from_hf(raw), from_hf(without(raw, family))
    assert bare == full


# What is computed ---------------------------------------------------------------------------------

#: Left as they are: types of weights, which are rounding; the part of Gemma 3 that sees, since its
#: sizes are those of tensors; what the newest release cannot set, or cannot run with.
_SAME = {"dtype", "torch_dtype", "vision_config", "mm_tokens_per_image"}
_SAME |= {"use_return_dict", "return_dict"}
#: Values that `transformers` accepts and that are not the defaults.
_ODD = {
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
    "num_labels": 3,
    "problem_type": "regression",
    "architectures": ["Other"],
    "attn_implementation": "eager",
    "_attn_implementation": "eager",
    "experts_implementation": "eager",
    "_experts_implementation": "eager",
    "output_attentions": True,
    "pad_token_id": 4,
    "summary_activation": "tanh",
    "summary_type": "mean",
    "image_token_index": 11,
    "image_token_id": 11,
    "auto_map": {"AutoModel": "modeling.Other"},
    "task_specific_params": {"text-generation": {"do_sample": True}},
    "base_model_tp_plan": {},
    "ignore_keys_at_rope_validation": ["other"],
    "tie_last_hidden_states": False,
    "rope_theta": 3.0,
    "partial_rotary_factor": 0.5,
    "hidden_act": "relu",
    "original_max_position_embeddings": 7,
    "bos_token_id": 6,
    "eos_token_id": 7,
    "initializer_range": 0.5,
}


#: Whose last neutral value the newest release checks and refuses.
_NOT_TAKEN = {"gpt2": "add_cross_attention", "gemma3": "per_layer_config"}


@pytest.fixture(autouse=True)
def unchecked_generation(monkeypatch):
    """`generate` checks its own settings, of which a forward pass sees nothing."""
    make = lambda cls, config, **options: cls()
    monkeypatch.setattr(transformers.GenerationConfig, "from_model_config", classmethod(make))


def odd(family: str) -> dict:
    """A value for every inert attribute of a family, unlike its default where that is known."""
    table = attributes.table()
    found = {n: a for group in table.base.values() for n, a in group.items()}
    found |= table.families[family].inert
    values = {}
    for name in sorted(attributes.inert(family) - _SAME):
        default = found[name].default if name in found else None
        value = json.loads(default) if default else None
        kinds = {bool: not value, int: 3, float: 0.37, str: "other", type(None): 2}
        values[name] = _ODD.get(name, 0.5 if "dropout" in name else kinds[type(value)])
    return values


def logits(family: str, change: dict) -> np.ndarray:
    """What the family's model computes of the prompt once its config is changed."""
    name = MODELS[family]
    raw = json.loads((families.saved(name) / "config.json").read_text())
    if "text_config" in raw and family == "gemma3":
        raw["text_config"] |= odd("gemma3_text") if change else {}
    model = families.random_model(name)
    config = class_of(family).from_dict(raw | change, attn_implementation="eager")
    changed = type(model)(config).eval()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        out = changed(torch.tensor(families.PROMPT)[None].long())
    return out[0][0].numpy()


@pytest.mark.parametrize("family", MODELS)
def test_inert_attributes_change_no_logit(family):
    within(family, logits(family, odd(family)), families.reference(MODELS[family]).logits, ROUNDING)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("which", [0, -1])
def test_fixed_attributes_at_their_values_change_no_logit(family, which):
    change = {name: values[which] for name, values in attributes.fixed(family).items()}
    if which == -1:
        change.pop(_NOT_TAKEN.get(family, ""), None)
    within(family, logits(family, change), families.reference(MODELS[family]).logits, ROUNDING)


@pytest.mark.parametrize(
    "family, change",
    [
        ("llama", dict(is_causal=False)),
        ("llama", dict(is_causal=None)),
        ("gpt_neox", dict(rope_parameters=dict(partial_rotary_factor=1.0, rope_theta=1e4))),
        ("gemma2", dict(attn_logit_softcapping=0.1)),
        ("gemma3_text", dict(final_logit_softcapping=0.1)),
        ("mistral", dict(sliding_window=None)),
    ],
)
def test_attributes_of_the_arithmetic_change_logits(family, change):
    """So that the tests above are seen to see: these are not among the inert."""
    assert not set(change) & attributes.inert(family)
    away = np.abs(logits(family, change) - families.reference(MODELS[family]).logits).max()
    assert away > 100 * ROUNDING


# Published configs -------------------------------------------------------------------------------


def published() -> dict[str, dict]:
    """Configs of models that qkattr must read, by name."""
    found = {}
    for file in sorted((Path(__file__).parents[1] / "published/models").glob("*.json")):
        told = json.loads(file.read_text())
        config = told["files"].get("config.json", {})
        if config.get("model_type") in MODELS and not told.get("refused"):
            found[file.stem] = config
    return found


@pytest.mark.parametrize("name", published())
def test_all_attributes_of_a_published_config_are_in_the_table(name):
    def check(config: dict) -> None:
        family, fixed = config["model_type"], attributes.fixed(config["model_type"])
        assert set(config) <= known(family), sorted(set(config) - known(family))
        for attribute in set(config) & set(fixed):
            assert config[attribute] in fixed[attribute], attribute

    config = published()[name]
    check(config)
    if config["model_type"] == "gemma3":
        check({"model_type": "gemma3_text"} | config["text_config"])


@pytest.mark.parametrize(
    "family, names",
    [
        ("gpt2", "n_ctx n_special predict_special_tokens _num_labels output_past summary_type"),
        ("gpt2", "task_specific_params torchscript use_bfloat16 xla_device tf_legacy_loss"),
        ("gpt_neox", "attention_probs_dropout_prob hidden_dropout_prob rope_theta"),
        ("llama", "pretraining_tp transformers.js_config is_llama_config unsloth_version"),
        ("llama", "no_repeat_ngram_size bad_words_ids num_return_sequences max_new_tokens"),
        ("gemma2", "sliding_window_size hidden_act cache_implementation"),
        ("gemma3", "vision_config boi_token_index eoi_token_index image_token_index"),
        ("phi3", "auto_map embd_pdrop resid_pdrop original_max_position_embeddings"),
    ],
)
def test_attributes_of_published_configs_are_inert(family, names):
    assert set(names.split()) <= attributes.inert(family)


@pytest.mark.parametrize(
    "family, name, values",
    [
        ("llama", "quantization_config", (None,)),
        ("gpt2", "pruned_heads", ({}, None)),
        ("gemma2", "sliding_window_pattern", (2, None)),
        ("qwen2", "use_mrope", (False, None)),
        ("mistral", "is_causal", (True,)),
    ],
)
def test_attributes_that_are_inert_at_some_values(family, name, values):
    assert attributes.fixed(family)[name] == values
    assert name not in attributes.inert(family)


@pytest.mark.parametrize("family", MODELS)
def test_an_attribute_is_one_thing(family):
    kinds = [set(f(family)) for f in (attributes.used, attributes.inert, attributes.fixed)]
    assert sum(map(len, kinds)) == len(set.union(*kinds))
    assert "tie_word_embeddings" not in kinds[1] | kinds[2]


# The script --------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    yield importlib.import_module("config_attributes")
    for name in ("config_attributes", "config_judgements"):
        sys.modules.pop(name, None)


def release(folder: Path, files: dict[str, str]) -> Path:
    """An unpacked wheel with these files."""
    for name, text in files.items():
        file = folder / "transformers-9.1.0-py3-none-any/transformers" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder / "transformers-9.1.0-py3-none-any"


BASE = """
class PretrainedConfig:
    def __init__(self, **kwargs):
        self.torchscript = kwargs.pop("torchscript", False)
"""


def test_the_script_knows_all_of_the_installed_release(script):
    found = [script.Release((99, 0, 0), PACKAGE)]
    made = msgspec.toml.decode(script.write(found), type=attributes.AttributeTable)
    assert made.families["llama"].used["hidden_act"].versions == "99.0"
    assert made.families["llama"].used["hidden_act"].default == '"silu"'


@pytest.mark.parametrize(
    "name, text",
    [
        ("configuration_utils.py", BASE + '        self.novel = kwargs.pop("novel", 1)\n'),
        ("configuration_utils.py", BASE.replace("**kwargs", "*, novel=1, **kwargs")),
        ("configuration_utils.py", BASE + '        kwargs.get("novel")\n'),
        ("configuration_utils.py", "@dataclass\nclass PreTrainedConfig:\n    novel: int = 1\n"),
        ("configuration_gpt2.py", "class GPT2Config:\n    def __init__(self, novel=1): ...\n"),
        (
            "models/llama/configuration_llama.py",
            "class LlamaConfig:\n    def __post_init__(self):\n        self.novel = 1\n",
        ),
    ],
)
def test_an_attribute_without_a_judgement_ends_the_run(script, tmp_path, name, text):
    folder = release(tmp_path, {"configuration_utils.py": BASE} | {name: text})
    with pytest.raises(SystemExit, match="sets novel, which has no judgement"):
        script.write(script.releases([str(folder)]))


@pytest.mark.parametrize(
    "code",
    [
        "config.num_beams",
        "self.config.num_beams",
        "getattr(config, 'num_beams', 1)",
        "config.text_config.num_beams",
    ],
)
@pytest.mark.parametrize(
    "inside, seen", [("LlamaModel", True), ("LlamaForTokenClassification", False)]
)
def test_an_inert_attribute_that_is_read_needs_a_reason(script, tmp_path, code, inside, seen):
    text = f"class {inside}:\n    def forward(self, config):\n        return {code}\n"
    files = {"configuration_utils.py": BASE, "models/llama/modeling_llama.py": text}
    found = script.releases([str(release(tmp_path, files))])
    if not seen:
        assert "num_beams" in script.write(found)
        return
    with pytest.raises(SystemExit, match=r"no reason is given for num_beams \(read in 9.1\)"):
        script.write(found)


def test_values_are_read_without_running_anything(script):
    import ast

    values = {"4096 * 32": 131072, "None": None, "1e-5": 1e-5, "interval(min=0)(default=0.5)": 0.5}
    for text, value in values.items():
        assert script.value_of(ast.parse(text, mode="eval").body) == value
    for text in ("self.default_theta", "open('x')", "{i: i for i in range(3)}", "x * 2"):
        assert script.value_of(ast.parse(text, mode="eval").body) is script.NOT_LITERAL


def test_a_folder_that_is_no_release_is_refused(script, tmp_path):
    with pytest.raises(SystemExit, match="is not an unpacked wheel"):
        script.releases([str(tmp_path)])
