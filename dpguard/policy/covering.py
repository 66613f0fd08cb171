"""From parameters back to selectors: the short list of selectors that names exactly these and no other."""

from __future__ import annotations

import glob
from collections.abc import Collection, Sequence

from dpguard.policy.layers import _INSIDE, _WORDS, Slot, _by_role

_KINDS = ("", ".weight", ".bias")
_Names = frozenset[str]


class Selectors:
    """What every selector of a model names, for any number of questions.

    Args:
        slots: the model's (``dpguard.slots(model)``).

    >>> from dpguard.policy.layers import Slot
    >>> model = [Slot(f"{k}.{role}", (2, 2), role, k) for k in range(3) for role in ("query", "key")]
    >>> selectors = Selectors([*model, Slot("head.weight", (2,), "head")])
    >>> selectors.cover(["0.query", "1.query", "2.query"])
    ('block[*].attention.query',)
    >>> selectors.cover(["0.query", "1.query", "1.key", "head.weight"])
    ('block[0:2].attention.query', 'block[1]', 'head')
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = list(slots)
        self._place = {slot.name: place for place, slot in enumerate(slots)}
        words = [word + kind for word in _WORDS for kind in _KINDS] + ["biases"]
        self._words = [(word, found) for word in words if (found := _named(word, self._slots))]
        self._blocks = sorted({slot.block for slot in slots if slot.block is not None})
        # what follows block[k] -> k -> names
        self._inside: dict[str, dict[int, _Names]] = {}
        own = {k: [slot for slot in slots if slot.block == k] for k in self._blocks}
        for inside in _INSIDE:
            for kind in _KINDS:
                ending = ("." + inside if inside else "") + kind
                named = {k: _named(f"block[{k}]{ending}", own[k]) for k in self._blocks}
                self._inside[ending] = {k: names for k, names in named.items() if names}

    def cover(self, names: Collection[str]) -> tuple[str, ...]:
        """Selectors whose union is ``names``, in the model's order; roles where they serve, else ``name:``.

        The widest selector inside ``names`` is taken first, so the list is short, not provably the shortest.

        Args:
            names: names of slots, aliases of tied tensors included.
        """
        left, chosen = set(names), []
        for candidates in (self._by_role(frozenset(names)), self._by_name(frozenset(names))):
            while left:
                # max keeps the first of equals, and the plainest selectors come first
                best = max(candidates, key=lambda candidate: len(candidate[1] & left), default=("", frozenset()))
                if not best[1] & left:
                    break
                chosen.append((min(self._place[name] for name in best[1]), best[0]))
                left -= best[1]
        return tuple(selector for _, selector in sorted(chosen))

    def _by_role(self, wanted: _Names) -> list[tuple[str, _Names]]:
        out = [(word, found) for word, found in self._words if found <= wanted]
        for ending, blocks in self._inside.items():
            inside = [k for k, found in blocks.items() if found <= wanted]
            for start, stop in _runs(inside):
                index = str(start) if stop == start + 1 else f"{start}:{stop}"
                if [start, stop - 1] == [self._blocks[0], self._blocks[-1]] and stop > start + 1:
                    index = "*"
                out.append((f"block[{index}]{ending}", frozenset().union(*(blocks[k] for k in range(start, stop)))))
        return out

    def _by_name(self, wanted: _Names) -> list[tuple[str, _Names]]:
        out = [(f"name:{glob.escape(name)}", frozenset({name})) for name in wanted]
        parents = {name[:end] for name in wanted for end in range(len(name)) if name[end] == "."}
        for parent in parents:
            found = frozenset(name for name in self._place if name.startswith(parent + "."))
            if len(found) > 1 and found <= wanted:
                out.append((f"name:{glob.escape(parent)}.*", found))
        return sorted(out, key=lambda candidate: (len(candidate[0]), candidate[0]))


def _named(selector: str, slots: Sequence[Slot]) -> _Names:
    """Names of what a role selector takes; unlike `layers.select`, nothing is no error."""
    return frozenset(slot.name for slot in _by_role(selector, slots))


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(start, stop) of the stretches of consecutive numbers in a sorted list."""
    starts = [n for n in numbers if n - 1 not in numbers]
    stops = [n + 1 for n in numbers if n + 1 not in numbers]
    return list(zip(starts, stops, strict=True))
