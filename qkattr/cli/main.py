"""`qkattr`: the commands, and what becomes of errors.

Exit codes: 0 done; 2 the input is wrong, or takes more memory than there is (one line on stderr);
1 a fault of qkattr; 130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any, cast

import typer

from qkattr.cli import (
    check,
    demo,
    distance,
    faithfulness,
    features,
    heads,
    marginals,
    mechanisms,
    models,
    pack,
    pairs,
    qk,
    steer,
    tokens,
    trace,
    train,
    why,
)
from qkattr.cli.options import expanded
from qkattr.errors import InputError, clipped, printable, quoted

#: Characters of an error message that are printed, at most.
LONGEST = 1000

#: What makes a command take less memory, beside a shorter prompt or text and --dtype.
_SMALLER = {
    "trace": "--max-rows or --max-slots",
    "steer": "the number of --scales",
    "features": "--batch",
    "train": "batch, buffer or width in the config (--set batch=...)",
}

# What is wrong with a command line. Some versions of typer bring a click of their own, so that it
# is not always `click.UsageError`.
_UsageError: type[Exception] = cast(Any, typer.BadParameter.__bases__[0])

app = typer.Typer(
    name="qkattr",
    help="Attribution graphs that explain attention: why did that head look there?",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (
    trace.trace,
    qk.qk,
    why.why,
    mechanisms.mechanisms,
    distance.distance,
    marginals.marginals,
    pairs.pairs,
    heads.heads,
    steer.steer,
    faithfulness.faithfulness,
    tokens.tokens,
    check.check,
    train.train,
    pack.pack,
    demo.demo,
    features.features,
    models.models,
):
    app.command()(expanded(command))


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version."),
) -> None:
    if version:
        from qkattr.version import __version__

        print(__version__)
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


def _said(error: Any) -> str:
    """What is wrong with the command line, in one line."""
    command = error.ctx.command_path if error.ctx else "qkattr"
    return f"{error.format_message().rstrip('.')}; see `{command} --help`"


def _out_of_memory(error: Exception, arguments: list[str]) -> str | None:
    """What to do about a device, or a host, that has no memory left; None: that is not it."""
    text = str(error)
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text:
        return None
    asked = re.search(r"allocat\w* ([\d.]+ ?([KMGT]?i?B|bytes))", text)
    size = f" for {asked[1]}" if asked else ""
    smaller = [f"lower {_SMALLER[name]}" for name in arguments[:1] if name in _SMALLER]
    dtype = [] if "bfloat16" in arguments else ["give --dtype bfloat16"]
    knobs = ", ".join([*smaller, "shorten the prompt or the text", *dtype])
    return f"out of memory{size}; {knobs}, or use a larger device"


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    try:
        code = app(arguments, prog_name="qkattr", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except InputError as e:
        message = str(e)
    except _UsageError as e:
        message = _said(e)
    except (KeyboardInterrupt, typer.Abort):
        print("qkattr: interrupted", file=sys.stderr)
        return 130
    except (BrokenPipeError, SystemExit) as e:
        # Whoever read the output has seen enough; typer makes an exit with code 1 of that.
        if not isinstance(e.__context__ if isinstance(e, SystemExit) else e, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        if e.filename is None:
            raise
        message = f"cannot use {quoted(os.fsdecode(e.filename))}: {e.strerror}; give another path"
    except Exception as e:
        given = sys.argv[1:] if arguments is None else arguments
        if (message := _out_of_memory(e, given)) is None:
            raise
    line = printable(" ".join(message.split()))
    print(f"qkattr: {clipped(line, LONGEST)}", file=sys.stderr)
    return 2
