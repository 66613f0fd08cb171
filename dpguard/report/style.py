"""Colours, shapes and type of the figures: seaborn's ticks style, colour-blind safe, the same on any machine."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import seaborn

INK, MUTED, LINE, PAPER = "#1c2430", "#5a6372", "#d5dae1", "#fefefd"
RED = "#b3261e"
OPEN = "#5b6471"
"""Colour of policies without a formal guarantee, which have no place on the epsilon scale."""


@dataclass(frozen=True)
class Band:
    """A step of the epsilon scale: up to ``most``, drawn in ``colour`` (``night`` on a dark page)."""

    most: float
    name: str
    colour: str
    night: str


# From cool for a strong promise to warm for a weak one: green would read as safe wherever it stood. Blue against amber
# is told apart with any colour vision, and each step is lighter than the one before.
BANDS = (
    Band(1.0, "ε ≤ 1", "#17346e", "#4f74c8"),
    Band(3.0, "ε ≤ 3", "#2a7ab0", "#559fc6"),
    Band(10.0, "ε ≤ 10", "#a68b5b", "#c7ab7a"),
    Band(math.inf, "ε > 10", "#f0a030", "#ffd27a"),
)


def band(epsilon: float | None) -> Band | None:
    """The step of the scale that an epsilon is on; None when there is no formal guarantee."""
    if epsilon is None or not math.isfinite(epsilon):
        return None
    return next(step for step in BANDS if epsilon <= step.most)


def _settings(narrow: bool) -> dict[str, Any]:
    size = 10.5 if narrow else 9.5
    return {
        **seaborn.axes_style("ticks"),
        "font.family": ["DejaVu Sans"],
        "font.size": size,
        "axes.titlesize": size,
        "axes.labelsize": size,
        "xtick.labelsize": size - 1,
        "ytick.labelsize": size - 1,
        "legend.fontsize": size - 1,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "xtick.major.width": 0.8,
        "ytick.major.width": 0.8,
        "text.parse_math": False,
        "text.usetex": False,
        "text.hinting": "none",
        "axes.unicode_minus": True,
        "figure.facecolor": PAPER,
        "axes.facecolor": "none",
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "svg.fonttype": "none",
        "svg.hashsalt": "dpguard",
        "path.simplify": False,
    }


@contextmanager
def styled(narrow: bool = False) -> Iterator[None]:
    """Matplotlib's own defaults and ours on top, whatever the user's settings are.

    Letters that the font lacks (policies may have names in any script) are real text in the SVG, which the
    reader's browser draws in a font of its own, so that matplotlib's warning does not apply.
    """
    with matplotlib.style.context(["default", _settings(narrow)]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        yield
