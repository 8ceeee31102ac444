"""Attention scores as sums over pairs of components."""
