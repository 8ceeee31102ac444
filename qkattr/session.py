"""A prompt on the device: its residual stream and components, of which all else is asked."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qkattr.errors import InputError, clipped, quoted
from qkattr.load.bundle import Bundle
from qkattr.load.mapped import some
from qkattr.model.forward import residual_stream, unembed
from qkattr.options import TraceOptions
from qkattr.sharding import bucket
from qkattr.sources.components import Components
from qkattr.sources.prompt import decompose_prompt
from qkattr.types import Kind

Progress = Callable[[str], None]

#: What reads as an index. `int` takes more, such as the node id "0_1_2".
_INDEX = re.compile(r"\s*[+-]?[0-9]{1,9}\s*")


@dataclasses.dataclass(frozen=True)
class MainTarget:
    """What effects are effects on. name: in words. covector: `[L+1, T, D]`, what it reads of every
    boundary, with this linearisation of the MLPs."""

    name: str
    covector: Float[Array, "L+1 T D"]
    linearisation: str


@dataclasses.dataclass(frozen=True)
class Session:
    """boundaries: `[L+1, T, D]` of the prompt padded to its bucket. components: of every boundary.
    logits: `[V]` after the last token. ids, tokens: the prompt's, as ids and decoded. precision: of
    all matmuls. target: of the trace, where the prompt was traced."""

    bundle: Bundle
    ids: tuple[int, ...]
    boundaries: Float[Array, "L+1 T D"]
    components: Components
    logits: Float[Array, "V"]
    tokens: list[str]
    precision: str
    target: MainTarget | None = None


def start_session(
    bundle: Bundle,
    ids: Sequence[int],
    opts: TraceOptions,
    progress: Progress = lambda stage: None,
) -> Session:
    """Run the model on a prompt's token ids and decompose every boundary."""
    progress("forward")
    padded = jnp.asarray(pad_tokens(ids))
    boundaries, logits = _boundaries(
        bundle.params,
        padded,
        len(ids) - 1,
        cfg=bundle.config,
        precision=opts.precision,
    )
    if not np.isfinite(logits).all():
        raise InputError(
            f"{bundle.model} computes logits on this prompt that are not finite; "
            f"its weights overflow, give an undamaged checkpoint"
        )
    progress("components")
    components = decompose_prompt(
        bundle.params,
        bundle.dictionaries,
        boundaries,
        padded,
        n_real=len(ids),
        sinks=opts.sinks,
        read=opts.read,
        max_slots=opts.max_slots,
        precision=opts.precision,
    )
    return Session(
        bundle=bundle,
        ids=tuple(ids),
        boundaries=boundaries,
        components=components,
        logits=logits,
        tokens=token_texts(bundle, ids),
        precision=opts.precision,
    )


@partial(jax.jit, static_argnames=("cfg", "precision"))
def _boundaries(params, tokens, last, *, cfg, precision):
    x, captured = residual_stream(
        params, tokens, cfg=cfg, capture=("boundaries",), precision=precision
    )
    return captured.boundaries, unembed(params, x[last], cfg=cfg, precision=precision)


def prompt_labels(session: Session) -> dict[tuple[int, int], str]:
    """What the bundle's labels, or else its cards, call the features active on the prompt."""
    cards, labels = session.bundle.cards, session.bundle.labels
    if cards is None and not labels:
        return {}
    boundary, position, slot = np.nonzero(np.asarray(session.components.kind) == Kind.FEATURE)
    index = np.asarray(session.components.index)[boundary, position, slot]
    active = sorted(set(zip(boundary.tolist(), index.tolist(), strict=True)))
    known = {} if cards is None else cards.labels(active)
    return known | {feature: labels[feature] for feature in active if feature in labels}


def pad_tokens(ids: Sequence[int]) -> np.ndarray:
    """Token ids, right-padded to the bucket of their number."""
    return np.pad(np.asarray(ids, np.int32), (0, bucket(len(ids)) - len(ids)))


def token_text(bundle: Bundle, token: int) -> str:
    """A token as text; its id where there is no tokenizer."""
    return str(token) if bundle.tokenizer is None else bundle.tokenizer.token(int(token))


def token_texts(bundle: Bundle, ids: Sequence[int]) -> list[str]:
    """Every token as text."""
    return [token_text(bundle, i) for i in ids]


def prompt_text(bundle: Bundle, ids: Sequence[int]) -> str:
    """The text of a prompt: its tokens decoded together, without the BOS before them; its ids where
    there is no tokenizer."""
    tokenizer = bundle.tokenizer
    if tokenizer is None:
        return " ".join(map(str, ids))
    begins = len(ids) > 1 and ids[0] == tokenizer.bos_id
    return tokenizer.text(ids[1:] if begins else ids)


def token_id(bundle: Bundle, token: str | int) -> int:
    """A vocabulary id from an id or from text that is exactly one token; without a tokenizer, text
    that reads as a whole number is an id."""
    if bundle.tokenizer is None and isinstance(token, str) and _INDEX.fullmatch(token):
        token = int(token)
    if isinstance(token, int):
        if not 0 <= token < bundle.config.vocab:
            raise InputError(
                f"token id {token} is outside the vocabulary, 0..{bundle.config.vocab - 1}"
            )
        return token
    if bundle.tokenizer is None:
        raise InputError(f"token {token!r} is text and the model has no tokenizer; give a token id")
    ids = bundle.tokenizer.encode(token, bos=False)
    if len(ids) != 1:
        pieces = ", ".join(repr(token_text(bundle, i)) for i in ids)
        raise InputError(
            f"token {token!r} is {len(ids)} tokens ({pieces}); "
            f"give one token, mind its leading space"
        )
    return ids[0]


def find_position(tokens: list[str], where: int | str) -> int:
    """A position from an index, a negative index, or a token's text with an optional `#n`.

    Text that reads as a whole number is an index.

    Raises:
      InputError: there is no such position, or the text names several.
    """
    text = str(where)
    if not _INDEX.fullmatch(text):
        return _find_token(tokens, text)
    index = int(text)
    if not -len(tokens) <= index < len(tokens):
        raise InputError(
            f"position {clipped(text, 20)} is out of range: the prompt has {len(tokens)} tokens; "
            f"give one of 0..{len(tokens) - 1}, or of -{len(tokens)}..-1 from the end"
        )
    return index % len(tokens)


def _find_token(tokens: list[str], text: str) -> int:
    name, _, number = text.rpartition("#")
    numbered = bool(name) and number.isdecimal() and len(number) < 10 and text not in tokens
    name = name if numbered else text
    found = [i for i, token in enumerate(tokens) if token == name]
    found = found or [i for i, token in enumerate(tokens) if token.strip() == name.strip()]
    if not found:
        raise InputError(f"no token {quoted(name)} in the prompt; `qkattr tokens` lists them")
    if numbered:
        if not 1 <= int(number) <= len(found):
            raise InputError(
                f"token {quoted(name)} occurs {len(found)} times, {quoted(text)} asks for number "
                f"{number}; give #1..#{len(found)}"
            )
        return found[int(number) - 1]
    if len(found) > 1:
        listed = some([f"{quoted(f'{name}#{i + 1}')} at {at}" for i, at in enumerate(found)], 8)
        raise InputError(f"token {quoted(name)} is ambiguous: {listed}; say which")
    return found[0]
