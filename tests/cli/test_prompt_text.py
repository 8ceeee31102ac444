"""Prompts and contexts read as they were written, though a character may lie on several tokens."""

import json
import re
import warnings
from html import unescape

import folders
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

import qkattr
from qkattr.analyses.pairs import pairs
from qkattr.cards.card import Example
from qkattr.characters import joined, shown, whole
from qkattr.cli.card import context
from qkattr.cli.main import main
from qkattr.errors import printable, quoted
from qkattr.export.html import _context, page
from qkattr.features.views import views_of
from qkattr.load.text.tokenizer import Tokenizer

TEXTS = {
    "family": "hi \N{WOMAN}\u200d\N{WOMAN}\u200d\N{GIRL} hi",
    "tone and heart": "\N{WAVING HAND SIGN}\U0001f3fd \N{HEAVY BLACK HEART}\ufe0f\u200d\U0001f525",
    "flag": "\U0001f1eb\U0001f1f7 hi",
    "chinese": "hi 你好，世界。",
    "accents": "cafe\N{COMBINING ACUTE ACCENT} a\u0301\u0323\u0300 é ő",
    "persian": "می\u200cخواهم hi",
    "hindi": "क्\u200dष नमस्ते",
    "spaces": " hi  12 hi ",
}
BOS = folders.BOS


def byte_level():
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(folders.TOKENS)}, merges=folders.MERGES)
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def sentencepiece(prefix):
    """With a byte for what is not in its vocabulary; a text may begin with a space of its own."""
    pieces = [BOS, "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "h", "i", "hi", "▁hi"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    bpe = models.BPE(
        vocab=vocab, merges=[("h", "i"), ("▁", "hi")], byte_fallback=True, unk_token="<unk>"
    )
    inner = tokenizers.Tokenizer(bpe)
    before = [normalizers.Prepend("▁")] if prefix else []
    inner.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return inner


TOKENIZERS = {
    "byte-level": byte_level,
    "sentencepiece": lambda: sentencepiece(True),
    "sentencepiece without a prefix": lambda: sentencepiece(False),
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    found = {}
    for name, make in TOKENIZERS.items():
        root = tmp_path_factory.mktemp("text")
        folders.write_model(root / "model", tokenizer=True)
        folders.write_saes(root / "saes")
        inner = make()
        inner.add_special_tokens([AddedToken(BOS, normalized=False, special=True)])
        inner.save(str(root / "model" / "tokenizer.json"))
        found[name] = root
    return found


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def root(request, roots):
    return roots[request.param]


@pytest.fixture(scope="module")
def bundle(root):
    return qkattr.load(root / "model", root / "saes")


# Text of tokens


@pytest.mark.parametrize("name", TEXTS)
def test_tokens_decoded_together_are_the_text(bundle, name):
    tokenizer, text = bundle.tokenizer, TEXTS[name]
    ids = tokenizer.encode(text, bos=False)
    assert tokenizer.text(ids) == text
    assert joined([tokenizer.token(id) for id in ids]).strip() == text.strip()


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=20))
def test_any_text_of_bytes_comes_back(text):
    inner = byte_level()
    tokenizer = Tokenizer(inner)
    ids = tokenizer.encode(text, bos=False)
    assert tokenizer.text(ids) == text


def test_special_and_added_and_unknown_tokens_are_part_of_the_text():
    inner = byte_level()
    inner.add_special_tokens([AddedToken("<|user|>", normalized=False, special=True)])
    inner.add_tokens(["naïve"])  # each of its characters also stands for a byte
    tokenizer = Tokenizer(inner, bos=BOS)
    text = "<|user|> hi 你 naïve é"
    ids = tokenizer.encode(text, bos=False)
    assert tokenizer.text(ids) == text
    assert tokenizer.text([*ids, 9999, *ids]) == f"{text}<9999>{text}"
    inner.decoder = None
    plain = Tokenizer(inner)
    assert plain.text(plain.encode("hi", bos=False)) == "hi"


def test_tokens_that_end_within_a_character():
    assert whole(["a", r" \xf0\x9f", r"\x91", r"\xa9s", "b"]) == [
        (range(1), "a"),
        (range(1, 4), " 👩s"),
        (range(4, 5), "b"),
    ]
    assert joined([r"\xe4\xbd", "hi", r"\xa0"]) == r"\xe4\xbdhi\xa0"
    assert joined([r"\x", "e4", r"\x41", "é\ud800"]) == r"\xe4\x41é\ud800"
    assert whole([]) == [] and joined([r"\xe4"] * 3) == r"\xe4\xe4\xe4"


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\\")), st.data())
def test_any_text_cut_anywhere_is_put_together(text, data):
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    parts = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    tokens = [part.decode(errors="backslashreplace") for part in parts]
    assert joined(tokens) == text
    assert [i for group, _ in whole(tokens) for i in group] == list(range(len(tokens)))


# Prompts


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", TEXTS)
def test_the_prompt_is_what_was_asked(bundle, name, bos, tmp_path):
    text = TEXTS[name]
    result = qkattr.trace(bundle, text, bos=bos, qk=1)
    assert (result.tokens[0] == BOS) == bos
    assert result.prompt == text == result.to_json()["metadata"]["prompt"]
    result.save(tmp_path)
    saved = qkattr.open(tmp_path)
    assert saved.prompt == text and saved.to_json() == json.loads(json.dumps(result.to_json()))
    assert json.dumps(text, ensure_ascii=False) in repr(saved)
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert f"<title>qkattr: {text}</title>" in html
    cut = any(r"\x" in token for token in result.tokens)
    assert (f"<bdi>{text}</bdi>" in html) == cut
    for said in result.shown_tokens:  # and where each of them is
        assert f">{printable(said).replace('<', '&lt;').replace('>', '&gt;')}<sub>" in html


def test_a_bos_that_was_typed(bundle):
    ids = bundle.tokenizer.encode(f"{BOS}hi 你", bos=False)
    begin = bundle.tokenizer.bos_id
    assert qkattr.trace(bundle, ids, qk=0).prompt.strip() == "hi 你"
    assert qkattr.trace(bundle, [begin, *ids], qk=0).prompt.replace(" ", "") == f"{BOS}hi你"
    assert qkattr.trace(bundle, [begin], qk=0).prompt == BOS


def test_a_result_of_before_prompts_were_kept(bundle, tmp_path):
    result = qkattr.trace(bundle, TEXTS["family"], bos=False, qk=0)
    result.save(tmp_path)
    file = tmp_path / "graph.json"
    graph = json.loads(file.read_text(encoding="utf-8"))
    del graph["qkattr"]["prompt"]
    file.write_text(json.dumps(graph))
    assert qkattr.open(tmp_path).prompt.strip() == TEXTS["family"]
    graph["qkattr"]["prompt"] = 3
    file.write_text(json.dumps(graph))
    with pytest.raises(qkattr.InputError, match="damaged result"):
        qkattr.open(tmp_path)


def test_ids_without_a_tokenizer(roots, tmp_path):
    folders.write_model(tmp_path / "model")
    bundle = qkattr.load(tmp_path / "model", roots["byte-level"] / "saes")
    result = qkattr.trace(bundle, [5, 67, 8], qk=0)
    assert result.prompt == "5 67 8" and "<title>qkattr: 5 67 8</title>" in page(result)


def test_reports_and_figures_name_the_prompt(bundle, tmp_path):
    text = TEXTS["chinese"]
    ids = bundle.tokenize(text, bos=True)[0]
    assert bundle.text(ids) == text
    found = pairs(qkattr.subject(bundle, text), top=3)
    assert found.prompt == text == found.to_json()["prompt"]
    from qkattr.export.qk_figures import pairs_figure

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # characters that no font has
        for name in ("pairs.svg", "pairs.png"):
            pairs_figure(found, tmp_path / name)
    drawn = re.sub(r"<[^>]*>", "", (tmp_path / "pairs.svg").read_text(encoding="utf-8"))
    assert text in unescape(drawn)


def test_the_command_prints_the_prompt_as_ascii(roots, capsys, tmp_path):
    root, text = roots["byte-level"], TEXTS["family"]
    command = ["trace", text, "-m", str(root / "model"), "-s", str(root / "saes")]
    assert main([*command, "--json", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.isascii() and json.loads(out)["metadata"]["prompt"] == text


# Contexts of features


def test_contexts_show_whole_characters():
    tokens = ["hi", r" \xf0\x9f", r"\x91", r"\xa9", r"\xe4\xbd", r"\xa0", "好"]
    activations = [0.0, 0.5, 2.0, 0.0, 0.0, 0.0, 1.0]
    example = Example("Top", tokens, activations, at=2, row=0, position=2)
    runs = [(run["text"], run["shade"], run["at"]) for run in _context(example, 2.0)["runs"]]
    assert runs == [("hi", 0, False), (" 👩", 100, True), ("你", 0, False), ("好", 50, False)]
    assert context(example, 2.0).plain.strip() == "2  hi‹ 👩›你好"


@pytest.mark.parametrize(
    "tokens, said",
    [
        (["hi", r" \xf0\x9f", r"\x98", r"\x80", "!"], ["hi", " 😀 1/3", " 😀 2/3", " 😀 3/3", "!"]),
        ([r"\xe4\xbd", r"\xa0"], ["你 1/2", "你 2/2"]),
        ([r"\xf0\x9f", "a"], ["<0xF0><0x9F>", "a"]),
        ([r"\x80", "a"], ["<0x80>", "a"]),
        ([r"a \xf0\x9f"], ["a <0xF0><0x9F>"]),
        (["你好", "é", r"C:\x41", ""], ["你好", "é", r"C:\x41", ""]),
        ([], []),
    ],
)
def test_tokens_are_shown_as_the_characters_they_are_part_of(tokens, said):
    assert shown(tokens) == said


def test_labels_of_two_tokens_show_whole_characters():
    texts = {0: r" \xe4\xbd", 1: r"\xa0", 2: " Hi"}
    rows = np.array([[0, 1, 2, 0, 1, 2]])
    view = views_of(rows, texts)[5]  # the ends of two words
    said = {view.phrase([i]) for i in set(view.ids.ravel().tolist()) - {0}}
    assert said == {"the end of '你'", r"the end of '\\xa0 hi'", r"the end of 'hi \\xe4\\xbd'"}


# What is safe to show


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_shown_as_it_is(name):
    assert printable(TEXTS[name]) == TEXTS[name]
    assert quoted(TEXTS[name]) == f"'{TEXTS[name]}'"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\u200db", r"a\u200db"),
        ("👩\u200d", r"👩\u200d"),
        ("\u200c你", r"\u200c你"),
        ("你\u200d\u200d好", r"你\u200d\u200d好"),
        ("👩\u200d\u202e", r"👩\u200d\u202e"),
        ("\ud83d\udc69\u200d你", r"\ud83d\udc69\u200d你"),
        ("\U000e0041\U0001f3f4\U000e0067", "\\U000e0041\U0001f3f4\\U000e0067"),
        ("\u2066hi\u2069\ufeff\u00ad", r"\u2066hi\u2069\ufeff\xad"),
    ],
)
def test_what_has_no_glyph_is_written_out(text, shown):
    assert printable(text) == shown and quoted(text) == f"'{shown}'"


@given(st.text())
def test_quoted_text_is_as_python_writes_it(text):
    assert all(c.isprintable() or c in "\u200c\u200d" for c in printable(text))
    if not {"\u200c", "\u200d"} & set(text):
        assert quoted(text, 10**9) == repr(text)
