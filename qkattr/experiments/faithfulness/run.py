"""`faithfulness`: all measures on one prompt or many, resumable, as tables."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qkattr.errors import InputError, one_of, quoted
from qkattr.experiments.faithfulness.edges import measure_paraphrases
from qkattr.experiments.faithfulness.kept import KeptMeasures
from qkattr.experiments.faithfulness.prompt import MEASURES, MeasuredPrompt
from qkattr.experiments.faithfulness.report import summarise
from qkattr.subject import HasSubject, Subject, enter
from qkattr.version import __version__


@dataclasses.dataclass(frozen=True)
class Report:
    """What `faithfulness` found. prompts: every measure of every prompt. tables: means over prompts
    with 95 % intervals, and `failures`, in words. settings: how it was measured."""

    prompts: list[dict[str, Any]]
    tables: dict[str, Any]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """A plain object: the tables, and of each prompt what was looked at."""
        named = (
            "text",
            "tokens",
            "prediction",
            "probability",
            "group",
            "source",
            "target",
            "heads_named",
        )
        prompts = [{k: prompt[k] for k in named} for prompt in self.prompts]
        return dict(**self.tables, prompts=prompts, settings=self.settings)


@dataclasses.dataclass(frozen=True)
class Between:
    """A prompt to test.

    subject: a subject or a result.
    source, target: positions to look between; None: chosen by influence, and the last.
    group: "" or the name of its paraphrases.
    """

    subject: HasSubject
    source: int | str | None = None
    target: int | str | None = None
    group: str = ""


def faithfulness(
    subject: HasSubject | Between | Sequence[HasSubject | Between],
    *,
    measures: Sequence[str] = MEASURES,
    draws: int = 20,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Report:
    """Test attributions of some prompts against the model.

    Args:
      subject: one or several, of a model with SAEs and all alike in their options; or `Between`,
        with positions to look between and a group: prompts of one group are paraphrases, whose
        edges are compared.
      measures: which, of "qk", "heads", "effects", "edges", "nodes".
      draws: random heads; a quarter as many controls of features.
      seed: of all draws.
      folder: keep every measure of each prompt here, and take those that are there already.

    Raises:
      InputError: there are no prompts, SAEs, draws or such measures, or a prompt cannot be used.
    """
    every = list(subject) if isinstance(subject, Sequence) else [subject]
    if not every:
        raise InputError("there are no prompts; give at least one")
    given = [one if isinstance(one, Between) else Between(one) for one in every]
    placed = [_place(one, i, len(given)) for i, one in enumerate(given)]
    first = placed[0].subject
    bundle = first.bundle
    if bundle.dictionaries is None:
        raise InputError(
            "faithfulness tests features, and the bundle was loaded without SAEs; load "
            "it with saes="
        )
    for name in measures:
        one_of("measure", name, MEASURES)
    if draws < 4:
        raise InputError(f"draws should be at least 4, got {draws}; give more")
    settings: dict[str, Any] = dict(
        model=bundle.model, saes=bundle.saes, model_hash=bundle.model_hash,
        saes_hash=bundle.saes_hash, dtype=bundle.dtype, qkattr=__version__,
        measures=[name for name in MEASURES if name in measures], draws=draws, seed=seed,
        bos=first.options.bos, sinks=first.options.sinks,
    )  # fmt: skip
    done, graphs = [], defaultdict(list)
    for i, (prompt, at) in enumerate(zip(given, placed, strict=True)):

        def said(stage: str, i=i, at=at) -> None:
            at.subject.progress(f"prompt {i + 1} of {len(given)}: {stage}")

        tested = MeasuredPrompt(at.subject.but(progress=said), at.source, at.target, settings)
        ids = at.subject.ids
        kept = KeptMeasures(folder, dict(**settings, ids=ids, source=at.source, target=at.target))
        measured = kept.get("about", tested.about)
        for name in settings["measures"]:
            measured |= kept.get(name, partial(tested.measure, name))
        if prompt.group and "edges" in measures:
            graphs[prompt.group].append(tested.result.graph)
        done.append(measured | dict(text=bundle.text(ids), group=prompt.group))
    groups = [
        dict(group=name, pairs=measure_paraphrases(found))
        for name, found in graphs.items()
        if len(found) > 1
    ]
    tables = summarise(done, groups)
    if not tables.keys() - {"failures"}:
        raise InputError(
            f"none of {', '.join(measures)} can be measured on these prompts: no edge "
            f"of their graphs joins features, or the positions looked at; give longer ones"
        )
    return Report(prompts=done, tables=tables, settings=settings)


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A prompt with the positions to look between; the source may be left to the graph."""

    subject: Subject
    source: int | None
    target: int


def _place(given: Between, i: int, n: int) -> _Placed:
    """Prompt i of n."""
    subject = enter(given.subject)
    try:
        target = subject.position(-1 if given.target is None else given.target)
        source = None if given.source is None else subject.position(given.source)
        if source is not None and source > target:
            raise InputError(
                f"the source at {source} comes after the target at {target}; attention is causal, "
                f"give the earlier position as the source"
            )
    except InputError as e:
        if n == 1:
            raise
        text = subject.bundle.text(subject.ids)
        raise InputError(f"prompt {i + 1} of {n}, {quoted(text, 40)}: {e}") from e
    return _Placed(subject, source, target)
