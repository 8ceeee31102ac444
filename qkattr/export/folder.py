"""A result as a folder: `graph.json` (for viewers), `graph.npz` (in columns) and `index.html`.

Everything is written under temporary names beside the old files and renamed at the end, so that a
full disk or a process killed while it writes leaves the old output whole. Both data files carry the
run's id; a folder of two runs is refused.
"""

from __future__ import annotations

import dataclasses
import io
import json
import mmap
from pathlib import Path
from typing import Any, cast

import numpy as np

from qkattr.cards.card import Card
from qkattr.characters import joined
from qkattr.config import ModelFacts
from qkattr.errors import InputError
from qkattr.export.graph_json import SCHEMA, graph_json
from qkattr.export.html import page
from qkattr.files import DAMAGED_NPZ, encoded, write_files
from qkattr.graph.accounts import Account, HeadEffects
from qkattr.graph.tables import Edges, Graph, Nodes
from qkattr.options import TraceOptions
from qkattr.qk.table import QKAttribution
from qkattr.result import Prediction, Traced


def save_result(result: Traced, folder: Path, links: int | str | None = None) -> Path:
    """Write the folder and return the path of its page. links: see `graph_json`."""
    files = {
        "graph.npz": _columns(result),
        "graph.json": encoded(graph_json(result, links)),
        "index.html": encoded_page(result),
    }
    write_files(folder, files)
    return folder / "index.html"


def encoded_page(result: Traced) -> bytes:
    r"""UTF-8; half a surrogate pair becomes `\udc80`."""
    return page(result).encode(errors="backslashreplace")


def check_ours(folder: Path, *, force: bool = False) -> None:
    """Fail where a folder holds what someone else put there, so that nothing of theirs is replaced.

    force: it may.

    Raises:
      InputError: it holds something, and no result of qkattr.
    """
    if force or not folder.is_dir() or not any(folder.iterdir()) or _is_ours(folder):
        return
    raise InputError(
        f"{folder} holds other files and no result of qkattr; give a new or an empty folder, or "
        "--force to write among them"
    )


def _is_ours(folder: Path) -> bool:
    """Whether both files of a result are there and the JSON has our part."""
    json_file, columns = folder / "graph.json", folder / "graph.npz"
    if not json_file.is_file() or not columns.is_file() or not json_file.stat().st_size:
        return False
    with json_file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return text.find(b'"qkattr"') >= 0


def read_result(folder: Path) -> Traced:
    """What `save_result` wrote.

    Raises:
      InputError: not such a folder, damaged, or of another schema.
    """
    header, columns = _read(folder)
    try:
        return _build(header, columns)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as e:
        raise InputError(
            f"{folder} holds a damaged result ({type(e).__name__}: {e}); trace the prompt again"
        ) from e


#: The tables of a graph, by their names in `graph.npz`.
TABLES = {"nodes": Nodes, "edges": Edges, "account": Account, "heads": HeadEffects}


def _build(header: dict[str, Any], columns: dict[str, np.ndarray]) -> Traced:
    tables = {
        name: kind(**{f.name: columns[f"{name}.{f.name}"] for f in dataclasses.fields(kind)})
        for name, kind in TABLES.items()
    }
    graph = Graph(
        **tables,
        leak=header["leak"],
        replacement=header["replacement"],
        completeness=header["completeness"],
    )
    _check_columns(graph, n_tokens=len(header["tokens"]))
    settings = header["settings"]
    return Traced(
        tokens=header["tokens"],
        prompt=_prompt(header),
        token_ids=tuple(header["token_ids"]),
        bos=header["bos"],
        predictions=[
            cast(Prediction, {k: v for k, v in p.items() if k != "role"})
            for p in header["predictions"]
        ],
        graph=graph,
        sinks=header["sinks"],
        scores=np.array(header["scores"], int).reshape(-1, 5),
        qk={place: QKAttribution.from_json(raw) for place, raw in header["qk"].items()},
        facts=ModelFacts.from_json(settings),
        options=TraceOptions.from_json(settings),
        scan=settings.get("scan"),
        provenance=header["provenance"],
        labels=_labels(header["labels"]),
        vocabulary={int(i): text for i, text in header["vocabulary"].items()},
        cards={(c.boundary, c.index): c for c in map(Card.from_json, header["cards"])},
    )


def _prompt(header: dict[str, Any]) -> str:
    """Its text; results of before it was kept have tokens alone."""
    prompt = header["prompt"] if "prompt" in header else joined(header["tokens"])
    if not isinstance(prompt, str):
        raise TypeError("the prompt is no text")
    return prompt


def _check_columns(graph: Graph, *, n_tokens: int) -> None:
    """The columns of each table are equally long, and what they point at exists."""
    for table in (getattr(graph, name) for name in TABLES):
        lengths = {len(getattr(table, field.name)) for field in dataclasses.fields(table)}
        if len(lengths) != 1:
            raise ValueError(f"columns of {sorted(lengths)} rows in one table")
    pointers = (
        (graph.edges.source, len(graph.nodes)),
        (graph.edges.target, len(graph.nodes)),
        (graph.nodes.position, n_tokens),
        (graph.account.node, len(graph.nodes)),
        (graph.heads.query, n_tokens),
        (graph.heads.key, n_tokens),
        (graph.heads.head, graph.edges.heads.shape[1]),
    )
    for column, size in pointers:
        if len(column) and not 0 <= column.min() <= column.max() < size:
            raise ValueError(f"a row points outside 0..{size - 1}")


def _labels(raw: dict[str, str]) -> dict[tuple[int, int], str]:
    keys = {key: key.split(":") for key in raw}
    return {(int(b), int(i)): raw[key] for key, (b, i) in keys.items()}


def _columns(result: Traced) -> bytes:
    arrays = {
        f"{table}.{field.name}": getattr(getattr(result.graph, table), field.name)
        for table, fields in TABLES.items()
        for field in dataclasses.fields(fields)
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, run=np.array(result.provenance["run"]), **arrays)
    return buffer.getvalue()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    for name in ("graph.json", "graph.npz"):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder} has no {name}; expected a folder that `qkattr trace --out` wrote"
            )
    try:
        header = json.loads((folder / "graph.json").read_text(encoding="utf-8"))["qkattr"]
        schema, run = header["schema"], header["provenance"]["run"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise InputError(
            f"{folder / 'graph.json'} is not a qkattr graph; write it again with `qkattr trace`"
        ) from e
    if schema != SCHEMA:
        raise InputError(
            f"{folder} has schema {schema}, this qkattr reads schema {SCHEMA}; trace the prompt "
            "again"
        )
    try:
        with (folder / "graph.npz").open("rb") as file, np.load(file, allow_pickle=False) as data:
            columns = {name: data[name] for name in data.files}
        written_by = str(columns["run"])
    except DAMAGED_NPZ as e:
        raise InputError(
            f"{folder / 'graph.npz'} is damaged; write it again with `qkattr trace`"
        ) from e
    if written_by != run:
        raise InputError(
            f"{folder} holds graph.json and graph.npz of different runs; trace the prompt again"
        )
    return header, columns
