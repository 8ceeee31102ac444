"""How often a function is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax


def traced_at_most(n: int, jitted: Any, *static: str) -> Callable:
    """A jitted function, jitted anew: it raises when it is traced more than n times.

    static: the names of its static arguments.
    """
    chex.clear_trace_counter()
    return jax.jit(chex.assert_max_traces(jitted.__wrapped__, n=n), static_argnames=static)
