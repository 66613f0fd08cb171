"""Discrete search: edit a text until every state lies in the span, where the residual drops to numerical zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from dpguard.attacks.precision import search_dtype
from dpguard.attacks.span_evidence import Evidence
from dpguard.attacks.span_sites import CHUNK_TOKENS, Probe

WIDTHS = (16, 32, 80)
"""Substitutes tried a position, wider when nothing improves."""
DOUBTFUL, INSERTS = (2, 5, 20), (2, 5, 12)
"""Tokens that are taken out while another one is put in elsewhere: how many, and how many put in a place."""
COMMON, CLOSING = (0, 0, 2), 4
"""Frequent words that are put in as well: how many anywhere, how many at the end."""
FEW = 8
"""Substitutes a position between two pictures."""
ROUNDS = 64
LEAST = 1e-5
"""Smallest gain in energy that counts as one."""
HINT = 1e-4
"""Largest mean residual at which it is worth asking for the certificate."""
SURE = 32
"""Texts that are scored exactly after a rough score of many, beside the best with its first edit in each place."""

Edit = tuple[tuple[int, int], ...]
"""(position, token) pairs that differ from the current text."""


@dataclass
class Trail:
    """Where a search stands.

    Attributes:
        ids: (L,) the best text.
        energy: its energy.
        rows: (L,) its residuals.
        done: every state is explained as well as the message can tell; no reason to search on.
        certain: the certificate holds, which asks besides that the message can tell well.
        worst: worst residual of the last certificate asked for.
        tried: texts already scored.
    """

    ids: Tensor
    energy: float
    rows: Tensor
    done: bool = False
    certain: bool = False
    worst: float = 1.0
    tried: set[tuple[int, ...]] = field(default_factory=set)

    def move(self, other: Trail) -> None:
        """Stand where another trail stands; what was tried stays tried."""
        self.ids, self.energy, self.rows = other.ids, other.energy, other.rows
        self.done, self.certain, self.worst = other.done, other.certain, other.worst


class Search:
    """Local search on the energy of one weight's evidence.

    Args:
        probe: the model; counts candidates.
        evidence: what has to be explained.
        fixed: (L,) bool, positions held by special tokens.
        limit: value of ``probe.scored`` at which to stop.
        common: tokens that are frequent in texts of the kind, the most frequent first.
    """

    def __init__(self, probe: Probe, evidence: Evidence, fixed: Tensor, limit: int, common: Sequence[int] = ()) -> None:
        self.probe, self.evidence, self.limit, self.common = probe, evidence, limit, list(common)
        self.free = (~fixed).nonzero().flatten().tolist()

    def score(self, ids: Tensor, *, rough: bool = False) -> tuple[Tensor, Tensor]:
        """(B,) energies and (B, L) residuals of (B, L) texts; in pieces, for states are wide.

        Args:
            ids: the texts.
            rough: in bfloat16 where that is quicker, good enough to put texts in order.
        """
        parts = ids.split(max(1, CHUNK_TOKENS // max(1, ids.shape[1])))  # type: ignore[no-untyped-call]
        layer = self.evidence.site.layer
        found = [self.evidence.energy(self.probe.states(layer, part, rough=rough)) for part in parts]
        return torch.cat([energy for energy, _ in found]), torch.cat([rows for _, rows in found])

    def promising(self, ids: Tensor, places: Sequence[int] = ()) -> tuple[list[int], Tensor, Tensor]:
        """The texts of (B, L) that are worth it, with their scores: indices, (k,) energies, (k, L) residuals.

        Args:
            ids: the texts; of more than `SURE` a rough score says which are worth it, where that is quicker.
            places: the first place of each text's edit; the best of every place is kept.
        """
        if len(ids) <= SURE or search_dtype(self.probe.embedding) == torch.float32:
            return list(range(len(ids))), *self.score(ids)
        order = self.score(ids, rough=True)[0].argsort().tolist()
        best = {places[k]: k for k in reversed(order)} if places else {}
        picked = list(dict.fromkeys([*order[:SURE], *best.values()]))
        scored = self.probe.scored
        energy, rows = self.score(ids[picked])
        self.probe.scored = scored  # the same texts again
        return picked, energy, rows

    def start(self, ids: Tensor) -> Trail:
        """The best of (B, L) texts."""
        ids = ids[: max(1, self.limit - self.probe.scored)]
        energy, rows = self.score(ids)
        best = int(energy.argmin())
        trail = Trail(ids[best].clone(), float(energy[best]), rows[best])
        self._check(trail)
        return trail

    def run(self, trail: Trail, substitutes: Tensor, bag: Tensor, levels: int = len(WIDTHS)) -> Trail:
        """Edit until certain, stuck or out of budget.

        Args:
            trail: where to start.
            substitutes: (L, k) tokens for each position, likeliest first.
            bag: (b,) tokens that may belong anywhere.
            levels: how far to widen, see `WIDTHS`.
        """
        level = 0
        while not trail.done and level < min(levels, len(WIDTHS)) and self.probe.scored < self.limit:
            edits = self._new(trail, self._edits(trail, substitutes, bag, level))
            level = 0 if self._improve(trail, edits) else level + 1
        return trail

    def polish(self, trail: Trail, substitutes: Tensor, few: int = FEW, rounds: int = ROUNDS) -> Trail:
        """Substitute alone, everywhere at once, as long as that helps: cheap steps between two pictures.

        Args:
            trail: where to start.
            substitutes: (L, k) tokens for each position, likeliest first.
            few: how many of them.
            rounds: at most so many times.
        """
        words = substitutes[:, :few].tolist()
        for _ in range(rounds):
            if trail.done or self.probe.scored >= self.limit:
                break
            edits = self._new(trail, (((p, token),) for p in self.free for token in words[p]))
            if not self._improve(trail, edits):
                break
        return trail

    def relocate(self, trail: Trail) -> bool:
        """Move several neighbouring words elsewhere; whether that helped."""
        return self._improve(trail, self._new(trail, _segments(trail.ids.tolist(), self.free)))

    def _edits(self, trail: Trail, substitutes: Tensor, bag: Tensor, level: int) -> Iterator[Edit]:
        order = sorted(self.free, key=lambda p: -float(trail.rows[p]))
        worst = order[: max(4, len(order) // 3)] if level == 0 else order
        words = trail.ids.tolist()
        anywhere = [*bag.tolist(), *self.common] if level else []
        for p in worst:
            for token in dict.fromkeys(substitutes[p, : WIDTHS[level]].tolist() + anywhere):
                yield ((p, token),)
        if level == 2:
            worst = []  # orders were tried in full one level below
        for p in worst:
            for q in self.free:
                if q == p or (q < p and q in worst):
                    continue
                yield ((p, words[q]), (q, words[p]))
                yield from (_move(words, p, q), _move(words, q, p)) if abs(p - q) > 1 else ()
        for p in order[: DOUBTFUL[level]]:
            for q in self.free:
                for token in [*substitutes[q, : INSERTS[level]].tolist(), *self.common[: COMMON[level]]]:
                    yield _move([*words[:p], token, *words[p + 1 :]], p, q)
        for p in order if level else []:  # a word too many inside costs the last one, mostly a full stop
            for token in self.common[:CLOSING]:
                yield _move([*words[:p], token, *words[p + 1 :]], p, self.free[-1])

    def _new(self, trail: Trail, edits: Iterable[Edit]) -> list[tuple[Edit, Tensor]]:
        """Edits that lead to texts not tried yet, as many as the budget allows; they count as tried from now on."""
        words, room = trail.ids.tolist(), self.limit - self.probe.scored
        out: list[Edit] = []
        texts: list[list[int]] = []
        for edit in edits if room > 0 else ():
            changed = list(words)
            for position, token in edit:
                changed[position] = token
            if tuple(changed) not in trail.tried:
                trail.tried.add(tuple(changed))
                out.append(edit)
                texts.append(changed)
                if len(out) >= room:
                    break
        return list(zip(out, torch.tensor(texts, device=trail.ids.device), strict=True)) if out else []

    def _improve(self, trail: Trail, edits: list[tuple[Edit, Tensor]]) -> bool:
        """Take the best edit, together with as many other good ones as help, and check where that leads."""
        if not edits:
            return False
        texts = torch.stack([ids for _, ids in edits])
        picked, energy, rows = self.promising(texts, [edit[0][0] for edit, _ in edits])
        edits = [edits[k] for k in picked]
        order = energy.argsort().tolist()
        good = [k for k in order if float(energy[k]) < trail.energy - LEAST]
        if not good:
            return False
        together: list[Tensor] = []
        merged, taken = edits[good[0]][1].clone(), {p for p, _ in edits[good[0]][0]}
        for k in good[1:]:
            places = {p for p, _ in edits[k][0]}
            if len(together) < 8 and not places & taken:
                for position, token in edits[k][0]:
                    merged[position] = token
                taken |= places
                together.append(merged.clone())
        best = good[0]
        trail.ids, trail.energy, trail.rows = edits[best][1], float(energy[best]), rows[best]
        if together and self.probe.scored < self.limit:
            energy, rows = self.score(torch.stack(together[: self.limit - self.probe.scored]))
            k = int(energy.argmin())
            if float(energy[k]) < trail.energy:
                trail.ids, trail.energy, trail.rows = together[k], float(energy[k]), rows[k]
        self._check(trail)
        return True

    def take(self, trail: Trail, ids: Tensor, energy: float, rows: Tensor) -> None:
        """Stand at another text, and ask for the certificate where it is near."""
        trail.ids, trail.energy, trail.rows = ids, energy, rows
        self._check(trail)

    def _check(self, trail: Trail) -> None:
        if float(trail.rows.mean()) < HINT or self.evidence.span.blurred:
            trail.certain, trail.worst = self.evidence.certifies(self.probe, trail.ids)
            trail.done = trail.certain or not self.evidence.contradicts(self.probe, trail.ids, len(trail.ids))


def _segments(words: list[int], free: list[int]) -> Iterator[Edit]:
    """Two neighbouring pieces of a text exchanged, one of them at least two words long."""
    for low, middle, high in combinations([*free, free[-1] + 1], 3):
        if high - low > 2:
            moved = [*words[middle:high], *words[low:middle]]
            yield tuple((low + k, word) for k, word in enumerate(moved))


def _move(words: list[int], source: int, target: int) -> Edit:
    """Take one token out and put it back elsewhere, everything between shifting by one."""
    moved = list(words)
    moved.insert(target, moved.pop(source))
    low, high = min(source, target), max(source, target)
    return tuple((p, moved[p]) for p in range(low, high + 1))
