"""Texts of a batch that nearly fit: all of them wait in line, and the nearest to the message is edited first.

A row that a coarse rounding or the local steps blurred gives its text with a few wrong words. Most such drafts
are of texts that another row gives without a mistake, so that nothing is edited before its turn: by misfit,
doubled with every turn that a draft had, and held back while most of its words are those of an accepted text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpguard.attacks.span_evidence import Evidence
from dpguard.attacks.span_search import Search, Trail
from dpguard.attacks.span_sites import Probe
from dpguard.attacks.vocabulary import Frame

TRIES = (300, 900, 2700)
"""Candidates of a draft's first turn, and of those that follow."""
LEVELS = (2, 2, 3)
SAME_TEXT, HELD_BACK = 0.6, 20.0
"""Share of words in their places that makes two texts the same one's drafts, and what that does to the misfit."""


@dataclass
class _Draft:
    """A text that does not fit yet; ``first`` are the words that it came with."""

    first: tuple[int, ...]
    trail: Trail
    substitutes: Tensor
    turns: int = 0


class Repairs:
    """The line of drafts.

    Args:
        probe: counts the candidates.
        evidence: what a text is held against.
        frame: special tokens around a text.
    """

    def __init__(self, probe: Probe, evidence: Evidence, frame: Frame) -> None:
        self.probe, self.evidence, self.frame = probe, evidence, frame
        self.drafts: dict[tuple[int, ...], _Draft] = {}

    def add(self, text: list[int], substitutes: Tensor) -> None:
        """Put a text in line, once.

        Args:
            text: token ids.
            substitutes: (len(text), k) what else may stand in each place, likeliest first.
        """
        if tuple(text) not in self.drafts:
            ids = torch.tensor(text, device=self.probe.device)
            trail = self._search(ids, self.probe.scored + 1).start(ids[None])
            self.drafts[tuple(text)] = _Draft(tuple(text), trail, substitutes)

    def turn(self, accepted: Iterable[list[int]], bag: Tensor, limit: int) -> list[int] | None:
        """Edit the draft whose turn it is, and give the text that came of it; None when nobody waits.

        Args:
            accepted: texts that are known.
            bag: (b,) tokens that may belong anywhere.
            limit: value of ``probe.scored`` at which to stop.
        """
        known = list(accepted)
        waiting = [d for d in self.drafts.values() if d.turns < len(TRIES)]
        if not waiting or self.probe.scored >= limit:
            return None
        draft = min(waiting, key=lambda d: self._rank(d, known))
        search = self._search(draft.trail.ids, min(limit, self.probe.scored + TRIES[draft.turns]))
        own = torch.unique(draft.substitutes[:, 0])
        anywhere = torch.unique(torch.cat([own, bag])) if draft.turns else own
        search.run(draft.trail, draft.substitutes, anywhere, levels=LEVELS[draft.turns])
        draft.turns += 1
        text = [int(t) for t in draft.trail.ids]
        if any(d is not draft and d.turns and d.trail.ids.tolist() == text for d in self.drafts.values()):
            draft.turns = len(TRIES)  # two drafts have met
        return text

    def _rank(self, draft: _Draft, known: list[list[int]]) -> float:
        words = draft.trail.ids.tolist()
        near = any(_alike(words, text) >= SAME_TEXT for text in known)
        return float(draft.trail.rows.mean()) * 2.0**draft.turns * (HELD_BACK if near else 1.0)

    def _search(self, ids: Tensor, limit: int) -> Search:
        held = torch.tensor(self.frame.wrap([-1] * (len(ids) - self.frame.size)), device=ids.device) >= 0
        return Search(self.probe, self.evidence, held, limit)


def _alike(one: list[int], other: list[int]) -> float:
    """Share of the first text's words that the other has, in any order, one for one."""
    left = list(other)
    for word in one:
        if word in left:
            left.remove(word)
    return (len(other) - len(left)) / len(one)
