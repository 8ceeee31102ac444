"""`qkattr`: the commands, and what becomes of errors.

Exit codes: 0 done; 2 the input is wrong (one line on stderr); 1 a fault of qkattr; 130 interrupted.
"""

from __future__ import annotations

import sys

import click
import typer

from qkattr.cli import check, heads, qk, tokens, trace
from qkattr.errors import InputError

app = typer.Typer(
    name="qkattr",
    help="Attribution graphs that explain attention: why did that head look there?",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (trace.trace, qk.qk, heads.heads, tokens.tokens, check.check):
    app.command()(command)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        import qkattr

        print(qkattr.__version__)
        raise typer.Exit()


def _said(error: click.UsageError) -> str:
    """What click found wrong with the command line, in one line."""
    command = error.ctx.command_path if error.ctx else "qkattr"
    return f"{error.format_message().rstrip('.')}; see `{command} --help`"


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    try:
        code = app(arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except InputError as e:
        message = str(e)
    except click.exceptions.NoArgsIsHelpError as e:
        print(e.ctx.get_help() if e.ctx else e)
        return 2
    except click.UsageError as e:
        message = _said(e)
    except (KeyboardInterrupt, click.Abort):
        print("qkattr: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    print(f"qkattr: {' '.join(message.split())}", file=sys.stderr)
    return 2


def run() -> None:
    """The console script."""
    sys.exit(main())
