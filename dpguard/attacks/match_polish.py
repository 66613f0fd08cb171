"""A discrete search on the exact distance of one text's own gradient from the message.

The distance falls with every right word at its place, so that lists of likely tokens, tried at all places at once,
lead to the text in a few rounds; lists grow wider when nothing helps, other orders, lengths and labels are tried, and
the search ends with a proof (`match_proof`) or with its budget.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from dpguard.attacks.likelihood_moves import reorderings
from dpguard.attacks.match_proof import is_message
from dpguard.attacks.match_soft import Lists
from dpguard.attacks.objective import Objective
from dpguard.attacks.observation import Observation
from dpguard.attacks.span_guess import Guess
from dpguard.attacks.vocabulary import TokenTable, frame_of
from dpguard.inputs.batch import Batch
from dpguard.inputs.family import family_of

Row = tuple[int, ...]
CHUNK = 64
NARROW, WIDER, WIDEST = 8, 3, 72
"""Tokens tried at each place: at first, how many times more when nothing helps, at most."""
ORDERS = 96
NEAR = 8
WRITTEN_OUT = 500_000
"""Entries up to which every candidate's gradient is written out."""
FEW = 6
"""Pruned or rounded matrices that candidates are held against beyond that."""
FINAL = 8
"""Texts whose gradients are written out in the end in any case."""
LENGTHS = 3
"""Lengths that get a round of their own before one is chosen."""
SLOPE = 0.5
"""Weight of the distance's slope (standard deviations over the vocabulary) against log misfit in long lists."""
PAIRS = 14
"""Substitutions that are tried two at a time when none helps alone."""
SOLVED = 1e-4
"""Distance below which a proof is tried."""


@dataclass
class Polish:
    """The search for the text of one message.

    Attributes:
        seen: the message.
        lists: what soft spans say; see `match_soft`.
        labels: classes that are possible.
        limit: candidates that may be scored.
        draws: of the order in which things are tried.
        starts: other texts to start from.
        pool: (label, text) -> distance of everything scored.
        certain: whether the best text is proven.
    """

    seen: Observation
    lists: Lists
    labels: Sequence[int]
    limit: int
    draws: random.Random
    starts: Sequence[Row] = ()
    pool: dict[tuple[int, Row], float] = field(default_factory=dict)
    certain: bool = False

    def __post_init__(self) -> None:
        # written out, gradients are masked and rounded as the client did; from activations alone they are not
        entries = sum(value.numel() for value in self.seen.message.values())
        self.objective = Objective(self.seen, 1, aware=True, few=0 if entries <= WRITTEN_OUT else FEW)
        self.frame = frame_of(self.seen.disclosed.tokenizer)
        self.table = TokenTable(self.seen.model.get_input_embeddings().weight, self.seen.disclosed.tokenizer)  # type: ignore[operator]
        self.longest = family_of(self.seen.model).max_tokens(self.seen.model.config)
        settled = self.lists.settled if self.seen.disclosed.mode == "train" else frozenset()
        self.held: frozenset[int] = settled  # the distance is off by what dropout did; exact places are not to move
        self.damaged = any(target.kept is not None or target.release is not None for target in self.objective.targets)
        self.sharp = self.damaged and self.seen.disclosed.mode == "eval" and self.seen.disclosed.kind == "gradient"
        self.asked: set[tuple[int, Row]] = set()
        self.padding = int(self.seen.disclosed.tokenizer.pad_token_id)

    @property
    def best(self) -> tuple[int, Row]:
        """Label and text with the smallest distance; see `cost`."""
        return min(self.pool, key=self.cost)

    def cost(self, key: tuple[int, Row]) -> float:
        """Distance, times the root of the length where the truth's is zero: more words fit more of anything."""
        return self.pool[key] * (len(key[1]) ** 0.5 if self.sharp else 1.0)

    @property
    def left(self) -> int:
        """Candidates that may still be scored."""
        return self.limit - len(self.pool)

    def run(self) -> tuple[int, Row]:
        """Search until a text is proven, nothing helps any more, or the budget is spent."""
        self.open()
        width = NARROW
        while self.left > 0 and not self.solved():
            now = self.best
            self.substitute(now, width)
            self.shorten(now)
            if self.best == now:
                self.reorder(now)
            if self.best != now:
                width = NARROW
                continue
            if self.seen.disclosed.lengths is None:
                self.resize(now, width)
            if self.best == now and width >= WIDEST:
                break
            width = min(WIDEST, width * WIDER) if self.best == now else NARROW
        final = self.best if self.certain else self.decided()
        self.certain = self.certain or is_message(self.seen, final[1], final[0])
        return final

    def solved(self) -> bool:
        """Whether the best text is at zero, and proven."""
        label, row = self.best
        if self.pool[label, row] < SOLVED and (label, row) not in self.asked:
            self.asked.add((label, row))
            self.certain = is_message(self.seen, row, label)
        return self.certain

    @torch.no_grad()
    def decided(self) -> tuple[int, Row]:
        """The best of the best few once their gradients are written out, masked and rounded."""
        few = heapq.nsmallest(FINAL, self.pool, key=lambda key: self.pool[key])
        if not self.damaged:
            return few[0]
        exact = Objective(self.seen, 1, aware=True)
        distances = []
        for label, row in few:
            ids = torch.tensor([row], device=self.table.weight.device)
            batch = Batch(ids, torch.ones_like(ids), torch.full_like(ids[:, 0], label))
            distances.append(float(exact(batch, self.table.weight[ids])[0]))
        return few[min(range(len(few)), key=lambda index: distances[index])]

    @torch.no_grad()
    def score(self, label: int, rows: Sequence[Row]) -> None:
        """Distances into the pool, as far as the budget reaches; the very first text always."""
        fresh = [row for row in dict.fromkeys(rows) if (label, row) not in self.pool and len(row) <= self.longest]
        fresh = sorted(fresh[: max(self.left, 0 if self.pool else 1)], key=len)
        for first in range(0, len(fresh), CHUNK):
            some = fresh[first : first + CHUNK]
            width = max(map(len, some))
            ids = torch.tensor([[*row, *[self.padding] * (width - len(row))] for row in some])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in some])
            batch = Batch(ids, mask, torch.full((len(some),), label))
            batch = Batch(
                *(x.to(self.table.weight.device) for x in (batch.input_ids, batch.attention_mask, batch.labels))
            )
            found = self.objective(batch, self.table.weight[batch.input_ids]).detach().nan_to_num(nan=torch.inf)
            self.pool |= {(label, row): value for row, value in zip(some, found.tolist(), strict=True)}

    def open(self) -> None:
        """The likeliest texts of every length under every label; rounds for some lengths before one is followed.

        Before its words are right a longer text is often nearer than the right length, so that the first of the
        list have a round each whatever their distance; those ahead after it have another.
        """
        rows = list(self.starts)
        for length in self.lists.lengths:
            guess = self.lists.upto(length)
            rows += [self.framed(guess.text()), self.framed(guess.best(1)[:, 0])]
        for label in self.labels:
            self.score(label, rows)
        if len(self.lists.lengths) == 1 or self.solved():
            return
        label = self.best[0]
        some = dict.fromkeys([*self.lists.lengths[: LENGTHS - 1], len(self.best[1])])
        for count in (LENGTHS, LENGTHS - 1):
            ahead = sorted((self.best_of(label, length) for length in some), key=self.cost)[:count]
            for key in ahead:
                if self.left > self.limit // 2 and not self.solved():
                    self.substitute(key, NARROW)
            self.shorten(self.best)

    def best_of(self, label: int, length: int) -> tuple[int, Row]:
        """The nearest text of one length; the nearest of all where there is none."""
        same = (key for key in self.pool if key[0] == label and len(key[1]) == length)
        return min(same, key=self.pool.__getitem__, default=self.best)

    def framed(self, text: Tensor) -> Row:
        """A text's (L,) tokens with the special ones in their places."""
        size = len(self.frame.prefix)
        return tuple(self.frame.wrap(text.tolist()[size : len(text) - len(self.frame.suffix)]))

    def places(self, row: Row) -> range:
        """Positions that hold the text itself."""
        return range(len(self.frame.prefix), len(row) - len(self.frame.suffix))

    def tokens(self, key: tuple[int, Row], width: int) -> dict[int, list[int]]:
        """Place -> tokens to try there: likely ones; those of long lists that the distance's slope points to."""
        row = key[1]
        length = min(len(row), self.lists.guess.misfit.shape[1])
        guess = self.lists.upto(length)
        plain = guess.misfit.topk(min(width, len(guess.tokens)), dim=0, largest=False).indices
        if width <= NARROW:
            listed, near = guess.best(width), None
        else:
            listed = self.pointed(key, guess, width)
            near = self.table.nearest(self.table.weight[list(row)], NEAR)
        out = {}
        for place in self.places(row):
            if place in self.held:
                continue
            found = (
                [] if place >= length else [*listed[place].tolist(), *guess.tokens[plain[: width // 2, place]].tolist()]
            )
            out[place] = found + ([] if near is None else near[place].tolist())
        return out

    def pointed(self, key: tuple[int, Row], guess: Guess, count: int) -> Tensor:
        """(L, count) likely tokens towards which the distance falls, to first order."""
        label, row = key
        ids = torch.tensor([row], device=self.table.weight.device)
        batch = Batch(ids, torch.ones_like(ids), torch.full_like(ids[:, 0], label))
        embeddings = self.table.weight[ids].detach().clone().requires_grad_()
        distance = self.objective(batch, embeddings, create_graph=True).sum()
        (slope,) = torch.autograd.grad(distance, embeddings)
        change = self.table.weight[guess.tokens] @ slope[0, : guess.misfit.shape[1]].T
        change = (change - change.mean(0)) / change.std(0).clamp_min(1e-30)
        order = (guess.misfit + SLOPE * change).topk(min(count, len(guess.tokens)), dim=0, largest=False).indices
        return guess.tokens[order].T

    def substitute(self, key: tuple[int, Row], width: int) -> None:
        """Try tokens at every place at once, then what helps together; pairs of the nearest when nothing helps."""
        label, row = key
        tried = {
            (place, token): (*row[:place], token, *row[place + 1 :])
            for place, tokens in self.tokens(key, width).items()
            for token in tokens
            if token != row[place]
        }
        fresh = list(tried.values())
        self.draws.shuffle(fresh)
        self.score(label, fresh)
        values = {move: self.pool[label, other] for move, other in tried.items() if (label, other) in self.pool}
        moves = sorted(values, key=values.__getitem__)
        together, rows, moved = list(row), [], set()
        for place, token in moves:
            if values[place, token] < self.pool[key] and place not in moved:
                moved.add(place)
                together[place] = token
                rows.append(tuple(together))
        if not rows:
            for (one, first), (two, second) in combinations(moves[:PAIRS], 2):
                if one != two:
                    pair = list(row)
                    pair[one], pair[two] = first, second
                    rows.append(tuple(pair))
        self.score(label, rows)

    def reorder(self, key: tuple[int, Row]) -> None:
        """Other orders of the words; when there are many, a part of them at random."""
        label, row = key
        places = self.places(row)
        if self.held.intersection(places):
            return
        bodies = [tuple(self.frame.wrap(body)) for body in reorderings(row[places.start : places.stop])]
        rows = [other for other in bodies if (label, other) not in self.pool]
        self.score(label, self.draws.sample(rows, min(ORDERS, len(rows))))

    def shorten(self, key: tuple[int, Row]) -> None:
        """The text's beginnings, whose words keep their places, and the text itself as long as the lists say."""
        label, row = key
        places = self.places(row)
        if self.seen.disclosed.lengths is not None or self.held.intersection(places):
            return
        body = row[places.start : places.stop]
        rows = [tuple(self.frame.wrap(body[:n])) for n in range(1, len(body))]
        for length in self.lists.lengths:
            ending = self.framed(self.lists.upto(length).text())
            words = tuple(ending[place] for place in self.places(ending))
            rows.append(tuple(self.frame.wrap((*body[: len(words)], *words[len(body) :]))))
        self.score(label, rows)

    def resize(self, key: tuple[int, Row], count: int) -> None:
        """One word less anywhere, or one more of those that the lists find likely there."""
        label, row = key
        places = self.places(row)
        if self.held.intersection(places):
            return
        body = row[places.start : places.stop]
        rows = [tuple(self.frame.wrap(body[:n] + body[n + 1 :])) for n in range(len(body) if len(body) > 1 else 0)]
        guess = self.lists.guess
        for n in range(len(body) + 1):
            place = places.start + n
            if place < guess.misfit.shape[1]:
                fit = guess.misfit[:, place].topk(min(count, len(guess.tokens)), largest=False).indices
                rows += [tuple(self.frame.wrap((*body[:n], token, *body[n:]))) for token in guess.tokens[fit].tolist()]
        self.score(label, rows)
