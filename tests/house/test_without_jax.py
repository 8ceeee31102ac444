"""What needs no model is answered without JAX: questions about a saved folder, and tokens."""

from __future__ import annotations

import json
import subprocess
import sys

import folders
import numpy as np
import pytest

import qkattr

SLOW = ("jax", "flax", "optax", "gguf", "pandas")
PROMPT = "hi hi hi 12"

RUN = f"""
import sys
from qkattr.cli.main import main
code = main(sys.argv[1:])
print(*sorted({{*sys.modules}} & {{*{SLOW}}}), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with `model`, `saes` and `result`, and the result with its model."""
    root = tmp_path_factory.mktemp("without")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_saes(root / "saes")
    bundle = qkattr.load(root / "model", root / "saes")
    result = qkattr.trace(bundle, PROMPT)
    result.save(root / "result")
    return root, result


def run(*arguments) -> tuple[str, str]:
    """What a new process prints, and which of the slow packages it had imported."""
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr.strip()


def test_stored_qk(saved):
    root, result = saved
    place = next(iter(result.qk))
    layer, head, query, key = place.split(".")
    at = ("--layer", layer, "--head", head, "--query", query, "--key", key)
    out, imported = run("qk", root / "result", *at)
    assert imported == "" and f"Head {layer}.{head}" in out
    out, imported = run("qk", root / "result", *at, "--json")
    assert imported == "" and json.loads(out)["n_pairs"] == result.qk[place].n_pairs


def test_heads(saved):
    root, result = saved
    out, imported = run("heads", root / "result", "--from", " hi#1", "--to", -1, "--json")
    assert imported == ""
    report = json.loads(out)
    assert report["edges"] > 0
    for head in report["heads"]:
        qk = qkattr.qk_attribution(result, layer=head["layer"], head=head["head"], query=5, key=2)
        assert np.isclose(qk.score, head["score"], rtol=1e-4)
        assert np.isclose(qk.probability, head["probability"], rtol=1e-4)


def test_heads_anywhere(saved):
    root, result = saved
    out, imported = run("heads", root / "result", "--json")
    assert imported == ""
    assert json.loads(out)["heads"] == json.loads(json.dumps(result.head_effects()))


def test_tokens(saved):
    root, _ = saved
    out, imported = run("tokens", PROMPT, "-m", root / "model")
    assert imported == "" and "' hi'" in out


@pytest.mark.slow
def test_tokens_of_the_packaged_model():
    out, imported = run("tokens", PROMPT, "-m", "smollm2")
    assert imported == "" and "BOS <|endoftext|> first" in out


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_nothing(option):
    assert run(option)[1] == ""


def test_wrong_input_is_refused_without_jax(saved):
    root, _ = saved
    wrong = ("heads", root / "result", "--from", "nothing", "--to", -1)
    command = [sys.executable, "-c", RUN, *map(str, wrong)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no token 'nothing' in the prompt" in done.stderr
    assert done.stderr.endswith("\n\n")  # nothing was imported


def test_reading_and_rows_of_a_result(saved):
    root, _ = saved
    script = (
        f"import sys, qkattr; result = qkattr.open({str(root / 'result')!r})\n"
        "result.head_loadings(source=1, target=2), result.routes(2), result.to_json()\n"
        f"print(*{{*sys.modules}} & {{*{SLOW}}})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "\n"
