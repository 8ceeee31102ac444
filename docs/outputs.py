"""Writes what the pages show of commands: printed blocks, and figures.

    python docs/outputs.py             run all commands, rewrite the pages' blocks, draw the figures
    python docs/outputs.py --check     run the printing ones, and name the blocks that differ

A block of a page is a comment with the command, and below it what it prints:

    <!-- prints 1-12, 30-: qkattr trace "..." --out aunt -->
    ```text
    ...
    ```

The numbers are lines of the output, from 1; what lies between two of the ranges is shown as `...`.
Commands run in one temporary folder, in the order of the pages, so that one may read what an
earlier one wrote. Figures are listed in `FIGURES`, each with its command; they need matplotlib. The
README's page is a screenshot of what `qkattr demo` writes, and needs Chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from qkattr.cli.main import main as run_command

DOCS = Path(__file__).parent
PAGES = [DOCS / f"{name}.md" for name in ("quickstart", "interventions", "findings")]
AUNT = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
OPPOSITE = 'The opposite of "small" is "'
SALLY = f"{shlex.quote(AUNT)} --model smollm2 --saes smollm2"
MARY_SUE = AUNT.replace("Sally", "Mary Sue") + " Mary"
SUE = f"{shlex.quote(MARY_SUE)} --model smollm2 --saes smollm2"
SMALL = f"{shlex.quote(OPPOSITE)} --model smollm2 --saes smollm2"

#: Every figure of the docs, and the command that draws it.
FIGURES = {
    "qk.png": f"qkattr qk {SALLY} --layer 23 --head 7 --query -1 --key ' Sally' --figure",
    "steer.png": f"qkattr steer {SALLY} --from ' Sally' --to -1 --heads 5 --figure",
    "why.png": f"qkattr why {SUE} --layer 23 --head 2 --query -1 --key ' Sue' --figure",
    "mechanisms.png": f"qkattr mechanisms {SMALL} --layer 25 --head 7 --query -1 --key 'small' "
    "--features --figure",
}

BLOCK = re.compile(
    r"^<!-- prints (?P<lines>[\d, -]+): (?P<command>qkattr [^\n]*?) -->\n"
    r"```text\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
#: How far a number may be from the page's on another machine: of its size, or of 1.
CLOSE = 0.02


def output_of(command: str) -> str:
    """What a command prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        run_command(shlex.split(command)[1:])
    return printed.getvalue()


def chosen(text: str, lines: str) -> str:
    """Some lines of an output, without the space around them."""
    rows, parts = [row.rstrip() for row in text.splitlines()], []
    for part in lines.split(","):
        first, _, last = part.strip().partition("-")
        end = int(last) if last else int(first) if "-" not in part else len(rows)
        parts.append("\n".join(rows[int(first) - 1 : end]).strip("\n"))
    return "\n  ...\n".join(parts) + "\n"


def blocks(page: Path) -> list[re.Match[str]]:
    return list(BLOCK.finditer(page.read_text(encoding="utf-8")))


def printed_by(block: re.Match[str]) -> str:
    """What the block should show."""
    return chosen(output_of(block["command"]), block["lines"])


def differences(shown: str, printed: str) -> str:
    """The first line in which two outputs differ; numbers may be close."""
    pairs = zip(shown.splitlines(), printed.splitlines(), strict=False)
    for one, other in pairs:
        words = [re.sub(r"[\s─█░]+", " ", NUMBER.sub("#", line)).strip() for line in (one, other)]
        numbers = [
            [float(n.replace(",", "")) for n in NUMBER.findall(line)] for line in (one, other)
        ]
        near = len(numbers[0]) == len(numbers[1]) and all(
            abs(a - b) <= CLOSE * max(1, abs(a)) for a, b in zip(*numbers, strict=True)
        )
        if words[0] != words[1] or not near:
            return f"the page has {one!r}, the command prints {other!r}"
    if len(shown.splitlines()) != len(printed.splitlines()):
        return "the page and the command have different numbers of lines"
    return ""


@contextlib.contextmanager
def somewhere_else():
    """A temporary folder as the current one."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def check() -> list[str]:
    """The blocks that differ from what their commands print."""
    wrong = []
    with somewhere_else():
        for page in PAGES:
            for block in blocks(page):
                difference = differences(block["text"], printed_by(block))
                if difference:
                    wrong.append(f"{page.name}: {block['command']}: {difference}")
    return wrong


def write() -> None:
    """Rewrite all blocks and draw all figures."""
    with somewhere_else():
        for page in PAGES:
            text = page.read_text(encoding="utf-8")
            printed = [(block.span("text"), printed_by(block)) for block in blocks(page)]
            for (start, end), new in reversed(printed):
                text = text[:start] + new + text[end:]
            page.write_text(text, encoding="utf-8")
        for name, command in FIGURES.items():
            run_command([*shlex.split(command)[1:], str(DOCS / name)])
        screenshot(DOCS / "page.png")


def screenshot(path: Path) -> None:
    """The first screen of the demo's page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("no Chromium here; docs/page.png is left as it is", file=sys.stderr)
        return
    output_of("qkattr demo --out demo")
    subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--force-device-scale-factor=1.5", "--window-size=1180,1050",
            f"--screenshot={path}", Path("demo/index.html").resolve().as_uri(),
        ],
        check=True, capture_output=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if one differs")
    if not parser.parse_args().check:
        write()
        return
    wrong = check()
    print("\n".join(wrong) or "all blocks are what their commands print")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
