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

import torch
from torch import Tensor

from dpguard.attacks.likelihood_moves import reorderings
from dpguard.attacks.match_proof import is_message
from dpguard.attacks.match_soft import Lists
from dpguard.attacks.objective import Objective
from dpguard.attacks.observation import Observation
from dpguard.attacks.vocabulary import TokenTable, frame_of
from dpguard.inputs.batch import Batch
from dpguard.inputs.family import family_of

Row = tuple[int, ...]
CHUNK = 64
NARROW, WIDER, WIDEST = 8, 3, 300
"""Tokens tried at each place: at first, how many times more when nothing helps, at most."""
ORDERS = 96
NEAR = 8
WRITTEN_OUT = 500_000
"""Entries up to which every candidate's gradient is written out."""
FINAL = 8
"""Texts whose gradients are written out in the end in any case."""
LENGTHS = 3
"""Lengths that get a round of their own before one is chosen."""


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
        self.objective = Objective(self.seen, 1, aware=entries <= WRITTEN_OUT)
        self.frame = frame_of(self.seen.disclosed.tokenizer)
        self.table = TokenTable(self.seen.model.get_input_embeddings().weight, self.seen.disclosed.tokenizer)  # type: ignore[operator]
        self.longest = family_of(self.seen.model).max_tokens(self.seen.model.config)
        settled = self.lists.settled if self.seen.disclosed.mode == "train" else frozenset()
        self.held: frozenset[int] = settled  # the distance is off by what dropout did; exact places are not to move
        self.padding = int(self.seen.disclosed.tokenizer.pad_token_id)

    @property
    def best(self) -> tuple[int, Row]:
        """Label and text with the smallest distance."""
        return min(self.pool, key=lambda key: self.pool[key])

    @property
    def left(self) -> int:
        """Candidates that may still be scored."""
        return self.limit - len(self.pool)

    def run(self) -> tuple[int, Row]:
        """Search until a text is proven, nothing helps any more, or the budget is spent."""
        self.open()
        width = NARROW
        while self.left > 0:
            now = self.best
            self.substitute(now, width)
            if self.best == now:
                self.reorder(now)
            if self.best != now:
                width = NARROW
                continue
            if width == NARROW and self.proven(now):
                return now
            if self.seen.disclosed.lengths is None:
                self.resize(now, width)
            if self.best == now and width >= WIDEST:
                break
            width = min(WIDEST, width * WIDER) if self.best == now else NARROW
        final = self.decided()
        self.proven(final)
        return final

    @torch.no_grad()
    def decided(self) -> tuple[int, Row]:
        """The best of the best few once their gradients are written out, masked and rounded."""
        exact = Objective(self.seen, 1, aware=True)
        few = heapq.nsmallest(FINAL, self.pool, key=lambda key: self.pool[key])
        if all(target.kept is None and target.release is None for target in exact.targets):
            return few[0]
        distances = []
        for label, row in few:
            ids = torch.tensor([row], device=self.table.weight.device)
            batch = Batch(ids, torch.ones_like(ids), torch.full_like(ids[:, 0], label))
            distances.append(float(exact(batch, self.table.weight[ids])[0]))
        return few[min(range(len(few)), key=lambda index: distances[index])]

    def proven(self, key: tuple[int, Row]) -> bool:
        """Whether a text's own message is the one seen."""
        self.certain = is_message(self.seen, key[1], key[0])
        return self.certain

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
        """The likeliest texts of every length under every label; a round each for the best lengths."""
        rows = list(self.starts)
        for length in self.lists.lengths:
            guess = self.lists.upto(length)
            rows += [self.framed(guess.text()), self.framed(guess.best(1)[:, 0])]
        for label in self.labels:
            self.score(label, rows)
        label = self.best[0]
        ahead: dict[int, tuple[int, Row]] = {}
        for key in sorted((k for k in self.pool if k[0] == label), key=lambda key: self.pool[key]):
            ahead.setdefault(len(key[1]), key)
        for key in list(ahead.values())[:LENGTHS] if len(ahead) > 1 else []:
            self.substitute(key, NARROW)

    def framed(self, text: Tensor) -> Row:
        """A text's (L,) tokens with the special ones in their places."""
        size = len(self.frame.prefix)
        return tuple(self.frame.wrap(text.tolist()[size : len(text) - len(self.frame.suffix)]))

    def places(self, row: Row) -> range:
        """Positions that hold the text itself."""
        return range(len(self.frame.prefix), len(row) - len(self.frame.suffix))

    def tokens(self, row: Row, width: int) -> dict[int, list[int]]:
        """Place -> tokens to try there: likely ones, and words like the present one when lists are wide."""
        length = min(len(row), self.lists.guess.misfit.shape[1])
        guess = self.lists.upto(length)
        listed, plain = (
            guess.best(width),
            guess.misfit.topk(min(width, len(guess.tokens)), dim=0, largest=False).indices,
        )
        out = {}
        near = self.table.nearest(self.table.weight[list(row)], NEAR) if width > NARROW else None
        for place in self.places(row):
            if place in self.held:
                continue
            found = (
                [] if place >= length else [*listed[place].tolist(), *guess.tokens[plain[: width // 2, place]].tolist()]
            )
            out[place] = found + ([] if near is None else near[place].tolist())
        return out

    def substitute(self, key: tuple[int, Row], width: int) -> None:
        """Try tokens at every place at once, then what helps together."""
        label, row = key
        tried = {
            (place, token): (*row[:place], token, *row[place + 1 :])
            for place, tokens in self.tokens(row, width).items()
            for token in tokens
        }
        fresh = list(tried.values())
        self.draws.shuffle(fresh)
        self.score(label, fresh)
        gains: dict[int, tuple[float, int]] = {}
        for (place, token), other in tried.items():
            value = self.pool.get((label, other), torch.inf)
            if value < self.pool[key]:
                gains[place] = min(gains.get(place, (torch.inf, 0)), (value, token))
        together, rows = list(row), []
        for place in sorted(gains, key=lambda place: gains[place]):
            together[place] = gains[place][1]
            rows.append(tuple(together))
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
