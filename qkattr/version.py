"""The version of the package, which outputs name."""

__version__ = "0.1.0"
