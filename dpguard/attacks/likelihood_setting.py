"""Widths of an open-world search, and what it may spend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """Widths of the search.

    Attributes:
        fillings: texts that a survey draws.
        redrawn: the part of a text that each of them has drawn anew.
        words: about how many words are tried at one place.
        exact: of them, how many get the full score.
        near: words tried because their embedding is near the present word's (other forms of it).
        beam: texts that are worked on.
        apart: places in which they differ at least.
        orders: other orders tried at once.
        hot: until this part of the budget is spent, a nat of prior counts at least ``heat`` squared.
        heat: see ``hot``.
        population: texts that have children.
        children: of one generation.
        crowd: texts of a population that may lie beside one of it.
        mixed: until this part of the budget is spent, a population's texts are kept further apart.
        surveyed: texts that a population's survey draws (half of what earlier ones said is kept).
        mutated: the part of a parent that a population's survey has drawn anew.
        patience: generations without a better text, after which a population starts elsewhere.
        telling: energy of a public text over the noise, above which a text that the noise explains ends a search.
    """

    fillings: int = 64
    redrawn: float = 0.35
    words: int = 256
    exact: int = 24
    near: int = 16
    beam: int = 6
    apart: int = 2
    orders: int = 160
    hot: float = 0.4
    heat: float = 0.03
    population: int = 64
    children: int = 384
    crowd: int = 3
    mixed: float = 0.7
    surveyed: int = 32
    mutated: float = 0.25
    patience: int = 14
    telling: float = 2500.0


@dataclass
class Spent:
    """Candidates looked at so far, and how many may be."""

    limit: int
    candidates: int = 0

    @property
    def over(self) -> bool:
        """Whether the budget is used up."""
        return self.candidates >= self.limit

    def take(self, wanted: int) -> int:
        """``wanted`` candidates, or as many as are left."""
        count = max(0, min(wanted, self.limit - self.candidates))
        self.candidates += count
        return count
