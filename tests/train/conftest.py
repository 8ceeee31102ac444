"""A tiny model in a folder, text for it, and a config that trains it in seconds."""

from __future__ import annotations

import folders
import numpy as np
import pytest
from training import ROW, ROWS, toml

from qkattr.load.opening import load


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder with model/, rows.npy and run.toml."""
    root = tmp_path_factory.mktemp("train")
    folders.write_model(root / "model", tokenizer=True)
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 200, (ROWS, ROW)).astype(np.uint16)
    rows[:, 0] = 0
    np.save(root / "rows.npy", rows)
    (root / "run.toml").write_text(toml())
    return root


@pytest.fixture(scope="session")
def small(root):
    return load(root / "model")


@pytest.fixture(scope="session")
def rows(root):
    return np.load(root / "rows.npy")
