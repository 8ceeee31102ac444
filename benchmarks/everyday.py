"""Times what people type every day, each command in a process of its own, as a shell would run it.

    python benchmarks/everyday.py [--repeat 5] [--against CHECKOUT ...] [--json FILE]

The rows are those of the table "A fast everyday": help, tokens, loading the model and its SAEs, a
trace to a saved page, the questions about a saved folder; and, in a process that has traced a
prompt already, another of a new length, for which nothing has been compiled: that row times itself.
Each is run once without being counted, which fills the caches (the converted model, compiled
programs, the disk's pages), then `--repeat` times; wall-clock and processor seconds are medians.
`--against` runs the same commands
on other checkouts in the same run, one after another within each repetition, so that a busy moment
meets all of them. Commands run in a temporary folder; the model's cache folder is one of its own a
checkout, with the model file taken from the usual one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent.parent
PROMPT = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
MODEL = ("-m", "smollm2", "-s", "smollm2")
STORED = ("--layer", "23", "--head", "7", "--query", "14", "--key", "6")
OTHER = ("--layer", "20", "--head", "1", "--query", "14", "--key", "6")
LOAD = "import jax, qkattr; jax.block_until_ready(qkattr.load('smollm2', 'smollm2').params)"
#: Older checkouts have the entry in `main`.
RUN = """
try:
    from qkattr.cli.entry import run
except ImportError:
    from qkattr.cli.main import run
run()
"""

NEW_LENGTH = f"""
import time, jax, qkattr
bundle = qkattr.load('smollm2', 'smollm2')
qkattr.trace(bundle, {PROMPT!r})
jax.config.update('jax_enable_compilation_cache', False)
longer, wall, cpu = {PROMPT!r} + ' and then' * 12, time.perf_counter(), time.process_time()
qkattr.trace(bundle, longer)
print('seconds', time.perf_counter() - wall, time.process_time() - cpu)
"""

#: By the name of a row, the arguments of the interpreter. The first trace makes `saved`.
ROWS = {
    "trace to a saved page": ("-c", RUN, "trace", PROMPT, *MODEL, "--out", "saved"),
    "load the model and its SAEs": ("-c", LOAD),
    "--help": ("-c", RUN, "--help"),
    "tokens": ("-c", RUN, "tokens", PROMPT, "-m", "smollm2"),
    "qk of a saved folder, stored": ("-c", RUN, "qk", "./saved", *STORED),
    "qk of a saved folder, not stored": ("-c", RUN, "qk", "./saved", *OTHER),
    "heads of a saved folder": ("-c", RUN, "heads", "./saved", "--from", "6", "--to", "14"),
    "why of a saved folder": ("-c", RUN, "why", "./saved", *STORED),
    "a new length, process warm": ("-c", NEW_LENGTH),
}


def seconds(arguments: tuple[str, ...], checkout: Path, folder: Path) -> tuple[float, float]:
    """Wall-clock and processor seconds of one command."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "QKATTR_CACHE": str(folder / "cache"),
    }
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    wall = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} in {checkout} failed: {done.stderr.strip()}")
    if done.stdout.startswith("seconds"):  # it timed itself
        wall, cpu = map(float, done.stdout.split()[1:])
        return wall, cpu
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def prepare(folder: Path) -> None:
    """A cache folder that holds the model's file where it has been fetched before."""
    from qkattr.load.smollm2 import cached_file

    (folder / "cache").mkdir(parents=True)
    shutil.copy(cached_file(), folder / "cache")


def measure(checkouts: list[Path], repeat: int) -> list[dict]:
    """One row a command and checkout."""
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / str(i) for i in range(len(checkouts))]
        for folder in folders:
            prepare(folder)
        for name, arguments in ROWS.items():
            pairs = list(zip(checkouts, folders, strict=True))
            for checkout, folder in pairs:
                seconds(arguments, checkout, folder)
            runs = [[seconds(arguments, *pair) for pair in pairs] for _ in range(repeat)]
            for i, checkout in enumerate(checkouts):
                wall, cpu = (statistics.median(run[i][part] for run in runs) for part in range(2))
                found.append(dict(row=name, checkout=str(checkout), wall=wall, cpu=cpu))
                print(f"{name:30} {checkout.name:20} {wall:7.2f} s  {cpu:7.2f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--against", type=Path, nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print(f"{'':30} {'':20} {'wall':>9} {'processor':>11}   load average {os.getloadavg()[0]:.1f}")
    found = measure([*(path.resolve() for path in given.against), HERE], given.repeat)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
