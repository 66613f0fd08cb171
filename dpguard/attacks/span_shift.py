"""A word too many in one place and one too few in another: everything between stands one place off.

Single edits lead out of that through worse texts, so a search is stuck there. Here every pair of places is tried
with a copy of a neighbour for the missing word, and for the best pairs the words that the derivative asks for in
that place (`span_slope`), the frequent ones and the text's own.
"""

from __future__ import annotations

from torch import Tensor

from dpguard.attacks.span_search import LEAST, Search, Trail
from dpguard.attacks.span_slope import STEEP, steepest

PAIRS = 8
"""Pairs of places that are looked at more closely."""


def realign(search: Search, trail: Trail, tokens: Tensor) -> bool:
    """Move the trail to the best text with one word less in one place and one more in another; whether that helped.

    Args:
        search: of the trail.
        trail: where the search is stuck.
        tokens: (n,) tokens that a text can contain.
    """
    drafts = _drafts(trail.ids.tolist(), search.free)
    texts = trail.ids.new_tensor(list(drafts))[: max(0, search.limit - search.probe.scored)]
    if not len(texts):
        return False
    order = search.score(texts, rough=True)[0].argsort()[:PAIRS]
    options = {text for k in order.tolist() for text in _filled(search, texts[k], list(drafts.values())[k], tokens)}
    some = trail.ids.new_tensor(sorted(options - trail.tried))[: max(0, search.limit - search.probe.scored)]
    if not len(some):
        return False
    trail.tried |= options
    picked, energy, rows = search.promising(some)
    some, best = some[picked], int(energy.argmin())
    if float(energy[best]) >= trail.energy - LEAST:
        return False
    search.take(trail, some[best], float(energy[best]), rows[best])
    return True


def _drafts(words: list[int], free: list[int]) -> dict[tuple[int, ...], int]:
    """Texts with one word taken out and a neighbour copied elsewhere -> the copy's place."""
    out: dict[tuple[int, ...], int] = {}
    for p in free:
        rest = [*words[:p], *words[p + 1 :]]
        for q in free:
            copied = rest[q] if q < free[-1] else rest[q - 1]
            out.setdefault((*rest[:q], copied, *rest[q:]), q)
    return out


def _filled(search: Search, text: Tensor, place: int, tokens: Tensor) -> list[tuple[int, ...]]:
    """The text with other words in one place."""
    asked = steepest(search.probe, search.evidence, text, tokens, STEEP)[place].tolist()
    own = [int(text[p]) for p in search.free]
    words = text.tolist()
    return [(*words[:place], word, *words[place + 1 :]) for word in dict.fromkeys([*asked, *search.common, *own])]
