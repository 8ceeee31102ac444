"""`qkattr steer`: scale features inside the QK circuit of chosen heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from qkattr.cli import common, options
from qkattr.errors import InputError, printable, quoted

if TYPE_CHECKING:
    from qkattr.experiments.hydra import Hydra
    from qkattr.experiments.steer import Steering
    from qkattr.load.bundle import Bundle
    from qkattr.load.groups import Group
    from qkattr.result import Result

Option = typer.Option


def steer(
    context: typer.Context,
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT|DIR", help="A text, or a folder that `qkattr trace` wrote."),
    ],
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
        str, Option(help="With --from and --to: rank heads by influence or by loading.")
    ] = "influence",
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
    figure: Annotated[
        Path | None,
        Option(help="Draw a figure into this .svg, .png or .pdf file.", show_default=False),
    ] = None,
    model: options.Saes = options.Saes(),
    reading: options.Asked = options.Asked(),
    json: common.Json = False,
) -> None:
    """Scale features inside the QK circuit of chosen heads only, and see what the model says."""
    from qkattr.experiments.choose import check_choice, choose_edits
    from qkattr.experiments.edits import parse_edit, parse_heads
    from qkattr.experiments.steer import check_asked, check_scales
    from qkattr.experiments.steer import steer as steer_prompt
    from qkattr.load.groups import search_labels

    edits = [parse_edit(text) for text in edit or ()]
    ablated = parse_heads(ablate) if ablate is not None else ()
    factors = check_scales(_numbers(scales))
    known = _labels(labels)
    features_of = _group(group, label, known)
    choosing = common.given(context, "heads", "side", "features", "by")
    named = group is not None or label is not None
    _check_ends(source, target, bool(edits or ablated), hydra or named, choosing)
    _check_figure(figure)
    choice = dict(source=source, target=target, heads=heads, side=side, features=features, by=by)

    def check(tokens: list[str], shape: tuple[int, int], bundle: Bundle | None = None) -> None:
        """Fail before weights are read."""
        if source is not None:
            check_choice(tokens, shape, **choice)
        if bundle is not None:
            check_asked(bundle, tokens, edits, ablated, track or (), query)

    with common.progress() as progress:
        subject, given, components = _open(
            prompt, model, reading, context=context, check=check, trace=source is not None,
            progress=progress,
        )  # fmt: skip
        if source is not None:
            progress("choosing heads and features")
            if label is not None and known is None:
                features_of = search_labels(cast("Result", subject).labels, label)
            edits += choose_edits(subject, **choice, group=features_of)
        steering = steer_prompt(
            subject,
            given,
            edits,
            scales=factors,
            freeze_others=freeze_others,
            live_scales=live_scales,
            ablate=ablated,
            track=track or (),
            query=query,
            labels=known,
            draws=draws if control else 0,
            seed=seed,
            progress=progress,
            **components,
        )
        needed = None
        if hydra:
            progress("hydra")
            how = dict(live_scales=live_scales, ablated=ablated)
            needed = _hydra(subject, source, target, edits, **how)
        if figure is not None:
            progress("drawing")
            steering.figure(figure)
    if json:
        extra = {} if needed is None else dict(hydra=needed.to_json())
        common.print_json(steering.to_json() | extra, subject.notes)
        return
    _show(steering)
    if needed is not None:
        _show_hydra(needed)
    if figure is not None:
        print(printable(f"Drawn: {figure}"))


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
    from qkattr.load.labels import read_labels

    return read_labels(path)


def _group(group: str | None, label: str | None, labels) -> Group | None:
    from qkattr.load.groups import read_group, search_labels

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


def _check_figure(figure: Path | None) -> None:
    if figure is not None:
        from qkattr.export.figures import check_figure
        from qkattr.export.folder import check_writable

        check_figure(figure)
        check_writable(figure.parent)


def _open(prompt, model: options.Saes, reading: options.Asked, *, context, check, trace: bool,
          progress):  # fmt: skip
    """What `qkattr.steer` takes: a result, or a bundle with a prompt and its options."""
    if reading.is_folder(prompt):
        result = options.open_saved(prompt, context)
        check(result.tokens, (result.settings["n_blocks"], result.settings["n_heads"]))
        progress("loading the model")
        return options.with_model(result, model), None, {}
    given = reading.read(prompt)
    if trace:
        model.check_both()
    bundle = model.open()
    if not trace:
        return bundle, given, reading.components
    from qkattr.analysis import trace as trace_prompt
    from qkattr.positions import token_texts

    tokens = token_texts(bundle, bundle.tokenize(given, reading.bos)[0])
    check(tokens, bundle.config.head_grid, bundle)
    result = trace_prompt(bundle, given, progress=progress, qk=0, **reading.components)
    return result, None, {}


def _hydra(result: Result, source: str, target: str, edits, **how) -> Hydra:
    """Of the heads that are edited, in the order of their loadings."""
    from qkattr.experiments.choose import heads_by_loading
    from qkattr.experiments.hydra import hydra

    edited = {head for edit in edits for head in edit.heads or ()}
    ranked = heads_by_loading(result, source=source, target=target)
    heads = [head for head in ranked if head in edited]
    return hydra(
        result.session,
        [*heads, *sorted(edited - set(heads))],
        edits,
        query=result.position(target),
        key=result.position(source),
        **how,
    )


def _show(steering: Steering) -> None:
    """The edits, the prediction at every scale, and who looked instead."""
    from qkattr.cli.show import console, percent, say, show_table
    from qkattr.load.mapped import some

    out = console()
    rows = [
        (
            f"{e['boundary']}:{e['kind'] if e['index'] is None else e['index']}",
            f"{quoted(e['token'])} {e['position']}",
            e["side"],
            "" if e["activation"] is None else f"{e['activation']:.3g}",
            " ".join(e["heads"]),
            e["label"],
        )
        for e in steering.edits
    ]
    columns = ("component", "at", "side", "activation|", "heads", "label")
    if rows:
        show_table(out, "Scaled", columns, rows)
    if steering.ablated:
        say(out, f"Ablated: {' '.join(steering.ablated)}")
    others = "frozen at the clean run" if steering.freeze_others else "live"
    norms = "live" if steering.live_scales else "frozen"
    share = percent(steering.share_of_heads)
    heads = "1 head" if steering.n_heads == 1 else f"{steering.n_heads} heads"
    say(out, f"{heads}, {share} of the model's; patterns of the others {others}")
    say(out, f"norm scales of edited reads {norms}; values and everything else as they are")
    control = (steering.control or {}).get("tracked", {})
    first, *others = list(steering.tracked)[: 4 if control else 5]
    rows = [
        (
            f"{scale:g}",
            quoted(steering.top[i][0]["token"]),
            f"{steering.tracked[first][i]:.4f}",
            *_spread(control.get(first), i),
            *(f"{steering.tracked[name][i]:.4f}" for name in others),
            f"{steering.kl[i]:.4f}",
            *_attention(steering.patterns[i], steering.keys),
        )
        for i, scale in enumerate(steering.scales)
    ]
    named, *more = (f"P {quoted(name, 16)}|" for name in (first, *others))
    columns = ("scale|", "says", named, *(["control|"] if control else []), *more, "KL|")
    keys = some([f"{quoted(steering.tokens[k], 16)} {k}" for k in steering.keys])
    title = "Next token"
    if steering.patterns[0]:
        columns = (*columns, "attention|")
        title = f"Next token; mean attention of the edited heads to {keys}"
    show_table(out, title, columns, rows)
    _say_control(out, steering)
    rows = [(r["head"], f"{r['attention']:.4f}", f"{r['change']:+.4f}") for r in steering.rose[:5]]
    if rows:
        at = f"at scale {steering.rose[0]['scale']:g}"
        title = f"Unedited heads that look at {keys} otherwise {at}"
        show_table(out, title, ("head", "clean attention|", "change|"), rows)


def _spread(control: dict[str, list[float]] | None, i: int) -> list[str]:
    """The median and range of a probability at a scale under the random edits, if there are any."""
    if control is None:
        return []
    median, low, high = (control[of][i] for of in ("median", "low", "high"))
    return [f"{median:.2f} ({low:.2f}..{high:.2f})"]


def _say_control(out, steering: Steering) -> None:
    """What the columns of the control are, or why there are none."""
    from qkattr.cli.show import say

    control = steering.control
    if control is None:
        return
    if "reason" in control:
        say(out, f"There is no random control. {control['reason']}")
        return
    what = []
    if steering.edits:
        what.append("other active features of the same positions and sizes")
    if steering.ablated:
        what.append("other heads of the same blocks")
    say(
        out,
        f"control: the probability before it (median and range) when {' and '.join(what)} are "
        f"edited instead: {control['draws']} random draws, seed {control['seed']}",
    )


def _attention(patterns: dict[str, list[float]], keys: list[int]) -> list[str]:
    """The mean over heads, if there are any."""
    rows = list(patterns.values())
    return [f"{sum(row[k] for row in rows for k in keys) / len(rows):.4f}"] if rows else []


def _show_hydra(hydra: Hydra) -> None:
    from qkattr.cli.show import console, say, show_table

    out = console()
    rows = [
        (n, hydra.heads[n - 1] if n else "", f"{live:.4f}", f"{frozen:.4f}")
        for n, live, frozen in zip(hydra.counts, hydra.live["p"], hydra.frozen["p"], strict=True)
    ]
    columns = ("heads|", "the last of them", "P, others live|", "P, others frozen|")
    show_table(out, f"P({quoted(hydra.token)}) at scale {hydra.scale:g}", columns, rows)

    def said(fate) -> str:
        n = fate["flip"]
        return "never flips" if n is None else f"flips with {n} head{'s' * (n != 1)}"

    say(out, f"The prediction {said(hydra.live)}; with the others frozen it {said(hydra.frozen)}.")
    rows = [(c["head"], f"{c['before']:.4f}", f"{c['rise']:+.4f}") for c in hydra.compensation]
    if rows:
        title = "Unedited heads that make up for it, all of them edited"
        show_table(out, title, ("head", "clean attention|", "rise|"), rows)
