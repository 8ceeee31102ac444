"""Text and chat messages to token ids, and a token id to what it stands for in a text.

A thin layer over the `tokenizers` library that settles what it leaves open: whether a text gets a
BOS, how one token of a byte-level vocabulary reads, and the chat template, rendered in jinja2's
sandbox.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken

from qkattr.characters import joined
from qkattr.errors import InputError, quoted
from qkattr.files import read_json_object, read_text
from qkattr.load.text.special import CONFIG, class_of, special_tokens
from qkattr.load.text.vocabulary import from_vocabulary

Message = dict[str, Any]  # {"role": ..., "content": ...}

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a byte in a SentencePiece vocabulary
#: Classes whose text is cut as GPT-2's.
VOCABULARIES = ("GPT2Tokenizer",)
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # a space in a SentencePiece vocabulary


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer, its special tokens and its chat template; None is what the files do not give.

    named_by: what names the BOS, see `special_tokens`.
    """

    inner: tokenizers.Tokenizer
    bos: str | None = None
    eos: str | None = None
    template: str | None = None
    named_by: str = ""

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer | None:
        """Read tokenizer.json (or GPT-2's older files), its config, chat_template.jinja and what
        names special tokens; None without the first."""
        folder = Path(folder)
        path, config_path, template_path = (
            folder / name for name in ("tokenizer.json", CONFIG, "chat_template.jinja")
        )
        inner = _read(path) if path.is_file() else _from_vocabulary(folder)
        if inner is None:
            return None
        config = read_json_object(config_path) if config_path.is_file() else {}
        template = _template(config.get("chat_template"))
        if template_path.is_file():
            template = read_text(template_path)
        special = special_tokens(folder, inner)
        (bos, named_by), (eos, _) = special["bos"], special["eos"]
        return cls(inner, bos, eos, template, named_by)

    def has(self, token: str | None) -> bool:
        """Whether a text is a token of the vocabulary."""
        return token is not None and self.inner.token_to_id(token) is not None

    def with_bos(self, token: str) -> Tokenizer:
        """The tokenizer with another BOS. token: its id in digits, or its text.

        Raises:
          InputError: the vocabulary has no such token.
        """
        if token.isdecimal() and len(token) < 10:
            ids = [int(token)]
        elif (id := self.inner.token_to_id(token)) is not None:
            ids = [id]
        else:
            ids = self.encode(token, bos=False)
        known = self.inner.id_to_token(ids[0]) if len(ids) == 1 else None
        if known is None:
            raise InputError(
                f"the BOS should be one token of the vocabulary, got {quoted(token, 40)}; give its "
                "text or its id"
            )
        return dataclasses.replace(self, bos=known, named_by="")

    @property
    def vocab(self) -> int:
        """How many ids the tokenizer knows; a model may have more."""
        return self.inner.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        return None if self.bos is None else self.inner.token_to_id(self.bos)

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Token ids of a text.

        bos: None: as the tokenizer does by itself. True: one BOS first, not doubled when the text
          begins with it.
        False: none is added.
        """
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise InputError(
                "the text is not valid Unicode (it holds half of a surrogate pair); pass UTF-8 text"
            )
        ids = self.inner.encode(text, add_special_tokens=bos is None).ids
        if not bos or ids[:1] == [self.need_bos()]:
            return ids
        return [self.need_bos(), *ids]

    def need_bos(self) -> int:
        """The id of the BOS.

        Raises:
          InputError: there is none.
        """
        if self.bos_id is None:
            raise InputError(
                "a BOS was asked for, but the tokenizer names none (bos_token); name a token with "
                "--bos-token (bos_token=...), or ask for no BOS"
            )
        return self.bos_id

    def token(self, id: int) -> str:
        """What one token adds to a text. Bytes that are no UTF-8 by themselves read as `\\xe2`."""
        text = self.inner.id_to_token(id)
        if text is None:
            return f"<{id}>"  # the model's vocabulary is padded beyond the tokenizer's
        if id in self._added:
            return text
        if self._byte_level and all(c in _byte_of() for c in text):
            return bytes(_byte_of()[c] for c in text).decode(errors="backslashreplace")
        if byte := _BYTE_TOKEN.fullmatch(text):
            return bytes.fromhex(byte[1]).decode(errors="backslashreplace")
        return text.replace(_SPACE, " ")

    def text(self, ids: Sequence[int]) -> str:
        """The text of some tokens, decoded together: a character may lie on several of them.
        Special tokens are part of it."""
        parts = []
        for alone, run in itertools.groupby(ids, key=self._stands_alone):
            run = [int(id) for id in run]
            if alone:
                parts.append(joined([self.token(id) for id in run]))
            else:
                parts.append(self.inner.decode(run, skip_special_tokens=False))
        return "".join(parts)

    def _stands_alone(self, id: int) -> bool:
        """Whether the tokenizer's decoder would drop a token, or take its text for bytes."""
        unknown = self.inner.decoder is None or self.inner.id_to_token(int(id)) is None
        return unknown or (self._byte_level and id in self._added)

    def chat(self, messages: Sequence[Message]) -> str:
        """The text of a conversation up to the assistant's next words. Encode it with `bos=False`.

        Raises:
          InputError: there is no chat template, or it fails on these messages.
        """
        if self.template is None:
            raise InputError(
                "the tokenizer has no chat template; give the prompt as text or as token ids"
            )
        try:
            return (
                _environment()
                .from_string(self.template)
                .render(
                    messages=list(messages),
                    bos_token=self.bos or "",
                    eos_token=self.eos or "",
                    add_generation_prompt=True,
                )
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            RecursionError,
        ) as e:
            raise InputError(
                f"the chat template refuses these messages: {e}; check their roles and contents"
            ) from e

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.inner.get_added_tokens_decoder())

    @cached_property
    def _byte_level(self) -> bool:
        decoder = self.inner.decoder
        return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()


def _read(path: Path) -> tokenizers.Tokenizer:
    try:
        inner = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except Exception as e:  # the tokenizers library raises bare Exceptions
        raise InputError(f"{path} is not a tokenizer ({e}); copy or download it again") from e
    inner.no_truncation()  # a prompt is never cut or filled up in silence
    inner.no_padding()
    return inner


def _from_vocabulary(folder: Path) -> tokenizers.Tokenizer | None:
    """GPT-2's tokenizer in its older files, where the folder's tokenizer is of its class."""
    inner = from_vocabulary(folder) if class_of(folder) in VOCABULARIES else None
    if inner is not None:
        named = [token for token, _ in special_tokens(folder, inner).values() if token]
        inner.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in named])
    return inner


def _template(value: Any) -> str | None:
    """The chat template, or the one named "default" among several."""
    if isinstance(value, list):
        value = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }.get("default")
    return value if isinstance(value, str) else None


def _environment() -> jinja2.Environment:
    """What Hugging Face templates are written for, less the date: prompts must repeat."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    return environment


@cache
def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable Latin-1 stands
    for itself, and the other bytes, in order, are the characters from 256 on (GPT-2)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
