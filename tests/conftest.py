"""JAX settings for every test, and the real model, loaded once a session."""

from __future__ import annotations

import os
import re

# Programs are compiled anew: writing them to a cache on disk has crashed XLA in a long run.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
import typed  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Before the rooms are imported: what annotations say of arrays is checked in every call.
jaxtyping.install_import_hook(typed.ROOMS, "typed.functions")

import real  # noqa: E402  (after the settings)
import tiny  # noqa: E402

#: Tests of rooms whose own arithmetic still promotes ranks, and of pages with code of other people.
PROMOTE = ("experiments", "features", "train", "test_docs.py")


@pytest.fixture(scope="module", autouse=True)
def ranks(request):
    """Arrays of different ranks do not meet: what is broadcast is written out."""
    allowed = request.path.parent.name in PROMOTE or request.path.name in PROMOTE
    jax.config.update("jax_numpy_rank_promotion", "allow" if allowed else "raise")
    yield
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def ranks_of_references(request):
    """On the real model our arrays meet those of other libraries' code."""
    before = jax.config.jax_numpy_rank_promotion  # pyright: ignore[reportAttributeAccessIssue]
    if request.node.get_closest_marker("slow"):
        jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_rank_promotion", before)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs on the real model")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs are seldom shared by modules, and would take gigabytes in the end."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", params=list(tiny.HOUSES))
def case(request) -> tiny.Case:
    """Every house with a prompt."""
    return tiny.case(request.param)


@pytest.fixture
def refused(capsys, root, monkeypatch):
    """Runs a command line that must be refused, in the `root` of the test's module, and returns
    the line."""
    from qkattr.cli.main import main

    monkeypatch.chdir(root)

    def run(*arguments):
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert code == 2 and out == ""
        assert re.fullmatch(r"qkattr: [^\n]+\n", err) and err.rstrip("\n").isprintable()
        return err

    return run


@pytest.fixture(scope="session")
def bundle():
    """SmolLM2 with its SAEs."""
    from qkattr.load.opening import load

    return load("smollm2", "smollm2")


@pytest.fixture(scope="session", params=list(real.PROMPTS))
def real_case(request, bundle) -> tiny.Case:
    """A prompt that went through the real model."""
    return real.case(bundle, request.param)
