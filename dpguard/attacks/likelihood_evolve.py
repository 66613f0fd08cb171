"""A population of texts that grows towards the likeliest one: mutation by derivative and bigram model, and crossing.

The score is nearly a sum over (word, place) while most words are wrong, so that what one text has right can be
crossed into another: a population finds in the same number of candidates what a search from the best text misses.
One survey of the population, with a quarter of its words drawn anew, tells for all places at once which words would
raise the score. How often an operator is used follows how often it helped lately.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dpguard.attacks.likelihood_breed import OPERATORS, Stock
from dpguard.attacks.likelihood_prior import NEVER
from dpguard.attacks.likelihood_search import Row, Search

SHARPNESS = 0.3, 0.7, 1.5, 3.0
"""Nats that a standard deviation of the survey's evidence counts; each child draws one."""
SETTLED = 3
"""Generations without a better text, after which the best ones are also worked on place by place."""
TRIES = 6
"""Children drawn for each that is scored: most of a settled population's are known."""


@dataclass
class Evolution:
    """Texts of one length under one label.

    Attributes:
        search: score, budget and pool of all texts scored.
        live: the texts that may have children, with their fitness's parts in ``search``.
        stale: generations without a better text.
    """

    search: Search
    live: set[Row] = field(default_factory=set)
    stale: int = 0

    def __post_init__(self) -> None:
        self.live |= set(self.search.pool)
        self.evidence: dict[int, Tensor] = {}
        self.likely: dict[int, Tensor] = {}
        self.near: dict[int, list[int]] = {}
        self.worth = {name: weight for name, (_, weight) in OPERATORS.items()}
        self.first = self.search.spent.candidates

    def run(self, until: int) -> None:
        """Generations until ``until`` candidates were looked at, or the noise explains what is left over.

        When it is stuck it starts once more from other public texts, and then goes on with both populations.
        """
        search, begun, other = self.search, self.search.spent.candidates, False
        while search.pool and search.places and search.spent.candidates < until:
            hot = search.spent.candidates - begun < search.setting.hot * (until - begun)
            nat = max(search.guide.nats, search.setting.heat**2) if hot else search.guide.nats
            if not self.generation(nat) or self.stale > search.setting.patience:
                if self.explained():
                    return
                other = not other
                self.live, self.stale = (self.elsewhere() if other else set(search.pool)), 0
                if not self.live:
                    return

    def generation(self, nat: float) -> bool:
        """One survey, one set of children; False when no new text was found."""
        search = self.search
        parents = self.select(nat)
        self.survey(parents)
        children = self.children(parents)
        if not children:
            return False
        bar, best = self.fitness(parents[-1], nat), self.fitness(parents[0], nat)
        search.score(list(children))
        gains, uses = dict.fromkeys(OPERATORS, 0), dict.fromkeys(OPERATORS, 0)
        scored = [child for child in children if child in search.pool]
        for child in scored:
            name, parent = children[child]
            uses[name] += 1
            gains[name] += self.fitness(child, nat) > max(bar, self.fitness(parent, nat))
        for name in OPERATORS:
            rate = 20 * gains[name] / (uses[name] + 2)
            self.worth[name] = max(0.4, 0.85 * self.worth[name] + 0.15 * rate)
        if self.stale >= SETTLED:
            scored += self.worked(parents[:2])
        self.live = {*self.live, *scored}
        self.stale = 0 if any(self.fitness(child, nat) > best for child in scored) else self.stale + 1
        return bool(scored)

    def worked(self, leads: Sequence[Row]) -> list[Row]:
        """What a turn of the search from the best texts finds: all likely words of one place, other orders, shifts."""
        search, known = self.search, len(self.search.pool)
        job = search.job(leads, reorder=True)
        if job is not None:
            search.work(*job)
        return list(search.pool)[known:]

    def fitness(self, row: Row, nat: float) -> float:
        """Score plus prior."""
        return self.search.pool[row] + nat * self.search.prior[row]

    def select(self, nat: float) -> list[Row]:
        """The best texts of different kinds: few lie within `radius` of another one."""
        size, crowd = self.search.setting.population, self.search.setting.crowd
        order = heapq.nlargest(len(self.live), self.live, key=lambda row: (self.fitness(row, nat), row))
        rows, radius = torch.tensor(order), self.radius()
        beside = torch.zeros(len(order), dtype=torch.int64)
        chosen: list[Row] = []
        for index, row in enumerate(order):
            if int(beside[index]) <= crowd:
                chosen.append(row)
                beside += (rows != rows[index]).sum(1) < radius
            if len(chosen) == size:
                break
        self.live = {*chosen, *order[: 4 * size]}
        return chosen

    def radius(self) -> int:
        """Places in which texts of different kinds differ at least: a third at first, 2 in the end."""
        search = self.search
        part = (search.spent.candidates - self.first) / max(1, search.spent.limit - self.first)
        return max(2, round(len(search.places) / 3 * (1 - part / search.setting.mixed)))

    def survey(self, parents: Sequence[Row]) -> None:
        """Place -> how every word's embedding lies along the score's derivative, standardised; half is remembered."""
        search, setting = self.search, self.search.setting
        drawn = torch.multinomial(
            search.words.frequency, setting.surveyed * search.length, replacement=True, generator=search.source
        )
        rows, weights = [], []
        for tokens in drawn.reshape(-1, search.length).tolist():
            base = self.parent(parents, 1.5)
            mask = [place in search.places and search.draws.random() < setting.mutated for place in range(len(base))]
            rows.append(tuple(new if m else old for new, old, m in zip(tokens, base, mask, strict=True)))
            weights.append([1.3 if m else 0.3 for m in mask])
        for place, line in search.survey(rows, weights).items():
            known = self.evidence.get(place)
            self.evidence[place] = line if known is None else 0.5 * (known + line)
        allowed, frequency = search.words.allowed, search.words.log_frequency
        for place, line in self.evidence.items():
            tops = [
                (line + part * frequency).masked_fill(~allowed, NEVER).topk(min(count, int(allowed.sum()))).indices
                for part, count in ((0.0, 100), (0.15, 200), (0.5, 200))
            ]
            self.likely[place] = torch.unique(torch.cat(tops))

    def children(self, parents: Sequence[Row]) -> dict[Row, tuple[str, Row]]:
        """New texts, each with the operator and the parent that it comes from."""
        search = self.search
        inside = slice(search.places.start, search.places.stop)
        mates = [row[inside] for row in parents]
        strangers = [row[inside.start : len(row) - len(search.words.frame.suffix)] for row in search.words.rows]
        names, odds = list(self.worth), list(self.worth.values())
        found: dict[Row, tuple[str, Row]] = {}
        for _ in range(TRIES * search.setting.children):
            sharpness = search.draws.choice(SHARPNESS)
            stock = Stock(search.draws, partial(self.word, sharpness), self.form, mates, strangers)
            parent = self.parent(parents, 2.0)
            name = search.draws.choices(names, odds)[0]
            child: Row = tuple(search.words.frame.wrap(OPERATORS[name][0](parent[inside], stock)))
            if child not in search.pool:
                found.setdefault(child, (name, parent))
            if len(found) == search.setting.children:
                break
        return found

    def parent(self, parents: Sequence[Row], bias: float) -> Row:
        """One of the parents, the better ones more often."""
        return parents[int(len(parents) * self.search.draws.random() ** bias)]

    def word(self, sharpness: float, body: Sequence[int], at: int) -> int:
        """A word drawn by the survey's evidence and by its neighbours; sometimes from what follows its neighbours."""
        search = self.search
        place = search.places.start + at
        near = search.words.between(*search.around(tuple(search.words.frame.wrap(body)), place))
        line = self.evidence.get(place)
        if line is None or search.draws.random() < 0.2:
            tokens = near.topk(min(64, int(search.words.allowed.sum()))).indices
            odds = 0.7 * near[tokens] + (0.0 if line is None else sharpness * line[tokens])
        else:
            tokens = self.likely[place]
            odds = 0.5 * near[tokens] + sharpness * line[tokens]
        return int(tokens[torch.multinomial(torch.softmax(odds, 0), 1, generator=search.source)])

    def form(self, token: int) -> int:
        """One of the words whose embeddings are nearest to a word's."""
        if token not in self.near:
            self.near[token] = self.search.forms(token).tolist()
        return int(self.search.draws.choice(self.near[token]))

    def elsewhere(self) -> set[Row]:
        """Other public texts of this length, or drawn words, to start from once more."""
        search, size = self.search, self.search.setting.population
        rows = [row for row in search.words.rows if len(row) == search.length]
        rows = search.draws.sample(rows, min(len(rows), size)) + search.drawn(size)
        search.score(rows)
        return {row for row in rows if row in search.pool}

    def explained(self) -> bool:
        """Whether the best text leaves no more of the message over than the noise would, where noise is small."""
        search = self.search
        nat = search.guide.nats
        lead = max(search.pool, key=lambda row: (self.fitness(row, nat), row))
        return search.guide.energy > search.setting.telling and search.guide.explains(lead)
