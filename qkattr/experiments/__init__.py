"""Experiments on the model: interventions, and whether they bear the explanation out."""
