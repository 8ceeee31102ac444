"""`qkattr steer`: scale features inside the QK circuit of chosen heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from qkattr.cli import common
from qkattr.cli.question import Question
from qkattr.errors import InputError, quoted

if TYPE_CHECKING:
    from qkattr.api import Result
    from qkattr.experiments.hydra import Hydra
    from qkattr.experiments.steer import Steering
    from qkattr.kinds import Group
    from qkattr.result import Traced
    from qkattr.subject import HasSubject, Stages, Subject


def steer(
    asked: Question,
    edit: Annotated[
        list[str] | None,
        Option(
            help="An edit, B:F@POS:query|key:L.H,L.H or B:F@POS:residual (repeatable).",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        str | None,
        Option(
            "--from",
            help="Choose edits automatically: the key position, which is looked at.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None, Option("--to", help="With --from: the query position.", show_default=False)
    ] = None,
    heads: Annotated[
        str,
        Option(help="With --from and --to: which heads to edit, as 12, 5%, greedy:8, or L.H,L.H."),
    ] = "5%",
    by: Annotated[
        str,
        Option(
            help="With --from and --to: rank heads by effect, masking, influence, loading or "
            "attention."
        ),
    ] = "effect",
    features: Annotated[
        int,
        Option(
            min=1,
            help="With --from and --to: the number of features to edit in each block, by QK "
            "marginal.",
        ),
    ] = 4,
    side: Annotated[
        str, Option(help="With --from and --to: the side to edit, key or query.")
    ] = "key",
    group: Annotated[
        str | None,
        Option(
            help="Edit the features of a group instead: FILE.toml, or FILE.toml:NAME.",
            show_default=False,
        ),
    ] = None,
    label: Annotated[
        str | None,
        Option(
            help="Edit the features whose label contains this text instead.", show_default=False
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        Option(help="Read the labels from this file instead of the cards.", show_default=False),
    ] = None,
    scales: Annotated[str, Option(help="The factors by which the features are multiplied.")] = (
        "-1,-0.5,0,0.5,1,1.5,2"
    ),
    freeze_others: Annotated[
        bool,
        Option(
            "--freeze-others",
            help="Keep the attention patterns of the unedited heads as they were without the"
            " edits.",
        ),
    ] = False,
    live_scales: Annotated[
        bool,
        Option("--live-scales", help="Normalise what an edited head reads by its own norm scale."),
    ] = False,
    ablate: Annotated[
        str | None,
        Option(help="Set the output of these heads to zero: L.H,L.H.", show_default=False),
    ] = None,
    track: Annotated[
        list[str] | None,
        Option(help="A next token whose probability is shown (repeatable).", show_default=False),
    ] = None,
    query: Annotated[str, Option(help="The position whose attention is shown.")] = "-1",
    control: Annotated[
        bool,
        Option(
            "--control/--no-control",
            help="Show beside the result what random edits of the same size do.",
        ),
    ] = True,
    draws: Annotated[int, Option(min=1, max=1000, help="The number of random edits.")] = 8,
    seed: Annotated[int, Option(min=0, help="The seed of the random edits.")] = 0,
    hydra: Annotated[
        bool,
        Option(
            "--hydra",
            help="Show how many heads are needed to flip the prediction, with the other patterns "
            "recomputed and with them fixed.",
        ),
    ] = False,
    figure: common.Figure = None,
) -> None:
    """Scale features inside the QK circuit of chosen heads only, and see what the model says."""
    from qkattr.cli.steer_tables import show, show_hydra
    from qkattr.experiments.choose import check_choice, choose_edits
    from qkattr.experiments.edits import parse_edit, parse_heads
    from qkattr.experiments.steer import check_asked, check_scales
    from qkattr.experiments.steer import steer as steer_prompt
    from qkattr.labels.groups import search_labels
    from qkattr.result import Traced
    from qkattr.subject import Subject

    edits = [parse_edit(text) for text in edit or ()]
    ablated = parse_heads(ablate) if ablate is not None else ()
    factors = check_scales(_numbers(scales))
    known = _labels(labels)
    features_of = _group(group, label, known)
    choosing = common.given(asked.context, "heads", "side", "features", "by")
    named = group is not None or label is not None
    _check_ends(source, target, bool(edits or ablated), hydra or named, choosing)
    choice: dict[str, Any] = dict(
        source=source, target=target, heads=heads, side=side, features=features, by=by
    )

    def check(opened: HasSubject) -> None:
        """Fail before weights are read."""
        if source is not None:
            check_choice(opened.tokens, opened.facts.head_grid, **choice)
        if isinstance(opened, Subject):
            check_asked(opened, edits, ablated, track or (), query)

    def open_prompt(progress: Stages) -> Result | Subject:
        if source is not None:
            if not asked.is_folder:
                asked.check_both()
            return asked.traced(progress, check)
        opened = asked.opened(progress)
        check(opened)
        return opened

    def find(opened: HasSubject) -> tuple[Steering, Hydra | None]:
        subject = opened.subject if known is None else opened.subject.but(given=known)
        chosen = list(edits)
        if isinstance(opened, Traced) and source is not None:
            subject.progress("choosing heads and features")
            of_group = features_of
            if label is not None and known is None:
                of_group = search_labels(opened.labels, label)
            chosen += choose_edits(opened, subject, **choice, group=of_group)
        steering = steer_prompt(
            subject,
            chosen,
            scales=factors,
            freeze_others=freeze_others,
            live_scales=live_scales,
            ablate=ablated,
            track=track or (),
            query=query,
            draws=draws if control else 0,
            seed=seed,
        )
        if not hydra:
            return steering, None
        # --hydra goes with --from and --to
        assert isinstance(opened, Traced) and source is not None and target is not None
        subject.progress("hydra")
        how = dict(live_scales=live_scales, ablated=ablated)
        return steering, _hydra(opened, subject, source, target, chosen, **how)

    def show_found(found: tuple[Steering, Hydra | None]) -> None:
        show(found[0])
        if found[1] is not None:
            show_hydra(found[1])

    def to_json(found: tuple[Steering, Hydra | None]) -> dict[str, Any]:
        steering, needed = found
        return steering.to_json() | ({} if needed is None else dict(hydra=needed.to_json()))

    asked.answer(
        find,
        show_found,
        of=open_prompt,
        to_json=to_json,
        figure=figure,
        drawn=lambda found: found[0],
    )


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as e:
        raise InputError(
            f"--scales expects numbers separated by commas, as in -1,0,1,2; got {quoted(text)}"
        ) from e


def _labels(path: Path | None) -> dict[tuple[int, int], str] | None:
    if path is None:
        return None
    from qkattr.labels.read import read_labels

    return read_labels(path)


def _group(group: str | None, label: str | None, labels) -> Group | None:
    from qkattr.labels.groups import read_group, search_labels

    if group is not None and label is not None:
        raise InputError("--group and --label both choose the features; give one of them")
    if label is not None and labels is not None:
        return search_labels(labels, label)
    if group is None:
        return None
    path, _, name = group.rpartition(":")
    named = path.endswith(".toml")
    return read_group(path, name) if named else read_group(group)


def _check_ends(source, target, edited: bool, needs_ends: bool, choosing: list[str]) -> None:
    if (source is None) != (target is None):
        given, missing = ("--from", "--to") if target is None else ("--to", "--from")
        raise InputError(f"{given} goes with {missing}, which is missing; give both")
    if source is None and needs_ends:
        raise InputError(
            "--hydra, --group and --label choose among heads by loading; give --from and --to"
        )
    if source is None and choosing:
        raise InputError(
            f"{choosing[0]} goes with --from and --to, which choose edits; give these too"
        )
    if source is None and not edited:
        raise InputError("nothing to edit; give --edit, --ablate, or --from and --to")


def _hydra(traced: Traced, subject: Subject, source: str, target: str, edits, **how) -> Hydra:
    """Of the heads that are edited, in the order of their loadings."""
    from qkattr.experiments.choose import heads_between
    from qkattr.experiments.hydra import hydra

    edited = {head for edit in edits for head in edit.heads or ()}
    ranked = heads_between(traced, subject, source=source, target=target)
    heads = [head for head in ranked if head in edited]
    return hydra(
        subject,
        [*heads, *sorted(edited - set(heads))],
        edits,
        query=traced.position(target),
        key=traced.position(source),
        **how,
    )
