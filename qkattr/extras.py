"""Libraries that are installed only where someone asked for them."""

from __future__ import annotations

from qkattr.errors import InputError


def need_pandas():
    """pandas.

    Raises:
      InputError: it is not installed.
    """
    try:
        import pandas
    except ImportError as e:
        raise InputError(
            "to_pandas needs pandas, which is not installed; pip install pandas"
        ) from e
    return pandas
