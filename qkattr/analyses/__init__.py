"""Analyses of one attention score, as tables: competition, mechanisms, distance, groups."""
