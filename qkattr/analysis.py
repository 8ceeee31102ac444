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

from qkattr.analyses.targets import Asked, targets_of
from qkattr.errors import InputError
from qkattr.export.summary import shown_cards
from qkattr.graph.build import with_effects
from qkattr.graph.tables import Graph
from qkattr.kinds import NO_WINDOW, Kind, Place
from qkattr.load.bundle import Bundle, Prompt, need_bundle
from qkattr.model.forward import CAPTURE, forward
from qkattr.options import TraceOptions, make_options, one_of, saved_options
from qkattr.result import Result
from qkattr.scores import qk_tables
from qkattr.session import Progress, pad_tokens, prompt_labels, start_session
from qkattr.types import Trace
from qkattr.version import __version__


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
    tokens = bundle.tokens(ids)
    asked = Asked.of(bundle, tokens, opts)

    session = start_session(bundle, ids, opts, progress)
    progress("sweep")
    start, predictions = asked.targets(session, opts)
    graph = start.sweep()
    if opts.through_qk:
        progress("sweep through QK")
        places, influence = _strongest_scores(graph, opts.through_qk)
        start.add_scores(places, influence)
        graph = start.sweep()
    progress("effects")
    found = start.effects()
    session = dataclasses.replace(session, target=start.main())
    kind, index = jax.device_get((session.components.kind, session.components.index))
    graph = with_effects(graph, found, kind, index)
    progress("QK attributions")
    result = Result(
        tokens=tokens,
        prompt=bundle.text(ids),
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
    places = result.places_that_matter(opts.qk)
    tables = qk_tables(session, places, result.labels)
    result = dataclasses.replace(
        result, qk={".".join(map(str, place)): table for place, table in tables.items()}
    )
    if bundle.cards is None:
        return result
    provenance = result.provenance | dict(cards=bundle.cards.origin())
    cards = shown_cards(result, bundle.cards)
    return dataclasses.replace(result, cards=cards, provenance=provenance)


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
    opts = saved_options(result.settings)
    session = start_session(bundle, result.token_ids, opts)
    start = targets_of(result, session, opts)
    session = dataclasses.replace(session, target=start.main())
    return dataclasses.replace(result, session=session)


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
    is_sink = (np.asarray(components.kind) == Kind.SINK).any(-1)[:, :n_real]
    return [
        dict(position=int(t), boundaries=np.flatnonzero(is_sink[:, t]).tolist())
        for t in np.flatnonzero(is_sink.any(0))
    ]


def _vocabulary(bundle: Bundle, graph: Graph) -> dict[int, str]:
    logits = graph.nodes.index[graph.nodes.kind == Kind.LOGIT]
    return {int(i): bundle.token(int(i)) for i in logits}


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
    made_of = repr((bundle.model_hash, bundle.saes_hash, tuple(ids), opts, __version__))
    return dict(
        run=hashlib.sha256(made_of.encode()).hexdigest()[:16],
        model_hash=bundle.model_hash,
        saes_hash=bundle.saes_hash,
        qkattr=__version__,
        jax=jax.__version__,
        python=platform.python_version(),
        device=f"{device.platform} {device.device_kind}",
    )
