"""`qkattr faithfulness`: attributions tested against the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from qkattr.cli import common, options
from qkattr.errors import InputError, printable, quoted

if TYPE_CHECKING:
    from qkattr.experiments.faithfulness import Report
    from qkattr.load.bundle import Bundle, Prompt
    from qkattr.subject import Stages, Subject


def faithfulness(
    prompts: Annotated[
        str,
        typer.Argument(metavar="PROMPT|FILE", help="A text, or a .txt or .toml file of prompts."),
    ],
    model: options.Saes = options.Saes(),
    out: Annotated[
        Path | None,
        Option(
            help="Folder for the tables, the figure, and each prompt's measures, which a second "
            "run takes from there.",
            show_default=False,
        ),
    ] = None,
    measures: Annotated[
        str, Option(help="What to measure, among qk,heads,effects,edges,nodes.")
    ] = ("qk,heads,effects,edges,nodes"),
    draws: Annotated[int, Option(help="The number of random draws of a control.")] = 20,
    seed: Annotated[int, Option(min=0, help="The seed of all random draws.")] = 0,
    reading: options.ComponentOptions = options.ComponentOptions(),
    json: common.Json = False,
) -> None:
    """Test explanations against the model: scores, heads, effects, edges and nodes."""
    from qkattr.load.text.prompts import GivenPrompt, read_prompts

    chosen = [name.strip() for name in measures.split(",")]
    given = read_prompts(prompts) if _is_file(prompts) else [GivenPrompt(prompts)]
    read = [reading.read(one.prompt) for one in given]  # pyright: ignore[reportArgumentType]
    model.check_both()
    if out is not None:
        from qkattr.files import check_writable

        check_writable(out)
    written: list[Path] = []

    def find(progress: Stages) -> Report:
        opened.append(model.open())
        from qkattr.experiments.faithfulness import Between, faithfulness
        from qkattr.subject import subject

        how = dict(reading.components, progress=progress)
        subjects = _subjects(read, lambda prompt: subject(opened[0], prompt, **how))
        between = [
            Between(subject, one.source, one.target, one.group)
            for subject, one in zip(subjects, given, strict=True)
        ]
        report = faithfulness(between, measures=chosen, draws=draws, seed=seed, folder=out)
        written.extend([] if out is None else _write(report, out))
        return report

    def show(report: Report) -> None:
        _show(report)
        if written:
            print(printable(f"Written: {', '.join(str(path) for path in written)}"))

    opened: list[Bundle] = []
    common.answer(find, show, json=json, notes=lambda: opened[0].notes)


def _subjects(prompts: Sequence[Prompt], open: Callable[[Prompt], Subject]) -> list[Subject]:
    """Every prompt, opened; an error says which one cannot be used, where there are several."""
    found = []
    for i, prompt in enumerate(prompts):
        try:
            found.append(open(prompt))
        except InputError as e:
            if len(prompts) == 1:
                raise
            said = f"prompt {i + 1} of {len(prompts)}, {quoted(str(prompt), 40)}"
            raise InputError(f"{said}: {e}") from e
    return found


def _is_file(text: str) -> bool:
    """Whether PROMPT|FILE names a file. One with a file's ending that is none is an error."""
    if not text.endswith((".txt", ".toml")) or "\n" in text:
        return False
    if not Path(text).is_file() and " " not in text:
        raise InputError(f"no such file: {quoted(text)}; give a .txt or .toml of prompts, or text")
    return Path(text).is_file()


def _write(report: Report, out: Path) -> list[Path]:
    """The tables, and the figure where matplotlib is installed."""
    from qkattr.files import dumps, write_files

    write_files(out, {"faithfulness.json": dumps(report.to_json()).encode()})
    written = [out / "faithfulness.json"]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return written
    from qkattr.export.faithfulness_figure import faithfulness_figure

    return [*written, faithfulness_figure(report, out / "faithfulness.svg")]


def _cell(value: dict[str, float] | float | str) -> str:
    if not isinstance(value, dict):
        return f"{value:g}" if isinstance(value, int | float) else str(value)
    if value["n"] == 1:
        return f"{value['mean']:.3g}"
    return f"{value['mean']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"


#: Titles, and the columns that are printed; all are in the JSON.
_TABLES = {
    "scores": (
        "One feature removed: predicted and actual change of the score (worst: of the largest)",
        ("side", "scales", "worst", "correlation", "slope"),
    ),
    "features": (
        "The k strongest features of each head removed, against matched controls",
        (
            "side",
            "k",
            "scales",
            "attention_lost",
            "attention_control",
            "log_p_lost",
            "log_p_control",
        ),
    ),
    "heads": (
        "n heads ablated: log probability that the prediction loses, in nats",
        ("n", "influence", "loading", "effect", "attention", "effect_anywhere", "random"),
    ),
    "effects": (
        "Heads ablated one by one: what measures say of the logit's loss, all others live",
        ("ablation", "measure", "by", "rank", "sign", "top"),
    ),
    "places": (
        "Keys masked for one head and query: what measures say of the logit's loss, all else live",
        ("measure", "by", "rank", "sign", "top"),
    ),
    "edges": (
        "Edges against the change of their target, the source scaled down by a share",
        ("linearisation", "read", "against", "correlation", "crossing", "sign", "rank"),
    ),
    "nodes": (
        "Nodes of a boundary: area under the deletion curve (low is good) and insertion (high)",
        ("choice", "order", "deletion", "insertion"),
    ),
    "paraphrases": (
        "Edges between features that two paraphrases share",
        ("group", "common", "shared", "sign", "rank"),
    ),
}


def _shown(row: dict[str, Any]) -> bool:
    """Of ablated heads and places, the logit with the others live; all else is in the JSON."""
    return "others" not in row or (row["others"], row["read"]) == ("live", "logit")


def _show(report: Report) -> None:
    """The tables, and where attribution fails."""
    from qkattr.cli.show import console, say, show_table

    out = console()
    n = len(report.prompts)
    say(out, "1 prompt, so no intervals" if n == 1 else f"{n} prompts; means, 95 % intervals")
    for name, (title, columns) in _TABLES.items():
        rows = [
            [_cell(row.get(column, "")) for column in columns]
            for row in report.tables.get(name, ())
            if _shown(row)
        ]
        if rows:
            show_table(out, title, [f"{column.replace('_', ' ')}" for column in columns], rows)
    if report.tables["failures"]:
        say(out, "Where attribution fails:")
    for line in report.tables["failures"]:
        say(out, f"  - {line}")
