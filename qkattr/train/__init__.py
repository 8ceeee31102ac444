"""Training dictionaries after every block in one pass.

config      what a run is: flat TOML -> `TrainConfig`
sparse      the three products of sparse activations with rows of a matrix
sae         parameters of one SAE, its loss for topk, batchtopk and jumprelu
step        one optimiser step of one SAE, and of all boundaries
stream      tokens -> shuffled activations of all boundaries
checkpoints what orbax keeps of a run
run         the loop: progress, metrics, checkpoints, resuming
output      SAELens folders and their metrics
"""

from qkattr.errors import InputError


def need_libraries() -> None:
    """
    Raises:
      InputError: what training needs beyond the core is not installed.
    """
    try:
        import optax  # noqa: F401
        import orbax.checkpoint  # noqa: F401
    except ImportError as e:
        raise InputError(
            f"training needs {e.name}, which is not installed; pip install 'qkattr[train]'"
        ) from e
