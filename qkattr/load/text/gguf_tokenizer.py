"""A BPE tokenizer from the metadata of a GGUF file: byte-level, or SentencePiece's.

GGUF names the pre-tokenizer (how text is cut before merging) of a byte-level BPE instead of
carrying it. The ones here are those of the Hugging Face tokenizers that the names stand for; for
any other name there is no tokenizer, and prompts are token ids. SentencePiece (Llama 2, Mistral,
Gemma) joins the two neighbours that make the piece of the highest score: as merges, all splits of
the pieces in the order of their scores.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Inner

from qkattr.errors import InputError
from qkattr.load.tensors.gguf_container import Container
from qkattr.load.text.tokenizer import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # token types
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # a space in a SentencePiece vocabulary
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


def tokenizer_from_gguf(reader: Container) -> Tokenizer | None:
    """The tokenizer of a GGUF file; None unless it is BPE of a known kind.

    Raises:
      InputError: its tokens, types, scores and merges do not fit one another.
    """
    model, tokens = reader.get("tokenizer.ggml.model"), _list(reader, "tokens", str)
    found = None
    if model == "gpt2":
        found = _byte_level(reader, tokens)
    elif model == "llama" and tokens:
        found = _sentencepiece(reader, tokens)
    if found is None:
        return None
    inner, begins = found
    bos, eos = (_name(reader, tokens, kind) for kind in ("bos", "eos"))
    if bos and reader.get("tokenizer.ggml.add_bos_token", begins):
        inner.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, tokens.index(bos))]
        )
    template = reader.get("tokenizer.chat_template")
    return Tokenizer(inner, bos, eos, template if isinstance(template, str) else None)


def _list(reader: Container, key: str, kind: type) -> list[Any]:
    """An array of the tokenizer's metadata; empty where there is none."""
    values = reader.get(f"tokenizer.ggml.{key}", [])
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise InputError(
            f"the GGUF file's tokenizer.ggml.{key} is {values!r:.40}, expected an array of "
            f"{kind.__name__}; use another file"
        )
    return values


def _byte_level(reader: Container, tokens: list[str]) -> tuple[Inner, bool] | None:
    """And whether text begins with a BOS where the file does not say; so below."""
    pre = reader.get("tokenizer.ggml.pre", "default")
    pre_tokenizer = _pre_tokenizer(pre)
    if pre_tokenizer is None:
        return None
    merges = [tuple(merge.split(" ")) for merge in _list(reader, "merges", str)]
    inner = _bpe(tokens, merges, ignore_merges=pre == "llama-bpe")
    inner.pre_tokenizer = pre_tokenizer
    inner.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        inner.normalizer = normalizers.NFC()
    _add_special(inner, tokens, _list(reader, "token_type", int))
    return inner, pre == "llama-bpe"


def _sentencepiece(reader: Container, tokens: list[str]) -> tuple[Inner, bool] | None:
    """Of a vocabulary that changes nothing in the text but its spaces."""
    if any(
        reader.get(f"tokenizer.ggml.{key}")
        for key in ("precompiled_charsmap", "remove_extra_whitespaces")
    ):
        return None
    kinds, scores = _list(reader, "token_type", int), _list(reader, "scores", float)
    if not len(tokens) == len(kinds) == len(scores):
        raise InputError(
            f"the GGUF file has {len(tokens)} tokens, {len(kinds)} types and {len(scores)} scores; "
            "use another file"
        )
    unknown = _name(reader, tokens, "unknown") or tokens[0]
    merges = _merges(tokens, kinds, scores)
    inner = _bpe(tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    prefix = bool(reader.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    before: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
    inner.normalizer = normalizers.Sequence([*before, spaces])
    after: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    # Pieces that are cut out first are looked for among the spaces as they are written by then.
    _add_special(inner, tokens, kinds, normalized=not prefix)
    return inner, True


def _merges(tokens: list[str], kinds: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Two neighbours that make a piece, those of the highest score first."""
    ids = {token: id for id, token in enumerate(tokens) if kinds[id] in (_NORMAL, _USER_DEFINED)}
    order = sorted((id for id in ids.values() if kinds[id] == _NORMAL), key=lambda id: -scores[id])
    return [
        (left, right)
        for token in map(tokens.__getitem__, order)
        for i in range(1, len(token))
        if (left := token[:i]) in ids and (right := token[i:]) in ids
    ]


def _bpe(tokens: list[str], merges: list[Any], **options: Any) -> Inner:
    try:
        vocabulary = {token: id for id, token in enumerate(tokens)}
        return Inner(models.BPE(vocab=vocabulary, merges=merges, **options))
    except Exception as e:  # the tokenizers library raises bare Exceptions
        raise InputError(
            f"the GGUF file's tokens and merges do not make a BPE tokenizer ({e}); use another file"
        ) from e


def _add_special(
    inner: Inner, tokens: list[str], kinds: list[int], *, normalized: bool = False
) -> None:
    """Tokens that are cut out of the text before anything else.

    normalized: those that are not special are looked for in the normalised text.
    """
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(t, normalized=normalized and not special, special=special)
            for t, k in zip(tokens, kinds, strict=False)
            if k == kind
        ]
        (inner.add_special_tokens if special else inner.add_tokens)(added)


def _name(reader: Container, tokens: list[str], kind: str) -> str | None:
    """The BOS or EOS token."""
    id = reader.get(f"tokenizer.ggml.{kind}_token_id")
    return tokens[id] if isinstance(id, int) and id < len(tokens) else None
