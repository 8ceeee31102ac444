"""The one door: a prompt with its model. Every analysis, command and page enters here.

    subject = qkattr.subject(bundle, prompt)    tokenized once; nothing is computed yet
    subject.place(23, 7, -1, " Sally")          what a person types -> (block, head, query, key)
    subject.boundaries, .components, .labels    computed when they are first used, and kept

A `Result` is a subject too: analyses take either (`enter`). One that was opened from disk reads its
model when something is asked that it does not hold. Nothing here needs JAX until then.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from qkattr.config import ModelFacts
from qkattr.errors import InputError
from qkattr.kinds import Kind, Labels, Place
from qkattr.load.bundle import Bundle, Prompt, need_bundle
from qkattr.options import SubjectOptions, make_options
from qkattr.positions import find_place, find_position
from qkattr.sources.table import ComponentTable

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from qkattr.sources.components import Components

#: Called with the name of each stage as it begins.
Stages = Callable[[str], None]


def quiet(stage: str) -> None:
    """Says nothing."""


@dataclasses.dataclass(frozen=True)
class MainTarget:
    """What effects are effects on.

    name: in words.
    covector: `[L+1, T, D]` what it reads of every boundary, with this linearisation of the MLPs.
    live: `[L, T, N, H]` what it reads of every head's output in the live model.
    """

    name: str
    covector: Float[Array, "L+1 T D"]
    live: Float[Array, "L T N H"]
    linearisation: str


@dataclasses.dataclass(eq=False, repr=False)
class Subject:
    """A prompt with its model. Nothing of it changes once it is made.

    facts: of the model, known before it is opened.
    ids, tokens: the prompt's, as ids and decoded.
    bos: what was done about its BOS.
    options: how it becomes components.
    opening: gives the bundle when something must be computed.
    given: labels that go before the bundle's, or in place of all of them (a result's).
    aim: of a prompt that was traced, gives its main target.
    progress: called with the name of each stage as it begins.
    """

    facts: ModelFacts
    ids: tuple[int, ...]
    tokens: list[str]
    bos: str
    options: SubjectOptions
    opening: Callable[[], Bundle]
    given: Labels | None = None
    aim: Callable[[], MainTarget] | None = None
    progress: Stages = quiet

    def __repr__(self) -> str:
        return f"<Subject of {len(self.ids)} tokens on {self.facts.model}>"

    @property
    def subject(self) -> Subject:
        """Itself, as `enter` asks."""
        return self

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of the model and the SAEs."""
        return self.facts.notes

    def position(self, where: int | str) -> int:
        """A position from an index, a negative index, or a token's text, as in `" Aunt#2"`."""
        return find_position(self.tokens, where)

    def place(self, layer: int, head: int, query: int | str, key: int | str) -> Place:
        """A place whose positions may be given as token texts, checked.

        Raises:
          InputError: no such block, head or position, or the query does not see the key.
        """
        facts, place = self.facts, (layer, head, query, key)
        return find_place(self.tokens, place, n_heads=facts.n_heads, windows=facts.windows)

    @functools.cached_property
    def bundle(self) -> Bundle:
        """The model with its SAEs."""
        return self.opening()

    @property
    def precision(self) -> str:
        """Of all matmuls."""
        return self.options.precision

    @property
    def boundaries(self) -> Float[Array, "L+1 T D"]:
        """The residual stream at every boundary of the prompt padded to its bucket."""
        return self._run[0]

    @property
    def last(self) -> Float[Array, "D"]:
        """The last boundary at the last token."""
        return self._run[1]

    @property
    def logits(self) -> Float[np.ndarray, "V"]:
        """Of the next token, on the host."""
        return self._run[2]

    @functools.cached_property
    def _run(self) -> tuple[Float[Array, "L+1 T D"], Float[Array, "D"], Float[np.ndarray, "V"]]:
        from qkattr.model.transformer import boundaries_and_logits

        bundle = self.bundle
        self.progress("forward")
        boundaries, last, logits = boundaries_and_logits(
            bundle.params,
            self.padded,
            len(self.ids) - 1,
            cfg=bundle.config,
            precision=self.precision,
        )
        logits = np.asarray(logits)
        if not np.isfinite(logits).all():
            raise InputError(
                f"{bundle.model} computes logits on this prompt that are not finite; "
                f"its weights overflow, give an undamaged checkpoint"
            )
        return boundaries, last, logits

    @property
    def padded(self) -> np.ndarray:
        """The token ids, right-padded: prompts of about the same length run the same program."""
        from qkattr.sharding import pad_tokens

        return pad_tokens(self.ids)

    @functools.cached_property
    def components(self) -> Components:
        """Of every boundary, stacked."""
        from qkattr.sources.prompt import decompose_prompt

        boundaries = self.boundaries
        self.progress("components")
        return decompose_prompt(
            self.bundle.params,
            self.bundle.dictionaries,
            boundaries,
            self.padded,
            n_real=len(self.ids),
            sinks=self.options.sinks,
            read=self.options.read,
            max_slots=self.options.max_slots,
            precision=self.precision,
        )

    def begin(self, stage: str) -> None:
        """Say what begins now, after the prompt is encoded."""
        _ = self.components
        self.progress(stage)

    @functools.cached_property
    def slots(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Kind, index and activation of every component `[L+1, T, C]`, on the host."""
        import jax

        parts = self.components
        return jax.device_get((parts.kind, parts.index, parts.activations))

    def table(self, boundary: int) -> ComponentTable:
        """The components of a boundary in words."""
        kind, index, activation = (column[boundary] for column in self.slots)
        return ComponentTable(boundary, kind, index, activation, self.tokens, self.labels)

    @functools.cached_property
    def labels(self) -> Labels:
        """What features are called: by the labels given, or of the active ones by the bundle's, or
        else by its cards."""
        if self.given is not None:
            return self.given
        cards, labels = self.bundle.cards, self.bundle.labels
        if cards is None and not labels:
            return {}
        kind, index, _ = self.slots
        boundary, position, slot = np.nonzero(kind == Kind.FEATURE)
        found = index[boundary, position, slot]
        active = sorted(set(zip(boundary.tolist(), found.tolist(), strict=True)))
        known = {} if cards is None else cards.labels(active)
        return known | {feature: labels[feature] for feature in active if feature in labels}

    @functools.cached_property
    def target(self) -> MainTarget | None:
        """What effects are effects on, where the prompt was traced."""
        return None if self.aim is None else self.aim()

    def but(self, **changes: Any) -> Subject:
        """The same prompt with other `given`, `aim`, `options` or `progress`; what was computed and
        does not depend on them stays."""
        other = copy.copy(self)
        for name, value in changes.items():
            setattr(other, name, value)
            for computed in _DEPENDS.get(name, ()):
                other.__dict__.pop(computed, None)
        return other


#: What is computed from a field.
_DEPENDS = {
    "given": ("labels",),
    "aim": ("target",),
    "opening": ("bundle", "_run", "components", "slots", "labels", "target"),
    "options": ("_run", "components", "slots", "labels", "target"),
}


class HasSubject(Protocol):
    """A subject, or a result. What is asked here but `subject` needs no model."""

    @property
    def tokens(self) -> list[str]: ...

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    @property
    def subject(self) -> Subject: ...

    def position(self, where: int | str) -> int: ...

    def place(self, layer: int, head: int, query: int | str, key: int | str) -> Place: ...


def subject(
    bundle: Bundle,
    prompt: Prompt,
    *,
    labels: Labels | None = None,
    progress: Stages = quiet,
    **options: Any,
) -> Subject:
    """A prompt with its model, for every analysis.

    Args:
      bundle: from `qkattr.load`.
      prompt: text, token ids, or chat messages.
      labels: of features, by (boundary, index), in place of the bundle's.
      progress: called with the name of each stage as it begins, of this and of all that is asked.
      **options: see `SubjectOptions`.

    Raises:
      InputError: the prompt or an option cannot be used.
    """
    need_bundle(bundle)
    opts = make_options(SubjectOptions, options)
    ids, bos = bundle.tokenize(prompt, opts.bos)
    return Subject(
        facts=bundle.facts,
        ids=ids,
        tokens=bundle.tokens(ids),
        bos=bos,
        options=opts,
        opening=lambda: bundle,
        given=labels,
        progress=progress,
    )


def enter(asked: HasSubject) -> Subject:
    """The subject of what an analysis was given.

    Raises:
      InputError: it is no subject and no result, or the result was opened without its model.
    """
    found = getattr(asked, "subject", None)
    if not isinstance(found, Subject):
        raise InputError(
            "the first argument should be a subject, as qkattr.subject(bundle, prompt) makes, or a "
            f"result of qkattr.trace; got {asked!r:.40}"
        )
    return found
