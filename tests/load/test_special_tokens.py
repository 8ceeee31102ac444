"""Which token is the BOS of a folder: as `transformers` has it, and where it knows of none."""

from __future__ import annotations

import json

import folders
import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from qkattr.cli.main import main
from qkattr.errors import InputError
from qkattr.load.opening import open_bundle
from qkattr.load.text.tokenizer import Tokenizer

#: At ids that no rule guesses.
SPECIAL = ("<|endoftext|>", "<s>", "</s>", "<bos>", "<eos>", "<|im_end|>")
VOCAB = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]


def write(folder, *, model=None, special=SPECIAL, first=None, generation=None, **files):
    """A folder with a byte-level tokenizer. first: the token that it puts before a text."""
    vocab = [token for token in VOCAB if token not in SPECIAL or token in special]
    inner = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    if first:
        pair = (first, vocab.index(first))
        inner.post_processor = processors.TemplateProcessing(
            single=[first, "$A"], special_tokens=[pair]
        )
    inner.save(str(folder / "tokenizer.json"))
    files = {f"{name}.json": content for name, content in files.items()}
    if model is not None:
        files["config.json"] = model
    if generation is not None:
        files["generation_config.json"] = generation
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def by_transformers(folder) -> str | None:
    return transformers.AutoTokenizer.from_pretrained(folder).bos_token


GPT2, NEOX, QWEN2 = dict(model_type="gpt2"), dict(model_type="gpt_neox"), dict(model_type="qwen2")
GEMMA, LLAMA = dict(model_type="gemma2"), dict(model_type="llama")
BARE = dict(tokenizer_class="PreTrainedTokenizerFast")

#: Folders of which `transformers` knows the BOS, or knows that there is none.
KNOWN = {
    "gpt2's own": dict(model=GPT2, tokenizer_config=dict(model_max_length=1024)),
    "gpt2 without a tokenizer_config": dict(model=GPT2),
    "pythia's class": dict(model=NEOX, tokenizer_config=dict(tokenizer_class="GPTNeoXTokenizer")),
    "the family's class": dict(model=NEOX, tokenizer_config={}),
    "gemma": dict(model=GEMMA, tokenizer_config=dict(tokenizer_class="GemmaTokenizerFast")),
    "a class in config.json": dict(model=LLAMA | dict(tokenizer_class="GPT2TokenizerFast")),
    "a token": dict(model=GPT2, tokenizer_config=dict(bos_token="<s>")),
    "an object": dict(
        model=LLAMA,
        tokenizer_config=dict(
            bos_token=dict(
                __type="AddedToken",
                content="<bos>",
                lstrip=False,
                normalized=False,
                rstrip=False,
                single_word=False,
            )
        ),
    ),
    "null": dict(model=GPT2 | dict(bos_token_id=3), tokenizer_config=dict(bos_token=None)),
    "the map": dict(model=LLAMA, tokenizer_config=BARE, special_tokens_map=dict(bos_token="<s>")),
    "the map before the config": dict(
        model=GPT2,
        tokenizer_config=dict(bos_token="<s>"),
        special_tokens_map=dict(bos_token=dict(content="<bos>")),
    ),
    "a map that is not asked": dict(
        model=GPT2,
        tokenizer_config=dict(bos_token="<s>", added_tokens_decoder={}),
        special_tokens_map=dict(bos_token="<bos>"),
    ),
    "qwen": dict(model=QWEN2 | dict(bos_token_id=256), tokenizer_config={}),
    "qwen of another class": dict(
        model=QWEN2, tokenizer_config=dict(tokenizer_class="GPT2Tokenizer")
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_bos_is_that_of_transformers(tmp_path, name):
    folder = write(tmp_path, **KNOWN[name])
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None and tokenizer.bos == by_transformers(folder)
    if tokenizer.bos is not None:
        assert VOCAB[tokenizer.bos_id] == tokenizer.bos


ID = VOCAB.index("<|im_end|>")


@pytest.mark.parametrize(
    "files, named_by",
    [
        (dict(model=LLAMA | dict(bos_token_id=ID), tokenizer_config=BARE), "config.json"),
        (dict(model=LLAMA | dict(bos_token_id=[ID, 3])), "config.json"),
        (dict(model=dict(model_type="gemma3", text_config=dict(bos_token_id=ID)),
              special=("<|im_end|>",)), "config.json"),
        (dict(model=LLAMA, generation=dict(bos_token_id=ID)), "generation_config.json"),
        (dict(model=LLAMA | dict(bos_token_id=10**6), generation=dict(bos_token_id=ID)),
         "generation_config.json"),
        (dict(model=LLAMA, first="<|im_end|>"), "tokenizer.json"),
    ],
)  # fmt: skip
def test_where_transformers_knows_of_none_the_ids_tell(tmp_path, files, named_by):
    if "special" in files:
        files = files | dict(model=dict(model_type="gemma3", text_config=dict(bos_token_id=256)))
    folder = write(tmp_path, **files)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.bos == "<|im_end|>" and tokenizer.named_by.endswith(named_by)


def test_no_bos_anywhere(tmp_path):
    tokenizer = Tokenizer.from_folder(write(tmp_path, model=LLAMA, tokenizer_config=BARE))
    assert tokenizer.bos is None and by_transformers(tmp_path) is None
    with pytest.raises(InputError, match="the tokenizer names none .*--bos-token"):
        tokenizer.encode("hi", bos=True)
    assert tokenizer.with_bos("<eos>").encode("a", bos=True)[0] == VOCAB.index("<eos>")
    assert tokenizer.with_bos(str(ID)).bos == "<|im_end|>"
    for wrong in ("two tokens", "999999", "", "1" * 30):
        with pytest.raises(InputError, match="the BOS should be one token of the vocabulary"):
            tokenizer.with_bos(wrong)


# Without a tokenizer.json -------------------------------------------------------------------------


TEXTS = ("hi hi  12\n<|endoftext|>hi", " é 世界 it's", "<extra>hi<extra>", "")


def write_vocabulary(folder, *, added=None, config=None, model=GPT2):
    """GPT-2's two files, as old repositories have them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "hi", "Ġhi", "12", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nh i\nĠ hi\n1 2\n")
    for name, content in (
        ("config.json", model), ("added_tokens.json", added), ("tokenizer_config.json", config)
    ):  # fmt: skip
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder, len(tokens)


@pytest.mark.parametrize("how", ["plain", "added", "named"])
def test_gpt2s_older_files_are_read_as_transformers_reads_them(tmp_path, how):
    files = dict(
        plain={}, added=dict(added={"<extra>": 260}), named=dict(config=dict(bos_token="<bos>"))
    )
    folder, _ = write_vocabulary(tmp_path, **files[how])
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids
    assert ours.bos == theirs.bos_token
    (folder / "merges.txt").write_text("h i\nx y z\n")
    with pytest.raises(InputError, match="vocab.json and merges.txt do not make a tokenizer"):
        Tokenizer.from_folder(folder)


def test_older_files_of_another_class_are_left_alone(tmp_path):
    folder, _ = write_vocabulary(tmp_path, model=QWEN2)
    assert Tokenizer.from_folder(folder) is None
    folder, n = write_vocabulary(tmp_path, added={"<extra>": 5000})
    with pytest.raises(InputError, match="'<extra>' should have id 5000"):
        Tokenizer.from_folder(folder)


# With SAEs and on the command line ----------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model whose tokenizer has a BOS, one whose has an EOS alone, and SAEs that want a BOS."""
    root = tmp_path_factory.mktemp("bos")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_model(root / "eos", tokenizer=True)
    (root / "eos" / "tokenizer_config.json").write_text(
        json.dumps(dict(bos_token=None, eos_token=folders.BOS))
    )
    folders.write_model(root / "neither", tokenizer=True)
    (root / "neither" / "tokenizer_config.json").write_text(json.dumps(dict(bos_token=None)))
    folders.write_model(root / "strange", tokenizer=True)
    (root / "strange" / "tokenizer_config.json").write_text(
        json.dumps(dict(bos_token=None, eos_token="<not a token>"))
    )
    folders.write_saes(root / "saes")
    return root


def test_the_eos_stands_for_a_bos_that_saes_want(root):
    """As in TransformerLens, and said."""
    bundle = open_bundle(root / "eos", root / "saes")
    ids, done = bundle.tokenize("hi")
    assert ids[0] == 0 and done == f"BOS {folders.BOS} first, as the SAEs were trained"
    (note,) = bundle.notes
    assert "as in TransformerLens" in note and folders.BOS in note
    assert open_bundle(root / "eos").tokenize("hi")[1] == "no BOS, as the tokenizer does"
    for name in ("neither", "strange"):
        bundle = open_bundle(root / name, root / "saes")
        assert bundle.tokenize([1, 2])[0] == (1, 2)
        with pytest.raises(InputError, match="names none"):
            bundle.tokenize("hi")


def test_another_token_for_the_bos(root):
    bundle = open_bundle(root / "model", root / "saes", bos_token=" hi")
    assert bundle.tokenize("1")[0][0] == bundle.tokenizer.inner.token_to_id("Ġhi")
    assert bundle.tokenize("1")[1] == "BOS Ġhi first, as asked"
    assert bundle.tokenize("1", bos=False)[1] == "no BOS, as asked"


def shown(capsys, *arguments) -> dict:
    assert main([str(a) for a in arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_prompt_options_on_the_command_line(root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    plain = ("tokens", "hi", "--json", "-m")
    assert shown(capsys, *plain, "eos", "-s", "saes")["notes"]
    assert "notes" not in shown(capsys, *plain, "model", "-s", "saes")
    row = shown(capsys, *plain, "model", "--bos-token", "5")["tokens"][0]
    assert row["id"] == 5
    assert len(shown(capsys, *plain, "model", "--bos-token", "5", "--no-bos")["tokens"]) == 1


@pytest.mark.slow
def test_faithfulness_takes_the_options_of_a_prompt(root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    how = ("faithfulness", "hi hi 12", "-m", "model", "-s", "saes", "--measures", "nodes", "--json")
    assert len(shown(capsys, *how)["prompts"][0]["tokens"]) == 5
    found = shown(capsys, *how, "--no-bos", "--no-sink")
    assert len(found["prompts"][0]["tokens"]) == 4
    assert found["settings"]["bos"] is False and found["settings"]["sinks"] is False


def test_what_a_bos_cannot_be(root, refused):
    assert "should be one token" in refused("tokens", "hi", "-m", "model", "--bos-token", "hi hi")
    assert "one token" in refused("trace", "hi", "-m", "model", "-s", "saes", "--bos-token", "")
