"""Faithfulness: are the explanations true? Every one is tested against the model, with controls.

qk      predicted against actual score changes; ablated features against matched ones
heads   ablated heads by loading against attention and against chance
edges   edge weights against what a target does when its source is taken away
nodes   deletion and insertion curves by influence
"""

from qkattr.experiments.faithfulness.run import MEASURES, Report, faithfulness

__all__ = ["MEASURES", "Report", "faithfulness"]
