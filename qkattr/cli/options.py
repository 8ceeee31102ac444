"""Options that several commands have, as structs.

A command that takes `model: options.Saes = options.Saes()` has the options `--model`, `--saes`, ...
on its command line, in the place of that parameter, and gets the struct: see `expanded`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qkattr.cli.common import use_compilation_cache
from qkattr.errors import InputError, printable, quoted

if TYPE_CHECKING:
    from qkattr.load import bundle


Missing = Annotated[
    str,
    typer.Option(
        "--missing",
        help="What to do at a boundary without an SAE: stop with an error, or treat it "
        "as raw, one error node.",
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Which model, and how it is read."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help='"smollm2", a Hugging Face folder, a .gguf file, user/repo of the hub, or a name '
            "that `qkattr models` lists.",
            show_default=False,
        ),
    ] = None
    dtype: Annotated[str, typer.Option(help="The type of the weights: float32 or bfloat16.")] = (
        "float32"
    )
    bos_token: Annotated[
        str | None,
        typer.Option(
            help="The token (id or text) that stands for a BOS. Default: the tokenizer's.",
            show_default=False,
        ),
    ] = None
    accept: Annotated[
        list[str] | None,
        typer.Option(
            help="Go on although qkattr does not know this attribute of config.json (repeatable).",
            show_default=False,
        ),
    ] = None

    def check(self) -> None:
        """Fail where no model is named."""
        if self.model is None:
            raise InputError(
                '--model is missing; give "smollm2", a Hugging Face folder or a .gguf file'
            )

    def open(self) -> bundle.Bundle:
        """The model, its weights still on disk; what is to be known of it is said on stderr."""
        return self._open(None, "error")

    def _open(self, saes: str | None, missing: str) -> bundle.Bundle:
        self.check()
        use_compilation_cache()
        from qkattr.load.opening import open_bundle

        opened = open_bundle(
            typing.cast(str, self.model),
            saes,
            dtype=self.dtype,
            missing=missing,
            bos_token=self.bos_token,
            accept=tuple(self.accept or ()),
        )
        for note in opened.notes:
            print(printable(f"qkattr: note: {note}"), file=sys.stderr)
        return opened


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saes(Model):
    """Which model and which SAEs."""

    saes: Annotated[
        str | None,
        typer.Option(
            "--saes",
            "-s",
            help='"smollm2", a folder of SAEs (or FOLDER:PATTERN), a packed file, user/repo of the '
            "hub (or user/repo:PATTERN), or a name that `qkattr models` lists.",
            show_default=False,
        ),
    ] = None
    missing: Missing = "error"

    def check_both(self) -> None:
        """Fail where the model or the SAEs are not named."""
        self.check()
        if self.saes is None:
            raise InputError(
                '--saes is missing; give "smollm2", a folder of SAEs, one after every block, or a '
                "file that `qkattr pack` wrote"
            )

    def open(self) -> bundle.Bundle:
        """As `Model.open`, with the SAEs where they are named."""
        return self._open(self.saes, self.missing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """How text becomes tokens."""

    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Put a BOS first, or do not. Default: as the SAEs were trained, else as the"
            " tokenizer does.",
            show_default=False,
        ),
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions(Text):
    """How PROMPT becomes tokens."""

    ids: Annotated[
        bool, typer.Option("--ids", help="Read PROMPT as token ids, separated by commas.")
    ] = False

    def read(self, prompt: str) -> bundle.Prompt:
        """The prompt as the library takes it."""
        if not self.ids:
            return prompt
        try:
            return [int(part) for part in prompt.split(",")] if prompt.strip() else []
        except ValueError as e:
            raise InputError(
                f"--ids expects token ids separated by commas, as in 1,34,5; got {quoted(prompt)}"
            ) from e


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComponentOptions(PromptOptions):
    """How PROMPT becomes components."""

    sink: Annotated[
        bool,
        typer.Option(
            "--sink/--no-sink",
            help="Treat position 0 and positions of massive norm as one component each.",
        ),
    ] = True

    @property
    def components(self) -> dict[str, Any]:
        """As options of the library."""
        return dict(sinks=self.sink, bos=self.bos)


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer is to see it: a parameter that is a struct is the struct's fields."""
    hints = typing.get_type_hints(command, include_extras=True)
    structs: dict[str, Any] = {n: h for n, h in hints.items() if dataclasses.is_dataclass(h)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in structs:
            parameters += _fields(structs[parameter.name])
        else:
            annotation, kind = hints[parameter.name], parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(annotation=annotation, kind=kind))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        made = {
            name: struct(
                **{field.name: given.pop(field.name) for field in dataclasses.fields(struct)}
            )
            for name, struct in structs.items()
        }
        command(**given, **made)

    del run.__wrapped__
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    return run


def _default(value: Any) -> Any:
    return inspect.Parameter.empty if value is dataclasses.MISSING else value


def _fields(struct: Any) -> list[inspect.Parameter]:
    """The struct's fields as parameters."""
    hints = typing.get_type_hints(struct, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(field.default),
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(struct)
    ]
