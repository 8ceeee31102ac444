"""Faithfulness: are the explanations true? Every one is tested against the model, with controls.

qk      predicted against actual score changes; ablated features against matched ones
heads   ablated heads by influence, loading and effect against attention and against chance
effects every head and many places ablated one by one: what each measure said of it
edges   edge weights against what a target does when its source is taken away
nodes   deletion and insertion curves by influence
"""

from qkattr.experiments.faithfulness.prompt import MEASURES
from qkattr.experiments.faithfulness.run import Between, Report, faithfulness

__all__ = ["MEASURES", "Between", "Report", "faithfulness"]
