"""A model with what belongs to it, and how its prompts become token ids; `opening` makes one.

Nothing here needs JAX until weights are read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qkattr.config import ModelConfig, ModelFacts
from qkattr.errors import InputError
from qkattr.kinds import Labels
from qkattr.load.registry import Source
from qkattr.load.text.tokenizer import Message, Tokenizer
from qkattr.positions import INDEX

if TYPE_CHECKING:
    from qkattr.cards.columns import Cards
    from qkattr.sources.dictionary import Dictionary
    from qkattr.types import Params

Prompt = str | Sequence[int] | Sequence[Message]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Bundle:
    """A model with what belongs to it. Its weights are read when `params` is first used.

    tokenizer: None when the model's files hold none; prompts are token ids then. dictionaries: one
    a boundary, or None without SAEs. model, saes, missing: as they were asked for. model_hash,
    saes_hash: see `fingerprint`. bos: whether text gets a BOS, and why; None: as the tokenizer
    does, also when the SAEs disagree. accepted: attributes of the model's config that are not known
    and that the user accepts. read_cards: the cards of the SAEs' features, which
    label what is traced: those that come with "smollm2", or see `qkattr.features.with_cards`.
    labels: of features, by (boundary, index); they go before the cards'. source: where Neuronpedia
    has cards of the SAEs. notes: what to know about the model and the SAEs, and what of it is not
    verified.
    """

    config: ModelConfig
    read_params: Callable[[], Params] = dataclasses.field(repr=False)
    tokenizer: Tokenizer | None
    dictionaries: tuple[Dictionary | None, ...] | None
    model: str
    saes: str | None
    model_hash: str
    saes_hash: str | None
    bos: bool | None = None
    bos_why: str = "as the SAEs were trained"
    accepted: tuple[str, ...] = ()
    dtype: str = "float32"
    missing: str = "error"
    read_cards: Callable[[], Cards] | None = dataclasses.field(default=None, repr=False)
    labels: Labels = dataclasses.field(default_factory=dict, repr=False)
    source: Source | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        config, saes = self.config, [d for d in self.dictionaries or () if d is not None]
        widths = sorted({d.width for d in saes})
        of = f", {len(saes)} SAEs of {' and '.join(map(str, widths))} features" if saes else ""
        return (
            f"<Bundle {self.model}: {config.family}, {config.n_blocks} blocks, "
            f"d_model {config.d_model}, {config.n_heads} heads{of}, {self.dtype}>"
        )

    @property
    def facts(self) -> ModelFacts:
        """What results keep of it."""
        return ModelFacts(
            model=self.model,
            saes=self.saes,
            dtype=self.dtype,
            neuronpedia=self.source and self.source.to_json(),
            missing=self.missing,
            accepted=self.accepted,
            notes=self.notes,
            n_blocks=self.config.n_blocks,
            n_heads=self.config.n_heads,
            windows=self.config.windows,
        )

    @functools.cached_property
    def params(self) -> Params:
        """The weights.

        Raises:
          InputError: a tensor cannot be read or is not finite.
        """
        return self.read_params()

    @functools.cached_property
    def cards(self) -> Cards | None:
        """The feature cards, if there are any."""
        return None if self.read_cards is None else self.read_cards()

    def tokenize(self, prompt: Prompt, bos: bool | None = None) -> tuple[tuple[int, ...], str]:
        """Token ids of a prompt, and a phrase that says what was done about its BOS.

        prompt: text; token ids, taken verbatim; or chat messages, `{"role": ..., "content": ...}`,
          which go through the tokenizer's template. bos: whether text begins with a BOS; None:
          `Bundle.bos`.

        Raises:
          InputError: there are no tokens, more than the model's context, or one outside its
            vocabulary; or text was given and there is no tokenizer.
        """
        ids, done = self._ids(prompt, bos)
        if not ids:
            raise InputError("the prompt has no tokens; give at least one")
        if len(ids) > self.config.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens, the model's context is "
                f"{self.config.context}; shorten it"
            )
        for position, id in enumerate(ids):
            if not 0 <= id < self.config.vocab:
                last = self.config.vocab - 1
                raise InputError(
                    f"token id {id} at position {position} is outside the model's vocabulary, "
                    f"0..{last}"
                )
        return tuple(ids), done

    def token(self, id: int) -> str:
        """A token as text; its id where there is no tokenizer."""
        return str(id) if self.tokenizer is None else self.tokenizer.token(int(id))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Every token as text."""
        return [self.token(i) for i in ids]

    def text(self, ids: Sequence[int]) -> str:
        """The text of a prompt: its tokens decoded together, without the BOS before them; its ids
        where there is no tokenizer."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        begins = len(ids) > 1 and ids[0] == self.tokenizer.bos_id
        return self.tokenizer.text(ids[1:] if begins else ids)

    def token_id(self, token: str | int) -> int:
        """A vocabulary id from an id or from text that is exactly one token; without a tokenizer,
        text that reads as a whole number is an id.

        Raises:
          InputError: it is none.
        """
        if self.tokenizer is None and isinstance(token, str) and INDEX.fullmatch(token):
            token = int(token)
        if isinstance(token, int):
            if not 0 <= token < self.config.vocab:
                raise InputError(
                    f"token id {token} is outside the vocabulary, 0..{self.config.vocab - 1}"
                )
            return token
        if self.tokenizer is None:
            raise InputError(
                f"token {token!r} is text and the model has no tokenizer; give a token id"
            )
        ids = self.tokenizer.encode(token, bos=False)
        if len(ids) != 1:
            pieces = ", ".join(repr(self.token(i)) for i in ids)
            raise InputError(
                f"token {token!r} is {len(ids)} tokens ({pieces}); "
                f"give one token, mind its leading space"
            )
        return ids[0]

    def _ids(self, prompt: Prompt, bos: bool | None) -> tuple[list[int], str]:
        if isinstance(prompt, str):
            return self._text(prompt, bos)
        array: Any = prompt
        items = array.tolist() if hasattr(array, "tolist") else array
        if isinstance(items, list | tuple):
            if all(
                isinstance(item, int | np.integer) and not isinstance(item, bool) for item in items
            ):
                return [int(item) for item in items], "token ids taken verbatim"
            if all(_is_message(item) for item in items):
                tokenizer = self._need_tokenizer()
                return tokenizer.encode(
                    tokenizer.chat(items), bos=False
                ), "BOS as the chat template has it"
        raise InputError(
            "a prompt is text, a list of token ids, or a list of messages with role and "
            f"content; got {prompt!r:.60}"
        )

    def _text(self, text: str, bos: bool | None) -> tuple[list[int], str]:
        tokenizer = self._need_tokenizer()
        if not text:
            raise InputError("the prompt is empty; give some text")
        asked = self.bos if bos is None else bos
        by = (
            "as asked"
            if bos is not None
            else "as the tokenizer does"
            if asked is None
            else self.bos_why
        )
        ids = tokenizer.encode(text, bos=asked)
        first = tokenizer.bos is not None and ids[:1] == [tokenizer.bos_id]
        if not first:
            return ids, f"no BOS, {by}"
        named = f" ({tokenizer.named_by})" if "_token_id" in tokenizer.named_by else ""
        return ids, f"BOS {tokenizer.bos}{named} first, {by}"

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                f"{self.model} has no tokenizer that qkattr can read; give the prompt as token ids"
            )
        return self.tokenizer


def need_bundle(value: object) -> None:
    """Raise `InputError` unless the value is a bundle."""
    if not isinstance(value, Bundle):
        raise InputError(
            f"the first argument should be a bundle from qkattr.load, got {value!r:.40}; the "
            "prompt comes after it"
        )


def _is_message(item: object) -> bool:
    return isinstance(item, dict) and isinstance(item.get("role"), str) and "content" in item
