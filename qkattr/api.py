"""The public functions that see results and files both: `run`, `trace`, `open`, `figure`.

`qkattr` names these and the analyses in one place. What needs JAX, or matplotlib, is imported when
it is used: a saved result is read and asked without them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkattr.errors import InputError, one_of
from qkattr.export.folder import encoded_page, read_result, save_result
from qkattr.export.graph_json import graph_json
from qkattr.export.viewers import check_scan
from qkattr.files import write_files
from qkattr.kinds import Group
from qkattr.load.bundle import Bundle, Prompt, need_bundle
from qkattr.options import TraceOptions, make_options
from qkattr.qk.table import QKAttribution
from qkattr.result import Traced
from qkattr.subject import HasSubject, Stages, Subject, quiet
from qkattr.subject import subject as make_subject

if TYPE_CHECKING:
    import jax

    from qkattr.experiments.edits import Edit
    from qkattr.types import Trace

CAPTURE = ("boundaries", "scores", "patterns")


@dataclasses.dataclass(frozen=True, repr=False)
class Result(Traced):
    """What `trace` returns: the data (see `Traced`), and what to do with it.

    made_of: the prompt with its model, of which more can be asked; None for a result that was
      opened without its model.
    """

    made_of: Subject | None = None

    @classmethod
    def of(cls, traced: Traced, made_of: Subject | None = None) -> Result:
        """The result of what was traced."""
        data = {field.name: getattr(traced, field.name) for field in dataclasses.fields(traced)}
        return cls(**data, made_of=made_of)

    @property
    def subject(self) -> Subject:
        """The prompt with its model, features called as the result calls them.

        Raises:
          InputError: it was opened from disk without its model.
        """
        if self.made_of is None:
            raise InputError(
                "this result was opened without its model and does not hold that; open it with "
                "qkattr.open(folder, bundle=qkattr.load(...))"
            )
        return self._named

    @functools.cached_property
    def _named(self) -> Subject:
        """`subject`, made once."""
        assert self.made_of is not None
        return self.made_of.but(given=self.labels)

    def with_scan(self, scan: str) -> Result:
        """The result with this name of its model in the graph JSON, and in what is saved of it.

        Raises:
          InputError: graph viewers take no such name.
        """
        return dataclasses.replace(self, scan=check_scan(scan))

    def save(
        self, folder: str | Path, *, scan: str | None = None, links: int | str | None = None
    ) -> Path:
        """Write `graph.json`, `graph.npz` and `index.html`; what was there survives a failure.

        scan: see `with_scan`. links: see `to_json`.
        """
        return save_result(self if scan is None else self.with_scan(scan), Path(folder), links)

    def to_html(self, path: str | Path) -> Path:
        """Write the page alone."""
        path = Path(path)
        write_files(path.parent, {path.name: encoded_page(self)})
        return path

    def to_pandas(self, table: str = "edges"):
        """A DataFrame: "edges", "heads" (one row an edge and head), "nodes", "effects" (of heads,
        one row a place) or "account".

        Raises:
          InputError: no such table, or pandas is not installed.
        """
        from qkattr.export.frames import frame

        return frame(self, table)

    def to_json(self, *, links: int | str | None = None) -> dict[str, Any]:
        """The graph JSON as an object.

        links: how many to list, the strongest by influence, or "all"; None: 10,000.

        Raises:
          InputError: links is none of these.
        """
        return graph_json(self, links)

    def _repr_html_(self) -> str:
        from html import escape

        from qkattr.export.html import page

        body = escape(page(self), quote=True)
        return f'<iframe srcdoc="{body}" style="width:100%;height:640px;border:0"></iframe>'


def run(
    bundle: Bundle, tokens: Sequence[int], *, capture: tuple[str, ...] = CAPTURE
) -> tuple[jax.Array, Trace]:
    """Run the model on token ids, taken verbatim.

    Args:
      tokens: `[T]`.
      capture: which fields of the trace to keep, of "boundaries", "scores", "patterns"; `()` keeps
        none.

    Returns:
      float32 logits `[T, V]`, and a `Trace` with boundaries `[L+1, T, D]`, scores and patterns
      `[L, N, T, S]`.

    Raises:
      InputError: no tokens, too many, or one outside the vocabulary.
    """
    import jax.numpy as jnp

    from qkattr.model.transformer import forward
    from qkattr.sharding import pad_tokens
    from qkattr.types import Trace

    for name in capture:
        one_of("capture", name, CAPTURE)
    need_bundle(bundle)
    ids, _ = bundle.tokenize([int(token) for token in tokens])
    T = len(ids)
    logits, trace = forward(
        bundle.params, jnp.asarray(pad_tokens(ids)), cfg=bundle.config, capture=tuple(capture)
    )
    return logits[:T], Trace(
        boundaries=None if trace.boundaries is None else trace.boundaries[:, :T],
        scores=None if trace.scores is None else trace.scores[:, :, :T, :T],
        patterns=None if trace.patterns is None else trace.patterns[:, :, :T, :T],
    )


def trace(bundle: Bundle, prompt: Prompt, *, progress: Stages = quiet, **options: Any) -> Result:
    """Trace the model's next-token prediction back to the prompt.

    Args:
      bundle: from `qkattr.load`, with SAEs (without them every boundary is one error slot, and the
        graph says little).
      prompt: text, token ids, or chat messages.
      progress: called with the name of each stage as it begins.
      **options: see `TraceOptions`.

    Raises:
      InputError: the prompt or an option cannot be used.
    """
    opts = make_options(TraceOptions, options)
    asked = make_subject(bundle, prompt, progress=progress, **vars(opts.subject))
    return trace_subject(asked, opts)


def trace_subject(asked: Subject, opts: TraceOptions) -> Result:
    """`trace` of a subject; opts: with those that the subject was made with."""
    from qkattr.analyses import trace as analysis

    return Result.of(*analysis.trace_subject(asked, opts))


def open(folder: str | Path, *, bundle: Bundle | None = None) -> Result:
    """Read a saved result.

    Args:
      folder: what `Result.save` wrote.
      bundle: the model and SAEs it was made with, to ask for more than it holds.

    Raises:
      InputError: not such a folder, damaged, of another schema, or made with another model or other
        SAEs.
    """
    result = Result.of(read_result(Path(folder)))
    if bundle is None:
        return result
    check_made_with(result, bundle)
    return join(result, lambda: bundle)


def join(result: Result, opening: Callable[[], Bundle], progress: Stages = quiet) -> Result:
    """A saved result with its model, which is opened when something is asked that it does not hold.

    opening: gives the model and SAEs. progress: see `subject`.
    """

    def checked() -> Bundle:
        bundle = opening()
        check_made_with(result, bundle)
        return bundle

    def aim():
        from qkattr.analyses.targets import targets_of

        return targets_of(result, made_of).main()

    made_of = Subject(
        facts=result.facts,
        ids=result.token_ids,
        tokens=result.tokens,
        bos=result.bos,
        options=result.options.subject,
        opening=checked,
        given=result.labels,
        aim=aim,
        progress=progress,
    )
    return dataclasses.replace(result, made_of=made_of)


def check_made_with(traced: Traced, bundle: Bundle) -> None:
    """Raise `InputError` unless these are the model and SAEs that a result was made with."""
    facts = traced.facts
    for name, what, asked in (
        ("model_hash", "model", facts.model),
        ("saes_hash", "SAEs", facts.saes),
    ):
        was, now = traced.provenance[name], getattr(bundle, name)
        if was != now:
            raise InputError(
                f"the result was made with other {what} ({asked}, fingerprint "
                f"{str(was)[:12]}) than the ones given ({str(now)[:12]}); "
                f"load what it was made with"
            )
    if bundle.dtype != facts.dtype:
        raise InputError(
            f"the result was made with {facts.dtype} weights, the model given has "
            f"{bundle.dtype}; load it with dtype={facts.dtype!r}"
        )


def qk_attribution(
    subject: HasSubject, *, layer: int, head: int, query: int | str, key: int | str
) -> QKAttribution:
    """Why head `head` of block `layer` attended from `query` to `key`: its score, expanded.

    Args:
      subject: a result or a subject.
      query, key: positions, negative positions, or token texts.

    Raises:
      InputError: no such head or position, the key comes after the query or lies outside the
        window, or the result was opened without its model and does not hold this place in full.
    """
    place: dict[str, Any] = dict(layer=layer, head=head, query=query, key=key)
    if isinstance(subject, Traced):
        stored = subject.stored(subject.place(**place))
        if stored is not None:
            return stored
    from qkattr.analyses.qk import attribution

    return attribution(subject, **place)


def choose_edits(
    result: Result,
    *,
    source: int | str,
    target: int | str,
    heads: str | int | Sequence[tuple[int, int]] = "5%",
    side: str = "key",
    features: int = 4,
    group: Group | None = None,
    by: str = "effect",
) -> list[Edit]:
    """Edits for `steer`: heads that look from one position at another, and in them the features
    with the largest QK marginals there, or a group of features; see
    `qkattr.experiments.choose.choose_edits`."""
    from qkattr.experiments import choose

    how = dict(source=source, target=target, heads=heads, side=side, features=features)
    return choose.choose_edits(result, result, **how, group=group, by=by)  # pyright: ignore


def figure(found: Any, path: str | Path) -> Path:
    """Draw what an analysis found, as SVG, PNG or PDF.

    found: what `steer`, `why`, `pairs`, `marginals`, `mechanisms`, `distance`, `qk_attribution` or
      `faithfulness` returned.

    Raises:
      InputError: there is no figure of that, matplotlib is not installed, or the name ends in none
        of these.
    """
    from qkattr.export.draw import draw

    return draw(found, Path(path))
