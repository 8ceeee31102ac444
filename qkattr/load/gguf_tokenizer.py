"""A byte-level BPE tokenizer from the metadata of a GGUF file.

GGUF names its pre-tokenizer (how text is cut before merging) instead of carrying it. The ones here
are those of the Hugging Face tokenizers that the names stand for; for any other name there is no
tokenizer, and prompts are token ids.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Inner

from qkattr.errors import InputError
from qkattr.load.gguf import contents
from qkattr.load.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # token types
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer | None:
    """The pre-tokenizer that a GGUF file calls `name`."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("default", "gpt-2"):
        return gpt2
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if name in ("llama-bpe", "qwen2"):
        split = pre_tokenizers.Split(
            Regex(_LLAMA3 if name == "llama-bpe" else _QWEN2), behavior="isolated"
        )
        return pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    return None


def tokenizer_from_gguf(reader: Any) -> Tokenizer | None:
    """The tokenizer of an open `gguf.GGUFReader`; None unless it is byte-level BPE of a known kind.

    Raises:
      InputError: its tokens, types and merges do not fit one another.
    """
    pre = contents(reader, "tokenizer.ggml.pre", "default")
    pre_tokenizer = _pre_tokenizer(pre)
    if contents(reader, "tokenizer.ggml.model") != "gpt2" or pre_tokenizer is None:
        return None
    tokens = contents(reader, "tokenizer.ggml.tokens", [])
    inner = _bpe(
        tokens, contents(reader, "tokenizer.ggml.merges", []), ignore_merges=pre == "llama-bpe"
    )
    inner.pre_tokenizer = pre_tokenizer
    inner.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        inner.normalizer = normalizers.NFC()
    _add_special(inner, tokens, contents(reader, "tokenizer.ggml.token_type", []))
    bos, eos = (_name(reader, tokens, kind) for kind in ("bos", "eos"))
    if bos and contents(reader, "tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        inner.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, tokens.index(bos))]
        )
    return Tokenizer(inner, bos=bos, eos=eos, template=contents(reader, "tokenizer.chat_template"))


def _bpe(tokens: list[str], merges: list[str], *, ignore_merges: bool) -> Inner:
    try:
        pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
        vocabulary = {token: id for id, token in enumerate(tokens)}
        return Inner(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=ignore_merges))
    except Exception as e:  # the tokenizers library raises bare Exceptions
        raise InputError(
            f"the GGUF file's tokens and merges do not make a BPE tokenizer ({e}); use another file"
        ) from e


def _add_special(inner: Inner, tokens: list[str], kinds: list[int]) -> None:
    """Tokens that are cut out of the text before anything else."""
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(t, normalized=False, special=special)
            for t, k in zip(tokens, kinds, strict=False)
            if k == kind
        ]
        (inner.add_special_tokens if special else inner.add_tokens)(added)


def _name(reader: Any, tokens: list[str], kind: str) -> str | None:
    """The BOS or EOS token."""
    id = contents(reader, f"tokenizer.ggml.{kind}_token_id")
    return tokens[id] if isinstance(id, int) and id < len(tokens) else None
