"""What the commands about one prompt share: open it, ask, and answer as JSON, table and figure.

A command takes `asked: Question = Question()` and calls

    asked.answer(find, show, figure=figure)        find: subject or result -> what was found

PROMPT|DIR is a text, or a folder that `qkattr trace` wrote. A folder's model is opened when
something is asked that it does not hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from qkattr.cli import common, options
from qkattr.errors import InputError, quoted

if TYPE_CHECKING:
    from qkattr.api import Result
    from qkattr.subject import HasSubject, Stages, Subject

FoundT = TypeVar("FoundT")

#: What a saved result keeps of its prompt and its model: these options do not go with a folder.
_KEPT = ("ids", "bos", "sink", "dtype", "missing", "bos_token", "accept")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """A head with the two positions between which it looks."""

    layer: Annotated[int, typer.Option(help="The block.")]
    head: Annotated[int, typer.Option(help="The query head.")]
    query: Annotated[
        str,
        typer.Option(
            help="The query position: an index, a negative index, or "
            'the text of a token (" Aunt#2").'
        ),
    ]
    key: Annotated[str, typer.Option(help="The key position, which the head looked at.")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question(options.Saes, options.ComponentOptions):
    """A prompt, or a saved result, and how it is opened and answered."""

    context: typer.Context
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT|DIR", help="A text, or a folder that `qkattr trace` wrote."),
    ]
    as_text: Annotated[
        bool,
        typer.Option("--as-text", help="PROMPT|DIR is text, although it looks like a folder."),
    ] = False
    json: common.Json = False

    @property
    def is_folder(self) -> bool:
        """Whether PROMPT|DIR names a folder; what only looks like one is refused."""
        if self.as_text:
            return False
        if is_result(self.prompt):
            return True
        if not self.ids:
            check_no_folder(self.prompt)
        return False

    def answer(
        self,
        find: Callable[[HasSubject], FoundT],
        show: Callable[[FoundT], None],
        *,
        place: PlaceOptions | None = None,
        labels: Sequence[str] | None = None,
        of: Callable[[Stages], HasSubject] | None = None,
        **how: Any,
    ) -> None:
        """Open the prompt, find what is asked, draw it, and print it.

        place: checked before weights are read. labels: as --labels has them. of: opens what is
        asked about, unless it is the prompt alone. how: see `common.answer`.
        """
        opened: list[HasSubject] = []

        def open_and_find(progress: Stages) -> FoundT:
            asked = of(progress) if of else self.opened(progress, labels)
            opened.append(asked)
            if place is not None:
                asked.place(**vars(place))
            return find(asked)

        notes = lambda: opened[0].notes
        common.answer(open_and_find, show, json=self.json, notes=notes, **how)

    def opened(self, progress: Stages, labels: Sequence[str] | None = None) -> Result | Subject:
        """The saved result, or the prompt with its model; no weights are read."""
        if self.is_folder:
            return self._saved(progress, labels)
        from qkattr.subject import subject

        bundle = self.open()
        asked = subject(bundle, self.read(self.prompt), progress=progress, **self.components)
        if not labels:
            return asked

        def named():
            from qkattr.labels.read import labelled

            return labelled(bundle, labels, progress)

        return asked.but(opening=named)

    def traced(self, progress: Stages, check: Callable[[HasSubject], Any]) -> Result:
        """The saved result, or the prompt traced without QK attributions; what is asked is checked
        before weights are read."""
        from qkattr.api import Result, trace_subject
        from qkattr.options import TraceOptions

        asked = self.opened(progress)
        check(asked)
        if isinstance(asked, Result):
            return asked
        return trace_subject(asked, TraceOptions(qk=0, **vars(asked.options)))

    def _saved(self, progress: Stages, labels: Sequence[str] | None) -> Result:
        from qkattr.api import join
        from qkattr.api import open as open_result

        for name in common.given(self.context, *_KEPT):
            raise InputError(
                f"{name} goes with a prompt, and {quoted(self.prompt)} is a folder, whose result "
                f"keeps the settings it was traced with; leave {name} out, or give the prompt"
            )
        result = open_result(self.prompt)
        if labels:
            result = _relabelled(result, labels)

        def opening():
            progress("loading the model")
            facts = result.facts
            named = dataclasses.replace(
                self,
                model=self.model or facts.model,
                saes=self.saes or facts.saes,
                dtype=facts.dtype,
                missing=facts.missing,
                accept=list(facts.accepted),
            )
            return named.open()

        return join(result, opening, progress)


def _relabelled(result: Result, labels: Sequence[str]) -> Result:
    """A saved result with other labels; which features its SAEs have is not known here."""
    from qkattr.labels.read import read_given
    from qkattr.load.registry import Source

    saved = result.facts.neuronpedia
    source = Source.from_json(saved, result.n_blocks) if saved else None
    return result.with_labels(read_given(labels, None, source))


def is_result(prompt: str) -> bool:
    """Whether PROMPT|DIR names a folder. One without a result is an error, not a prompt."""
    with contextlib.suppress(OSError, ValueError):
        path = Path(prompt)
        if path.is_dir() and ("/" in prompt or (path / "graph.json").is_file()):
            return True
    return False


def check_no_folder(prompt: str) -> None:
    """Refuse one word that looks like a folder and is none: it would be explained as text.

    Raises:
      InputError: it has a slash, begins with a dot or ~, is a folder without a result, or is nearly
        the name of a folder here that holds one.
    """
    if not prompt or any(c.isspace() for c in prompt):
        return
    near, no_result = [], False
    with contextlib.suppress(OSError, ValueError):
        here = [path.parent.name for path in Path().glob("*/graph.json")]
        near = difflib.get_close_matches(prompt, here, n=1, cutoff=0.7)
        no_result = Path(prompt).is_dir()
    if near or no_result or "/" in prompt or (prompt[0] in ".~" and len(prompt) > 1):
        what = "a folder without a result" if no_result else "no folder"
        meant = f"; {quoted(near[0])} is one" if near else ""
        raise InputError(
            f"{quoted(prompt)} is {what}{meant}; give a folder that `qkattr trace --out` wrote, or "
            "--as-text if it is the text of a prompt"
        )


def check_head_of(layer: int | None, head: int | None) -> None:
    """Fail where a head is given without its block."""
    if head is not None and layer is None:
        raise InputError("--head is a head of one block; give --layer too")
