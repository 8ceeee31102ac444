"""Which figure is drawn of what an analysis found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qkattr.analyses.distance import Distance
from qkattr.analyses.marginals import Looks
from qkattr.analyses.mechanisms import MechanismTable
from qkattr.analyses.pairs import Pairs
from qkattr.analyses.weights import WeightPairs
from qkattr.analyses.why import Why
from qkattr.errors import InputError
from qkattr.experiments.faithfulness import Report
from qkattr.experiments.steer import Steering
from qkattr.export import qk_figures
from qkattr.export.faithfulness_figure import faithfulness_figure
from qkattr.export.figures import steering_figure
from qkattr.qk.table import QKAttribution

FIGURES = {
    Distance: qk_figures.distance_figure,
    Looks: qk_figures.looks_figure,
    MechanismTable: qk_figures.mechanisms_figure,
    Pairs: qk_figures.pairs_figure,
    QKAttribution: qk_figures.qk_figure,
    Report: faithfulness_figure,
    Steering: steering_figure,
    WeightPairs: qk_figures.weights_figure,
    Why: qk_figures.why_figure,
}


def draw(found: Any, path: Path) -> Path:
    """Draw it as SVG, PNG or PDF.

    Raises:
      InputError: there is no figure of that, matplotlib is not installed, or the name ends in none
        of these.
    """
    if type(found) not in FIGURES:
        raise InputError(
            f"there is no figure of {found!r:.60}; figures are of what "
            f"{', '.join(sorted(kind.__name__ for kind in FIGURES))} hold"
        )
    return FIGURES[type(found)](found, path)
