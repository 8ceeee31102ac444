"""Edges between components of adjacent boundaries, the backward sweep, and its tables."""
