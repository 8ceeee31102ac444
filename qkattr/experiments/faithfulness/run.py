"""`faithfulness`: all measures on one prompt or many, resumable, as tables."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import qkattr
from qkattr.analysis import trace
from qkattr.errors import InputError, quoted
from qkattr.experiments.choose import heads_between
from qkattr.experiments.faithfulness.edges import measure_edges, measure_paraphrases
from qkattr.experiments.faithfulness.heads import measure_heads
from qkattr.experiments.faithfulness.nodes import measure_nodes
from qkattr.experiments.faithfulness.qk import measure_qk
from qkattr.experiments.faithfulness.report import summarise
from qkattr.experiments.runs import clean_top
from qkattr.load.bundle import Bundle, Prompt
from qkattr.load.prompts import GivenPrompt
from qkattr.options import TraceOptions, one_of
from qkattr.positions import find_position, prompt_text, token_text, token_texts
from qkattr.result import Result, ranked_heads
from qkattr.scores import attention_at
from qkattr.session import start_session

MEASURES = ("qk", "heads", "edges", "nodes")
#: Heads whose scores are looked at.
HEADS = 8
#: Boundaries of the deletion curves, as shares of the depth.
DEPTHS = (0.2, 0.4, 0.6, 0.8)


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
      measures: which, of "qk", "heads", "edges", "nodes".
      draws: random heads; a quarter as many controls of features.
      seed: of all draws.
      bos, sinks: of the prompts and their components, see `TraceOptions`.
      folder: keep each prompt's measures here, and take those that are there already.
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
    settings = dict(
        model=bundle.model, saes=bundle.saes, model_hash=bundle.model_hash,
        saes_hash=bundle.saes_hash, dtype=bundle.dtype, qkattr=qkattr.__version__,
        measures=[name for name in MEASURES if name in measures], draws=draws, seed=seed, bos=bos,
        sinks=sinks,
    )  # fmt: skip
    done, graphs = [], defaultdict(list)
    for i, (prompt, (ids, source, target)) in enumerate(zip(given, placed, strict=True)):

        def said(stage: str, i=i) -> None:
            progress(f"prompt {i + 1} of {len(given)}: {stage}")

        kept = _Kept(folder, dict(**settings, ids=ids, source=source, target=target))
        result = None
        measured = kept.read()
        if measured is None:
            result = trace(bundle, ids, qk=0, sinks=sinks, progress=said)
            measured = _measure(bundle, result, source, target, settings, said)
            kept.write(measured)
        if prompt.group and "edges" in measures:
            result = result or trace(bundle, ids, qk=0, sinks=sinks, progress=said)
            graphs[prompt.group].append(result.graph)
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
    return prompt.prompt if isinstance(prompt.prompt, str) else prompt_text(bundle, ids)


def _place(
    bundle: Bundle, given: GivenPrompt, bos: bool | None, i: int, n: int
) -> tuple[tuple[int, ...], int | None, int]:
    """The ids of prompt i of n, and the positions to look between; the source may be left to the
    graph."""
    try:
        ids, _ = bundle.tokenize(given.prompt, bos)
        tokens = token_texts(bundle, ids)
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


def _measure(bundle: Bundle, result: Result, source, target, settings, progress) -> dict[str, Any]:
    """All measures of one prompt."""
    session, measures = result.session, settings["measures"]
    rng = np.random.default_rng([settings["seed"], *result.token_ids])
    source = _busiest_source(result, target) if source is None else source
    heads = heads_between(result, source=source, target=target)
    few = max(4, settings["draws"] // 4)
    out: dict[str, Any] = dict(
        tokens=result.tokens,
        prediction=token_text(bundle, clean_top(session)[0]),
        probability=result.predictions[0]["probability"],
        source=source,
        target=target,
        heads_named=[f"{layer}.{head}" for layer, head in heads[:HEADS]],
    )
    if "qk" in measures and heads:
        progress("QK attributions")
        out["qk"] = measure_qk(session, heads[:HEADS], query=target, key=source, draws=few, rng=rng)
    if "heads" in measures and heads:
        progress("heads")
        _, attention = attention_at(session, target, source)
        looking = ranked_heads(attention)
        out["heads"] = measure_heads(session, heads, looking, draws=settings["draws"], rng=rng)
    if "edges" in measures:
        progress("edges")
        reading = start_session(
            bundle, result.token_ids, TraceOptions(read="encoder", sinks=settings["sinks"])
        )
        out["edges"] = measure_edges(reading, result.graph)
    if "nodes" in measures:
        progress("nodes")
        how = dict(qk=0, through_errors=False, sinks=settings["sinks"])
        leaves = trace(bundle, result.token_ids, **how).graph
        n_blocks = bundle.config.n_blocks
        boundaries = sorted({max(1, round(depth * n_blocks)) for depth in DEPTHS})
        graphs = dict(through=result.graph, leaves=leaves)
        out["nodes"] = measure_nodes(session, graphs, boundaries, draws=3, rng=rng)
    return out


def _busiest_source(result: Result, target: int) -> int:
    """The earlier position, other than a sink, from which most influence crossed to the target."""
    sinks = {sink["position"] for sink in result.sinks}
    flow = {
        p: float(result.head_loadings(source=p, target=target).influence.sum())
        for p in range(target)
        if p not in sinks
    }
    return max(flow, key=flow.__getitem__) if flow else target


class _Kept:
    """One prompt's measures in a file whose name says what made them."""

    def __init__(self, folder: str | Path | None, made_of: dict[str, Any]):
        name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
        self.path = None if folder is None else Path(folder) / "prompts" / f"{name}.json"

    def read(self) -> dict[str, Any] | None:
        if self.path is None or not self.path.is_file():
            return None
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise InputError(
                f"{self.path} cannot be read; delete it, so that its prompt is measured again"
            ) from e

    def write(self, measured: dict[str, Any]) -> None:
        if self.path is not None:
            from qkattr.export.folder import write_files

            text = json.dumps(measured, separators=(",", ":"))
            write_files(self.path.parent, {self.path.name: text.encode()})
