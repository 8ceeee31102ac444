"""Tokenizers: BOS, single tokens, chat templates, GGUF, and what `Bundle.tokenize` refuses."""

import dataclasses
import json

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from qkattr.config import BlockConfig, ModelConfig, Rotary
from qkattr.errors import InputError
from qkattr.kinds import NO_WINDOW
from qkattr.load.bundle import Bundle
from qkattr.load.tensors.gguf_container import parse
from qkattr.load.text.gguf_tokenizer import tokenizer_from_gguf
from qkattr.load.text.tokenizer import Tokenizer

BOS, EOS = "<s>", "</s>"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("h", "i"), ("Ġ", "hi"), ("Ġ", "Ġ"), ("1", "2")]
TOKENS = [BOS, EOS, *ALPHABET, *("".join(pair) for pair in MERGES)]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'no' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ m.role }}:{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}bot:{% endif %}"
)
MESSAGES = [{"role": "user", "content": "hi"}]


def byte_level(pre=None):
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(TOKENS)}, merges=MERGES)
    )
    inner.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (BOS, EOS)])
    return inner


def write(folder, inner=None, **config):
    (inner or byte_level()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": BOS, "eos_token": EOS} | config)
    )
    return folder


def tokens(tokenizer, text, bos=None):
    return [tokenizer.token(id) for id in tokenizer.encode(text, bos)]


def test_no_tokenizer_in_the_folder(tmp_path):
    assert Tokenizer.from_folder(tmp_path) is None


@pytest.mark.parametrize("bos_token", [BOS, {"content": BOS, "lstrip": False}])
def test_bos(tmp_path, bos_token):
    tokenizer = Tokenizer.from_folder(write(tmp_path, bos_token=bos_token))
    assert tokenizer.bos_id == 0 and tokenizer.vocab == len(TOKENS)
    assert tokens(tokenizer, "hi hi") == ["hi", " hi"]
    assert tokens(tokenizer, "hi hi", bos=True) == [BOS, "hi", " hi"]
    assert tokens(tokenizer, f"{BOS}hi", bos=True) == [BOS, "hi"]
    assert tokens(tokenizer, "hi", bos=False) == ["hi"]


def test_bos_by_the_tokenizer_itself(tmp_path):
    inner = byte_level()
    inner.post_processor = processors.TemplateProcessing(
        single=[BOS, "$A"], special_tokens=[(BOS, 0)]
    )
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    tokenizer = Tokenizer.from_folder(write(tmp_path, inner))
    assert tokens(tokenizer, "hi hi hi") == [BOS, "hi", " hi", " hi"]  # neither cut nor filled up
    assert tokens(tokenizer, "hi", bos=True) == [BOS, "hi"]
    assert tokens(tokenizer, "hi", bos=False) == ["hi"]


def test_bos_that_does_not_exist(tmp_path):
    tokenizer = Tokenizer.from_folder(write(tmp_path, bos_token=None))
    assert tokenizer.bos_id is None
    with pytest.raises(InputError, match="a BOS was asked for, but the tokenizer names none"):
        tokenizer.encode("hi", bos=True)


def test_every_single_byte_reads(tmp_path):
    tokenizer = Tokenizer.from_folder(write(tmp_path))
    assert tokens(tokenizer, "é\n ") == ["\\xc3", "\\xa9", "\n", " "]
    text = "".join(map(chr, range(128)))
    assert "".join(tokens(tokenizer, text)) == text
    assert tokenizer.token(len(TOKENS)) == f"<{len(TOKENS)}>"


def test_sentencepiece_tokens_read(tmp_path):
    vocab = {"<unk>": 0, "<0xE2>": 1, "<0x0A>": 2, "▁a": 3}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer = Tokenizer.from_folder(write(tmp_path, inner))
    assert [tokenizer.token(i) for i in (1, 2, 3)] == ["\\xe2", "\n", " a"]


def test_broken_files(tmp_path):
    write(tmp_path, bos_token=3)
    with pytest.raises(InputError, match="bos_token should be a string, got 3"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        Tokenizer.from_folder(tmp_path)
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(InputError, match="tokenizer.json is not a tokenizer"):
        Tokenizer.from_folder(tmp_path)
    write(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="chat_template.jinja is not UTF-8 text"):
        Tokenizer.from_folder(tmp_path)


def test_text_that_is_no_unicode(tmp_path):
    with pytest.raises(InputError, match="not valid Unicode"):
        Tokenizer.from_folder(write(tmp_path)).encode("a\ud800")


def test_chat(tmp_path):
    tokenizer = Tokenizer.from_folder(write(tmp_path, chat_template=TEMPLATE))
    assert tokenizer.chat(MESSAGES) == f"{BOS}user:hi{EOS}bot:"
    with pytest.raises(InputError, match="the chat template refuses these messages: no such role"):
        tokenizer.chat([{"role": "no", "content": ""}])
    (tmp_path / "chat_template.jinja").write_text(
        "{{ messages | length }}{{ messages[0] | tojson }}"
    )
    assert Tokenizer.from_folder(tmp_path).chat(MESSAGES) == '1{"role": "user", "content": "hi"}'
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    (tmp_path / "chat_template.jinja").unlink()
    assert Tokenizer.from_folder(write(tmp_path, chat_template=named)).chat(MESSAGES) == "y"


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ range(10000000) | list }}", "Range too big"),
        ("{% if %}", "refuses"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", "refuses"),
    ],
)
def test_templates_run_in_a_sandbox(tmp_path, template, message):
    with pytest.raises(InputError, match=message):
        Tokenizer.from_folder(write(tmp_path, chat_template=template)).chat(MESSAGES)


def test_no_chat_template(tmp_path):
    with pytest.raises(InputError, match="has no chat template"):
        Tokenizer.from_folder(write(tmp_path)).chat(MESSAGES)


def gguf_reader(path, pre="smollm", model="gpt2", merges=MERGES, **flags):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    if "add_bos" in flags:
        writer.add_add_bos_token(flags["add_bos"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return parse(path)


TEXTS = [
    "hi  hi\n\n\tx",
    "a  12 hi's 1234",
    f"{BOS}hi{EOS} é日🙂",
    "HI'S it'LL\r\n  (x)==y",
    "x12  \n 3",
]


@pytest.mark.parametrize(
    "pre, expected",
    [
        ("smollm", ["a", "  ", "1", "2", " hi", "'", "s", " ", "1", "2", "3", "4"]),
        ("gpt-2", ["a", " ", " ", "12", " hi", "'", "s", " ", "12", "3", "4"]),
        ("default", ["a", " ", " ", "12", " hi", "'", "s", " ", "12", "3", "4"]),
        ("llama-bpe", [BOS, "a", " ", " ", "12", " hi", "'", "s", " ", "12", "3", "4"]),
        ("qwen2", ["a", " ", " ", "1", "2", " hi", "'", "s", " ", "1", "2", "3", "4"]),
    ],
)
def test_gguf_pre_tokenizers(tmp_path, pre, expected):
    tokenizer = tokenizer_from_gguf(gguf_reader(tmp_path / "m.gguf", pre))
    assert tokens(tokenizer, TEXTS[1]) == expected
    assert (tokenizer.bos, tokenizer.eos) == (BOS, EOS)
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=False)
        assert tokenizer.inner.decode(ids, skip_special_tokens=False) == text


def test_gguf_smollm_equals_the_hf_tokenizer(tmp_path):
    digits = pre_tokenizers.Digits(individual_digits=True)
    cut = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    theirs, ours = byte_level(cut), tokenizer_from_gguf(gguf_reader(tmp_path / "m.gguf"))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids
    assert ours.chat(MESSAGES) == f"{BOS}user:hi{EOS}bot:"


def test_gguf_bos_flag(tmp_path):
    assert tokens(tokenizer_from_gguf(gguf_reader(tmp_path / "a.gguf", add_bos=True)), "hi") == [
        BOS,
        "hi",
    ]
    assert tokens(
        tokenizer_from_gguf(gguf_reader(tmp_path / "b.gguf", "llama-bpe", add_bos=False)), "hi"
    ) == ["hi"]


def test_gguf_tokenizers_that_are_not_rebuilt(tmp_path):
    assert tokenizer_from_gguf(gguf_reader(tmp_path / "a.gguf", pre="tekken")) is None
    assert tokenizer_from_gguf(gguf_reader(tmp_path / "b.gguf", model="t5")) is None
    with pytest.raises(InputError, match="262 tokens, 262 types and 0 scores"):
        tokenizer_from_gguf(gguf_reader(tmp_path / "d.gguf", model="llama"))
    with pytest.raises(InputError, match="do not make a BPE tokenizer"):
        tokenizer_from_gguf(gguf_reader(tmp_path / "c.gguf", merges=[("zz", "qq")]))


def bundle(tokenizer, bos=None):
    config = ModelConfig(
        family="llama",
        n_blocks=1,
        d_model=4,
        n_heads=1,
        n_kv_heads=1,
        head_dim=4,
        d_mlp=4,
        vocab=len(TOKENS),
        context=6,
        block=BlockConfig(scale=1.0),
        rotary=Rotary(base=1e4, dims=4),
        windows=(NO_WINDOW,),
    )
    empty = dict(read_params=None, dictionaries=None, saes=None, model_hash="", saes_hash=None)
    return Bundle(config=config, tokenizer=tokenizer, model="tiny", bos=bos, **empty)


def test_bundle_says_what_was_done_about_bos():
    plain = bundle(Tokenizer(byte_level(), bos=BOS, eos=EOS, template="{{ messages[0].content }}"))
    hi = TOKENS.index("hi")
    assert plain.tokenize("hi") == ((hi,), "no BOS, as the tokenizer does")
    assert plain.tokenize("hi", bos=True) == ((0, hi), f"BOS {BOS} first, as asked")
    by_saes = dataclasses.replace(plain, bos=True)
    assert by_saes.tokenize("hi") == ((0, hi), f"BOS {BOS} first, as the SAEs were trained")
    assert by_saes.tokenize("hi", bos=False) == ((hi,), "no BOS, as asked")
    for ids in ([hi, 3], (hi, 3), np.array([hi, 3])):
        assert by_saes.tokenize(ids) == ((hi, 3), "token ids taken verbatim")
    assert by_saes.tokenize(MESSAGES) == ((hi,), "BOS as the chat template has it")


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", "the prompt is empty"),
        ([], "the prompt has no tokens"),
        ("hi" * 7, "the prompt has 7 tokens, the model's context is 6"),
        (
            [0, len(TOKENS)],
            rf"token id {len(TOKENS)} at position 1 is outside the model's vocabulary, 0\.\.",
        ),
        ([-1], "token id -1 at position 0"),
        ([True], "a prompt is text, a list of token ids, or a list of messages"),
        ([1.5], "a prompt is text"),
        ([{"role": "user"}], "a prompt is text"),
        (None, "a prompt is text"),
        (np.zeros((2, 2), int), "a prompt is text"),
        (MESSAGES, "has no chat template"),
    ],
)
def test_prompts_that_are_refused(prompt, message):
    with pytest.raises(InputError, match=message):
        bundle(Tokenizer(byte_level(), bos=BOS)).tokenize(prompt)


def test_text_without_a_tokenizer():
    assert bundle(None).tokenize([1, 2])[0] == (1, 2)
    for prompt in ("hi", MESSAGES):
        with pytest.raises(
            InputError, match="tiny has no tokenizer .*; give the prompt as token ids"
        ):
            bundle(None).tokenize(prompt)
