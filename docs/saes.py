"""Measures sets of SAEs by the same code, into docs/saes.json, and prints README's table of it.

    python docs/saes.py ROWS.npy shipped=smollm2 interim=FOLDER ... [--rows 64]
    python docs/saes.py

ROWS.npy: int[n, 128] token ids, whose last rows were held out of training. Sets that are in the
file and are not named stay.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import qkattr
from qkattr.features.check import check_saes

FILE = Path(__file__).parent / "saes.json"
HEAD = "boundary | unexplained variance | median relative error | L0 | dead | loss recovered"


def table(report: dict) -> str:
    """Markdown, a row a boundary."""
    rows = [
        f"{r['boundary']} | {r['unexplained_variance']:.3f} | {r['median_relative_error']:.3f} | "
        f"{r['l0']:.1f} | {r['dead']} | "
        + ("-" if r["loss_recovered"] is None else f"{r['loss_recovered']:.4f}")
        for r in report["boundaries"]
    ]
    return "\n".join(f"| {row} |" for row in (HEAD, " | ".join(["---"] * 6), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", nargs="?")
    parser.add_argument("sets", nargs="*", metavar="NAME=SAES")
    parser.add_argument("--rows", type=int, default=64)
    given = parser.parse_args()
    reports = json.loads(FILE.read_text()) if FILE.is_file() else {}
    for named in given.sets:
        name, saes = named.split("=")
        rows = np.load(given.text, mmap_mode="r")[-given.rows :]
        reports[name] = check_saes(qkattr.load("smollm2", saes), rows, text=Path(given.text).name)
        FILE.write_text(json.dumps(reports, indent=1) + "\n")
    if "shipped" in reports:
        print(table(reports["shipped"]))


if __name__ == "__main__":
    main()
