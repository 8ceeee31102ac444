"""Tokenizers that GGUF files carry as a SentencePiece vocabulary, against SentencePiece itself."""

from __future__ import annotations

import io

import gguf
import pytest

from qkattr.load.tensors.gguf_container import parse
from qkattr.load.text.gguf_tokenizer import tokenizer_from_gguf

sentencepiece = pytest.importorskip("sentencepiece")

CORPUS = [
    "the cat sat on the mat, and the other cat sat on the hat",
    "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt",
    "def f(x):  return x ** 2  # a comment,   with spaces",
    "naïve café, 10 000 times 3.14",
] * 4
TEXTS = [
    *CORPUS[:4],
    " leading,  double   and triple spaces ",
    "unseen: 日本語 🙂 \n\ttabs",
    "the<tag>cat  <tag>",
    "thethecatcatsatsat",
    "",
]


@pytest.fixture(scope="module", params=["gemma", "llama"])
def pair(request, tmp_path_factory):
    """SentencePiece's own model, and ours from the metadata that llama.cpp's converter writes."""
    prefix, trained = request.param == "llama", io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=trained, model_type="bpe", vocab_size=370,
        byte_fallback=True, add_dummy_prefix=prefix, remove_extra_whitespaces=False,
        normalization_rule_name="identity", minloglevel=2, num_threads=1,
        user_defined_symbols=[] if prefix else ["<tag>", "\u2581\u2581", "\u2581\u2581\u2581"],
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    path = tmp_path_factory.mktemp(request.param) / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    ids = range(theirs.vocab_size())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([theirs.id_to_piece(i) for i in ids])
    writer.add_token_scores([theirs.get_score(i) for i in ids])
    symbols = {"<tag>", "\u2581\u2581", "\u2581\u2581\u2581"} if not prefix else set()
    writer.add_token_types(
        [
            2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i)
            else 4 if theirs.id_to_piece(i) in symbols else 1
            for i in ids
        ]
    )  # fmt: skip
    writer.add_bos_token_id(theirs.bos_id())
    writer.add_unk_token_id(theirs.unk_id())
    writer.add_add_space_prefix(prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return theirs, tokenizer_from_gguf(parse(path))


@pytest.mark.parametrize("text", TEXTS)
def test_cuts_text_as_sentencepiece_does(pair, text):
    theirs, ours = pair
    assert ours.encode(text, bos=False) == theirs.encode(text)
    assert ours.encode(text) == [theirs.bos_id(), *theirs.encode(text)]
    assert ours.inner.decode(theirs.encode(text)) == text
