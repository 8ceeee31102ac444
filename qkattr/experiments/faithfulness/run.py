"""`faithfulness`: all measures on one prompt or many, resumable, as tables."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qkattr.errors import InputError, quoted
from qkattr.experiments.faithfulness.edges import measure_paraphrases
from qkattr.experiments.faithfulness.kept import Kept
from qkattr.experiments.faithfulness.report import summarise
from qkattr.experiments.faithfulness.subject import MEASURES, Subject
from qkattr.load.bundle import Bundle, Prompt
from qkattr.load.text.prompts import GivenPrompt
from qkattr.options import one_of
from qkattr.positions import find_position
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

    def figure(self, path: str | Path) -> Path:
        """Draw the tables, as SVG, PNG or PDF.

        Raises:
          InputError: matplotlib is not installed, or the name ends in none of these.
        """
        from qkattr.export.faithfulness_figure import faithfulness_figure

        return faithfulness_figure(self, Path(path))


def faithfulness(
    bundle: Bundle,
    prompts: Sequence[Prompt | GivenPrompt],
    *,
    measures: Sequence[str] = MEASURES,
    draws: int = 20,
    seed: int = 0,
    bos: bool | None = None,
    sinks: bool = True,
    folder: str | Path | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Test attributions of some prompts against the model.

    Args:
      bundle: a model with SAEs.
      prompts: text or token ids; or `GivenPrompt`, with positions to look between and a group:
        prompts of one group are paraphrases, whose edges are compared.
      measures: which, of "qk", "heads", "effects", "edges", "nodes".
      draws: random heads; a quarter as many controls of features.
      seed: of all draws.
      bos, sinks: of the prompts and their components, see `TraceOptions`.
      folder: keep every measure of each prompt here, and take those that are there already.
      progress: called with what is being measured.

    Raises:
      InputError: there are no prompts, SAEs, draws or such measures, or a prompt cannot be used.
    """
    if bundle.dictionaries is None:
        raise InputError(
            "faithfulness tests features, and the bundle was loaded without SAEs; load "
            "it with saes="
        )
    if not prompts:
        raise InputError("there are no prompts; give at least one")
    for name in measures:
        one_of("measure", name, MEASURES)
    if draws < 4:
        raise InputError(f"draws should be at least 4, got {draws}; give more")
    given = [p if isinstance(p, GivenPrompt) else GivenPrompt(p) for p in prompts]
    placed = [_place(bundle, prompt, bos, i, len(given)) for i, prompt in enumerate(given)]
    settings: dict[str, Any] = dict(
        model=bundle.model, saes=bundle.saes, model_hash=bundle.model_hash,
        saes_hash=bundle.saes_hash, dtype=bundle.dtype, qkattr=__version__,
        measures=[name for name in MEASURES if name in measures], draws=draws, seed=seed, bos=bos,
        sinks=sinks,
    )  # fmt: skip
    done, graphs = [], defaultdict(list)
    for i, (prompt, (ids, source, target)) in enumerate(zip(given, placed, strict=True)):

        def said(stage: str, i=i) -> None:
            progress(f"prompt {i + 1} of {len(given)}: {stage}")

        subject = Subject(bundle, ids, source, target, settings, said)
        kept = Kept(folder, dict(**settings, ids=ids, source=source, target=target))
        measured = kept.get("about", subject.about)
        for name in settings["measures"]:
            measured |= kept.get(name, partial(subject.measure, name))
        if prompt.group and "edges" in measures:
            graphs[prompt.group].append(subject.result.graph)
        done.append(measured | dict(text=_text(bundle, prompt, ids), group=prompt.group))
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


def _text(bundle: Bundle, prompt: GivenPrompt, ids) -> str:
    return prompt.prompt if isinstance(prompt.prompt, str) else bundle.text(ids)


def _place(
    bundle: Bundle, given: GivenPrompt, bos: bool | None, i: int, n: int
) -> tuple[tuple[int, ...], int | None, int]:
    """The ids of prompt i of n, and the positions to look between; the source may be left to the
    graph."""
    try:
        ids, _ = bundle.tokenize(given.prompt, bos)
        tokens = bundle.tokens(ids)
        target = find_position(tokens, -1 if given.target is None else given.target)
        source = None if given.source is None else find_position(tokens, given.source)
        if source is not None and source > target:
            raise InputError(
                f"the source at {source} comes after the target at {target}; attention is causal, "
                f"give the earlier position as the source"
            )
    except InputError as e:
        if n == 1:
            raise
        raise InputError(f"prompt {i + 1} of {n}, {quoted(str(given.prompt), 40)}: {e}") from e
    return ids, source, target
