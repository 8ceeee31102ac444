"""`run`, `trace` and `qk_attribution`: from a prompt to a `Result`, one stage after the other.

    tokenize -> residual stream -> components -> targets -> sweep -> tables -> QK attributions

Each stage is a pure function on arrays that knows nothing of bundles or text; this module only
feeds them. Prompts are right-padded to a bucket on the way in, so a second prompt of about the same
length compiles nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qkattr
from qkattr.errors import InputError
from qkattr.export.summary import shown_cards
from qkattr.graph.paths import Place, ranked_scores
from qkattr.graph.sweep import DirectTargets, sweep
from qkattr.graph.tables import Graph, build_graph
from qkattr.graph.targets import direct_targets, logit_covectors, score_covectors
from qkattr.load.bundle import Bundle, Prompt, need_bundle
from qkattr.model.forward import CAPTURE, forward
from qkattr.options import TraceOptions, make_options, one_of
from qkattr.result import Result
from qkattr.scores import find_place_in, qk_tables
from qkattr.session import (
    Progress,
    Session,
    pad_tokens,
    prompt_labels,
    prompt_text,
    start_session,
    token_id,
    token_text,
    token_texts,
)
from qkattr.sharding import bucket
from qkattr.types import NO_WINDOW, Kind, Trace


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


def trace(
    bundle: Bundle, prompt: Prompt, *, progress: Progress = lambda stage: None, **options: Any
) -> Result:
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
    opts = make_options(options)
    need_bundle(bundle)
    ids, bos = bundle.tokenize(prompt, opts.bos)
    tokens = token_texts(bundle, ids)
    score = find_place_in(bundle.config, tokens, opts.score) if opts.score else None
    asked = [token_id(bundle, token) for token in opts.contrast or opts.target]

    session = start_session(bundle, ids, opts, progress)
    progress("sweep")
    predictions = _predictions(bundle, session.logits, asked, opts)
    start = _Targets(session, len(ids) - 1, opts)
    if score:
        start.add_scores([score], [1.0])
    else:
        start.add_logits(predictions)
    graph = start.sweep()
    if opts.through_qk:
        progress("sweep through QK")
        places, influence = _strongest_scores(graph, opts.through_qk)
        start.add_scores(places, influence)
        graph = start.sweep()
    progress("QK attributions")
    result = Result(
        tokens=tokens,
        prompt=prompt_text(bundle, ids),
        token_ids=ids,
        bos=bos,
        predictions=predictions,
        graph=graph,
        sinks=_sinks(session.components, len(ids)),
        scores=start.score_table(),
        qk={},
        settings=_settings(bundle, opts),
        provenance=_provenance(bundle, ids, opts),
        labels=prompt_labels(session),
        vocabulary=_vocabulary(bundle, graph),
        session=session,
    )
    places = [place for place, _ in ranked_scores(graph, opts.qk, sinks=False)]
    tables = qk_tables(session, places, result.labels)
    result = dataclasses.replace(
        result, qk={".".join(map(str, place)): table for place, table in tables.items()}
    )
    if bundle.cards is None:
        return result
    return dataclasses.replace(result, cards=shown_cards(result, bundle.cards))


def attach(result: Result, bundle: Bundle) -> Result:
    """A result opened from disk, joined again with the model and SAEs that made it.

    Raises:
      InputError: they are not the same model and SAEs.
    """
    for name, what in (("model_hash", "model"), ("saes_hash", "SAEs")):
        was, now = result.provenance[name], getattr(bundle, name)
        if was != now:
            asked = result.settings["model" if what == "model" else "saes"]
            raise InputError(
                f"the result was made with other {what} ({asked}, fingerprint "
                f"{str(was)[:12]}) than the ones given ({str(now)[:12]}); "
                f"load what it was made with"
            )
    if bundle.dtype != result.settings["dtype"]:
        raise InputError(
            f"the result was made with {result.settings['dtype']} weights, the model given has "
            f"{bundle.dtype}; load it with dtype={result.settings['dtype']!r}"
        )
    names = {field.name for field in dataclasses.fields(TraceOptions)}
    opts = TraceOptions(**{k: _tupled(v) for k, v in result.settings.items() if k in names})
    return dataclasses.replace(result, session=start_session(bundle, result.token_ids, opts))


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class _Targets:
    """Direct targets as they are gathered, and the sweep from them."""

    def __init__(self, session: Session, last: int, opts: TraceOptions):
        self.session, self.last, self.opts = session, last, opts
        self.columns: list[
            tuple
        ] = []  # boundary, position, covector, constant, influence, kind, index
        self.scores: list[tuple[int, ...]] = []

    def add_logits(self, predictions: list[dict[str, Any]]) -> None:
        targets = [p for p in predictions if p["target"]]
        tokens = np.array([p["id"] for p in targets])
        against = np.array([p["against"] for p in targets])
        weight = np.array([p["probability"] for p in targets])
        weight = np.ones(1) if against[0] >= 0 else weight / max(weight.sum(), 1e-30)
        bundle = self.session.bundle
        g, constant = logit_covectors(
            bundle.params,
            self.session.boundaries[-1, self.last],
            tokens,
            against,
            cfg=bundle.config,
        )
        n_blocks = self.session.boundaries.shape[0] - 1
        for i, token in enumerate(tokens):
            row = (n_blocks, self.last, g[i], constant[i], weight[i], Kind.LOGIT, token)
            self.columns.append(row)

    def add_scores(self, places: Sequence[Place], influence: Sequence[float]) -> None:
        """Each score is read on both sides, half its influence on each."""
        if not places:
            return
        bundle = self.session.bundle
        g, constant = score_covectors(
            bundle.params.blocks,
            self.session.boundaries,
            jnp.asarray(places, jnp.int32),
            cfg=bundle.config.block,
            precision=self.opts.precision,
        )
        for i, (block, head, query, key) in enumerate(places):
            for side, position in enumerate((query, key)):
                number = len(self.scores)
                self.scores.append((block, head, query, key, side))
                row = (block, position, g[i, side], constant[i, side], influence[i] / 2)
                self.columns.append((*row, Kind.SCORE, number))

    def score_table(self) -> np.ndarray:
        return np.array(self.scores, int).reshape(-1, 5)

    def sweep(self) -> Graph:
        boundary, position, covector, constant, influence, kinds, index = zip(
            *self.columns, strict=True
        )
        targets: DirectTargets = direct_targets(
            np.array(boundary),
            np.array(position),
            jnp.stack(covector),
            jnp.stack(constant),
            np.array(influence, np.float32),
            padded_to=bucket(len(self.columns), smallest=16),
        )
        session = self.session
        swept = sweep(
            session.bundle.params.blocks,
            session.boundaries,
            session.components,
            targets,
            cfg=session.bundle.config.block,
            config=self.opts.sweep,
        )
        return build_graph(swept, targets, np.array(kinds), np.array(index))


def _predictions(
    bundle: Bundle, logits: jax.Array, asked: list[int], opts: TraceOptions
) -> list[dict[str, Any]]:
    """The likeliest next tokens, and which of them (or which others) are targets."""
    probability = np.asarray(jax.nn.softmax(logits))
    order = np.argsort(-probability, kind="stable")[: max(opts.max_logits, 10)]
    before = np.cumsum(probability[order]) - probability[order]
    found = {
        int(v): (not asked and opts.score is None)
        and i < opts.max_logits
        and before[i] < opts.logit_mass
        for i, v in enumerate(order)
    }
    for token in asked:
        found[token] = True
    against = -1
    if opts.contrast:
        against = asked[1]
        if asked[0] == against:
            raise InputError(f"contrast compares two tokens, both given are {opts.contrast[0]!r}")
        found[against] = False
    return [
        dict(
            token=token_text(bundle, token),
            id=token,
            probability=float(probability[token]),
            logit=float(logits[token]),
            target=bool(target),
            against=against if target else -1,
        )
        for token, target in found.items()
    ]


def _strongest_scores(graph: Graph, n: int) -> tuple[list[Place], list[float]]:
    """The scores behind the n strongest edges between two positions: each edge's leading head.

    A score's influence is what its head carries of the edge.
    """
    nodes, edges = graph.nodes, graph.edges
    crossing = (edges.block >= 0) & (nodes.position[edges.source] != nodes.position[edges.target])
    influence = np.where(crossing, graph.edge_influence(), 0.0)
    found: dict[Place, float] = {}
    for edge in np.argsort(-influence, kind="stable"):
        if len(found) == n or influence[edge] == 0:
            break
        loading = np.abs(edges.heads[edge])
        head = int(loading.argmax())
        target, source = nodes.position[edges.target[edge]], nodes.position[edges.source[edge]]
        place = (int(edges.block[edge]), head, int(target), int(source))
        carried = influence[edge] * loading[head] / loading.sum()
        found[place] = found.get(place, 0.0) + float(carried)
    return list(found), list(found.values())


def _sinks(components, n_real: int) -> list[dict[str, Any]]:
    is_sink = np.asarray((components.kind == Kind.SINK).any(-1))[:, :n_real]
    return [
        dict(position=int(t), boundaries=np.flatnonzero(is_sink[:, t]).tolist())
        for t in np.flatnonzero(is_sink.any(0))
    ]


def _vocabulary(bundle: Bundle, graph: Graph) -> dict[int, str]:
    logits = graph.nodes.index[graph.nodes.kind == Kind.LOGIT]
    return {int(i): token_text(bundle, int(i)) for i in logits}


def _settings(bundle: Bundle, opts: TraceOptions) -> dict[str, Any]:
    config = bundle.config
    return dict(
        model=bundle.model,
        saes=bundle.saes,
        dtype=bundle.dtype,
        neuronpedia=bundle.source and bundle.source.to_json(),
        missing=bundle.missing,
        accepted=list(bundle.accepted),
        notes=list(bundle.notes),
        n_blocks=config.n_blocks,
        n_heads=config.n_heads,
        windows=[None if w == NO_WINDOW else w for w in config.windows],
        **{k: list(v) if isinstance(v, tuple) else v for k, v in vars(opts).items()},
    )


def _provenance(bundle: Bundle, ids: Sequence[int], opts: TraceOptions) -> dict[str, Any]:
    device = jax.devices()[0]
    made_of = repr((bundle.model_hash, bundle.saes_hash, tuple(ids), opts, qkattr.__version__))
    return dict(
        run=hashlib.sha256(made_of.encode()).hexdigest()[:16],
        model_hash=bundle.model_hash,
        saes_hash=bundle.saes_hash,
        qkattr=qkattr.__version__,
        jax=jax.__version__,
        python=platform.python_version(),
        device=f"{device.platform} {device.device_kind}",
    )
