"""The open world: a text grown word by word on its likelihood, from public text of the same kind.

Starts at the best public text of the length; asks of many words whether they are anywhere in the message; then, one
place at a time, tries the words that the bigram model and the score's derivative with respect to the place's
embedding propose. The derivative at one text is useless, because the score is far from linear in a word; averaged
over random words at that place it puts the right one in the top hundreds of tens of thousands. Between places:
other orders, a word dropped here and one put in there, stretches written anew, crossings of good texts.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpguard.attacks.likelihood_guide import Guide
from dpguard.attacks.likelihood_moves import crossings, reorderings, transplants
from dpguard.attacks.likelihood_prior import NEVER, Neighbours
from dpguard.attacks.likelihood_setting import Setting, Spent

Row = tuple[int, ...]
FRESH, BARREN = 16, 12
"""A search ends after this many turns that each found fewer new texts than this."""
STEP = 64
"""Public texts that the first survey goes by."""


@dataclass
class Search:
    """One text of a known length under one label.

    Attributes:
        guide: the score.
        words: what public text says.
        length: tokens with special tokens.
        source: of the draws of words.
        draws: of all other choices.
        spent: the budget, which several searches may share.
        pool: every text with a full score.
    """

    guide: Guide
    words: Neighbours
    length: int
    source: torch.Generator
    draws: random.Random
    spent: Spent
    setting: Setting = field(default_factory=Setting)
    pool: dict[Row, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        frame = self.words.frame
        self.places = range(len(frame.prefix), self.length - len(frame.suffix))
        self.prior: dict[Row, float] = {}
        self.lines: dict[int, Tensor] = {}
        self.bag: Tensor | None = None
        self.general: dict[int, Tensor] = {}
        self.surveyed: Row | None = None
        self.done: set[tuple[object, ...]] = set()
        self.first = self.spent.candidates

    # -- scores

    def score(self, rows: Sequence[Row]) -> None:
        """Full scores into the pool, for texts that have none, as far as the budget reaches; the first one always."""
        fresh = [row for row in dict.fromkeys(rows) if row not in self.pool]
        fresh = fresh[: max(self.spent.take(len(fresh)), 0 if self.pool else 1)]
        if fresh:
            self.pool |= dict(zip(fresh, self.guide.full(fresh), strict=True))
            self.prior |= dict(zip(fresh, self.words.log_prior(fresh), strict=True))

    def screened(self, rows: Sequence[Row], exact: int) -> Tensor | None:
        """Full scores for the most promising ``exact`` texts; (N,) screening scores when there was a screening."""
        if self.guide.upper is None or len(rows) <= exact:
            self.score(rows)
            return None
        if self.spent.over:
            self.score(rows)
            return None
        rows = rows[: self.spent.take(len(rows))]
        raw = self.guide.screen(rows)
        both = raw + self.guide.nats * torch.tensor(self.words.log_prior(rows), dtype=raw.dtype)
        self.score([rows[i] for i in both.topk(min(exact, len(rows))).indices.tolist()])
        return raw

    def top(self, count: int, nat: float) -> list[Row]:
        """The pool's best texts, a nat of prior counting ``nat``."""
        return heapq.nlargest(count, self.pool, key=lambda row: self.pool[row] + nat * self.prior[row])

    def best(self, count: int) -> list[Row]:
        """The pool's best texts by score plus prior, some places apart."""
        part = (self.spent.candidates - self.first) / max(1, self.spent.limit - self.first)
        nat = max(self.guide.nats, self.setting.heat**2) if part < self.setting.hot else self.guide.nats
        top = self.top(256, nat)
        chosen = top[:1]
        for row in top[1:]:  # texts one word apart would do the same work twice
            if len(chosen) == count:
                break
            if all(sum(a != b for a, b in zip(row, other, strict=True)) >= self.setting.apart for other in chosen):
                chosen.append(row)
        return chosen

    # -- proposals

    def around(self, row: Row, place: int) -> tuple[int | None, int | None]:
        """The neighbours of a place, None beyond an unframed end."""
        return (row[place - 1] if place else None), (row[place + 1] if place + 1 < len(row) else None)

    def body(self, row: Row) -> Row:
        """A text without its special tokens."""
        return row[self.places.start : self.places.stop]

    def wrap(self, bodies: Sequence[Sequence[int]]) -> list[Row]:
        """Texts with their special tokens, those with a score already left out."""
        rows = [tuple(self.words.frame.wrap(body)) for body in bodies]
        return [row for row in rows if row not in self.pool]

    def survey(self, rows: Sequence[Row], weights: Sequence[Sequence[float]] | None = None) -> dict[int, Tensor]:
        """Place -> (vocabulary,) how each word's embedding lies along the score's derivative, standardised.

        Args:
            rows: texts that the derivative is averaged over.
            weights: (rows, T) of each row at each place, larger where its words are drawn. None: equal.
        """
        rows = rows[: self.spent.take(len(rows))]
        if not rows:
            return {}
        slopes = self.guide.slopes(rows)
        counted = torch.ones(slopes.shape[:2]) if weights is None else torch.tensor(weights[: len(rows)]).float()
        mean = (slopes * counted[:, :, None]).sum(0)[list(self.places)]
        lines = (mean.to(self.guide.table.dtype) @ self.guide.table.T).float()
        inside = lines[:, self.words.allowed]
        lines = (lines - inside.mean(1, keepdim=True)) / inside.std(1, keepdim=True).clamp(min=1e-30)
        return dict(zip(self.places, lines.masked_fill(~self.words.allowed, NEVER), strict=True))

    def look_around(self, row: Row) -> None:
        """Survey a text with a part of its words drawn anew, each row others."""
        drawn = torch.multinomial(
            self.words.frequency, self.setting.fillings * len(row), replacement=True, generator=self.source
        )
        rows, fresh = [], []
        for tokens in drawn.reshape(-1, len(row)).tolist():
            mask = [place in self.places and self.draws.random() < self.setting.redrawn for place in range(len(row))]
            rows.append(tuple(new if m else old for new, old, m in zip(tokens, row, mask, strict=True)))
            fresh.append(mask)
        self.lines = self.survey(rows, fresh) or self.lines
        self.surveyed = row

    def expand(self, row: Row, place: int) -> None:
        """Try words at one place: frequent ones, and by derivative, neighbours and what else seems to be there."""
        if self.stale(row):
            self.look_around(row)
        near = self.words.between(*self.around(row, place))
        frequency, count = self.words.log_frequency, self.setting.words // 8
        chosen = [_top(frequency, self.words.allowed, 3 * count), _top(near, self.words.allowed, count)]
        for lines in (self.general, self.lines):
            if place in lines:
                line = lines[place]
                chosen.append(_top(line + 0.15 * frequency, self.words.allowed, count))
                chosen.append(_top(line + 0.35 * near.clamp(min=-25), self.words.allowed, count))
        chosen.append(self.forms(row[place]))
        if self.bag is not None:
            chosen.append(_top(self.bag, self.words.allowed, count))
        tokens = torch.unique(torch.cat(chosen))
        self.remember(tokens, self.screened(self.put(row, place, tokens), self.setting.exact))
        self.done.add((row, place))

    def stale(self, row: Row) -> bool:
        """Whether the latest survey was of a text that differs in a quarter of its words."""
        if self.surveyed is None:
            return True
        return sum(a != b for a, b in zip(row, self.surveyed, strict=True)) > len(self.places) / 4

    def forms(self, token: int) -> Tensor:
        """Words whose embeddings are nearest to a word's."""
        near = torch.nn.functional.cosine_similarity(self.guide.table, self.guide.table[token], dim=1).float()
        return _top(near.masked_fill(~self.words.allowed, NEVER), self.words.allowed, self.setting.near)

    def put(self, row: Row, place: int, tokens: Tensor) -> list[Row]:
        """A text with each of some words at one place."""
        return [(*row[:place], token, *row[place + 1 :]) for token in tokens.tolist()]

    def remember(self, tokens: Tensor, raw: Tensor | None) -> None:
        """What a screening says about words, wherever they stand in the message."""
        if self.bag is not None and raw is not None and len(raw) == len(tokens):
            z = (raw - raw.median()) / raw.std().clamp(min=1e-30)
            self.bag[tokens] = 0.7 * self.bag[tokens] + 0.3 * z

    def reorder(self, row: Row) -> None:
        """Other orders: when there are many, half by the prior and half at random."""
        rows = self.wrap(reorderings(self.body(row)))
        if len(rows) > self.setting.orders:
            self.draws.shuffle(rows)
            prior = self.words.log_prior(rows)
            order = sorted(range(len(rows)), key=lambda i: -prior[i])
            half = self.setting.orders // 2
            rows = [rows[i] for i in (*order[:half], *self.draws.sample(order[half:], half))]
        self.screened(rows, 24)
        self.done.add((row, "orders"))

    def slide(self, row: Row) -> None:
        """Drop one word and put a fresh one elsewhere, for texts that are right but shifted."""
        body: Row = self.body(row)
        found: dict[Row, None] = {}
        frame = self.words.frame
        for out in range(len(body)):
            rest = body[:out] + body[out + 1 :]
            framed: Row = (*frame.prefix, *rest, *frame.suffix)
            for into in range(len(body)):
                if into == out:
                    continue
                at = self.places.start + into
                near = self.words.between(framed[at - 1] if at else None, framed[at] if at < len(framed) else None)
                line = self.lines.get(at)
                both = near if line is None else 0.5 * near + line
                for token in {*near.topk(2).indices.tolist(), *both.topk(3).indices.tolist()}:
                    found[(*rest[:into], token, *rest[into:])] = None
        rows = self.wrap(list(found))
        self.draws.shuffle(rows)
        self.screened(rows[:400], self.setting.exact)
        self.done.add((row, "slide"))

    def rewrite(self, row: Row, count: int = 160) -> None:
        """Write two or three neighbouring places anew, left to right, by derivative times bigram model."""
        width = min(self.draws.choice((2, 2, 3)), len(self.places))
        start = self.draws.randint(self.places.start, self.places.stop - width)
        temperature, known = self.draws.choice((1.0, 2.0)), {}
        found: dict[Row, None] = {}
        for _ in range(count):
            new = list(row)
            for place in range(start, start + width):
                left, right = self.around(tuple(new), place)
                last = place == start + width - 1
                if (place, left) not in known:
                    near = 0.5 * self.words.between(left, right) if last else 0.6 * self.words.after(left)
                    line = self.lines.get(place)
                    mixed = near if line is None else near + temperature * line
                    top = mixed.masked_fill(~self.words.allowed, NEVER).topk(min(48, int(self.words.allowed.sum())))
                    known[place, left] = (torch.softmax(top.values, 0).tolist(), top.indices.tolist())
                weights, tokens = known[place, left]
                new[place] = self.draws.choices(tokens, weights)[0]
            found[tuple(new)] = None
        self.screened([r for r in found if r not in self.pool], 24)

    def cross(self, one: Row, two: Row) -> None:
        """Mixtures of two good texts, place by place and by stretches of one put over the other."""
        bodies = self.body(one), self.body(two)
        self.score(self.wrap(crossings(*bodies, self.draws, 24)))
        rows = self.wrap([*transplants(*bodies), *transplants(*bodies[::-1])])
        self.screened(self.draws.sample(rows, min(len(rows), self.setting.orders)), 16)

    def resized(self, row: Row) -> list[Row]:
        """A text with one word less, or with one more that fits its neighbours or seems to be in the message."""
        body: Row = self.body(row)
        found: dict[Row, None] = {}
        count = self.setting.words // 16
        frequent = [] if self.bag is None else _top(self.bag, self.words.allowed, count).tolist()
        for place in range(len(body) + 1):
            at = self.places.start + place
            near = self.words.between(row[at - 1] if at else None, row[at] if at < len(row) else None)
            for token in (*_top(near, self.words.allowed, count).tolist(), *frequent):
                found[(*body[:place], token, *body[place:])] = None
        for place in range(len(body) if len(body) > 1 else 0):
            found[body[:place] + body[place + 1 :]] = None
        return [tuple(self.words.frame.wrap(other)) for other in found]

    def refined(self, guide: Guide, count: int) -> Search:
        """A search from the best texts under another, more precise guide of the same message."""
        other = Search(guide, self.words, self.length, self.source, self.draws, self.spent, self.setting)
        other.score(self.top(count, self.guide.nats))
        other.general, other.bag = self.general, self.bag
        return other

    def drawn(self, count: int) -> list[Row]:
        """Texts of words drawn by their frequency."""
        if not self.places:
            return [tuple(self.words.frame.wrap([]))]
        tokens = torch.multinomial(
            self.words.frequency, count * len(self.places), replacement=True, generator=self.source
        )
        return [tuple(self.words.frame.wrap(body)) for body in tokens.reshape(count, -1).tolist()]

    # -- the search

    def start(self, rows: Sequence[Row]) -> None:
        """From public texts of this length, or from drawn words where there is none."""
        self.screened(list(rows) or self.drawn(16), 2 * STEP)
        self.general = self.survey(self.best(STEP))
        if self.general:
            self.bag = torch.stack(list(self.general.values())).amax(0)

    def run(self, until: int) -> None:
        """Improve until ``until`` candidates were looked at or nothing more helps."""
        since, turn, barren, beam = 0, 0, 0, self.setting.beam
        while self.pool and self.places and self.spent.candidates < until:
            before = self.spent.candidates
            top = self.best(beam)
            lead = top[0]
            settled = all((lead, place) in self.done for place in self.places)
            job = self.job(top, since >= 6 or settled)
            if settled and (job is None or self.draws.random() < 0.5):
                job = (self.draws.choice(top[:3]), "rewrite")
            if job is None:
                job, beam = (lead, "rewrite"), beam + 2
            since = 0 if job[1] == "orders" else since
            self.work(*job)
            since, turn = since + 1, turn + 1
            if turn % 12 == 0 and len(top) > 1:
                self.cross(lead, self.draws.choice(top[1:]))
            barren = 0 if self.spent.candidates - before >= FRESH else barren + 1
            if barren == BARREN:
                return

    def work(self, row: Row, what: str) -> None:
        """One turn on one text: other orders, shifts, a stretch written anew, or (a number) the words of one place."""
        if what == "orders":
            self.reorder(row)
        elif what == "slide":
            self.slide(row)
        elif what == "rewrite":
            self.rewrite(row)
        else:
            self.expand(row, int(what))

    def job(self, top: Sequence[Row], reorder: bool) -> tuple[Row, str] | None:
        """The next thing to try: the best text first, its places in random order, then orders, then shifts."""
        for rank, row in enumerate(top):
            if rank < 2 and reorder and (row, "orders") not in self.done:
                return row, "orders"
            open_places = [place for place in self.places if (row, place) not in self.done]
            if rank:
                open_places = [place for place in open_places if not self._like(top[0], row, place)]
            if open_places:
                return row, str(self.draws.choice(open_places))
            if not rank and (row, "slide") not in self.done:
                return row, "slide"
        return None

    def _like(self, lead: Row, row: Row, place: int) -> bool:
        """Whether the best text answered this place already, between the same neighbours (half of the time)."""
        same = self.around(lead, place) == self.around(row, place)
        return same and (lead, place) in self.done and self.draws.random() < 0.5


def _top(values: Tensor, allowed: Tensor | None, count: int) -> Tensor:
    """Indices of the largest values, no more than there are (allowed) ones."""
    most = len(values) if allowed is None else int(allowed.sum())
    return values.topk(min(count, most)).indices
