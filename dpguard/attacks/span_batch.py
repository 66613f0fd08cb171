"""Batches of an encoder, whole: rows first, each alone, then texts from rows, each proven before the next.

From the first block's gradients (a query, key or value weight, the MLP's output weight, and, as far as they are
shared, the attention's output and the MLP's input weights), without labels, lengths or the number of texts:

1. `span_pool`: which (token, position) pairs the batch may hold;
2. `span_affine`: for each of them, all states that the linear conditions allow, in one decomposition;
3. `span_descent`: the one among them that the MLP's output weight confirms, which wrong pairs do not have;
4. `span_members`: the text around a solved row, by non-negative least squares;
5. a text whose every row lies in the spans to the message's precision is certain, and explains its rows; the
   batch is complete when the certain texts have as many tokens as the span has dimensions.

More tokens than the model is wide leave a pool and drafts only (`span_wide`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpguard.attacks.base import Budget
from dpguard.attacks.observation import Observation, Reconstruction
from dpguard.attacks.span_affine import family_of
from dpguard.attacks.span_block import first_block
from dpguard.attacks.span_counts import counts_of
from dpguard.attacks.span_descent import Descent
from dpguard.attacks.span_evidence import Evidence, gather, usable
from dpguard.attacks.span_members import Members, MemberSolver
from dpguard.attacks.span_pool import READERS, pool_of
from dpguard.attacks.span_rank import RESOLUTION
from dpguard.attacks.span_repair import Repairs
from dpguard.attacks.span_sites import Probe, Site, sites_of
from dpguard.attacks.span_wide import WideReader
from dpguard.attacks.vocabulary import Frame, allowed_tokens, frame_of

CONTEXT = 300
"""Candidates whose mean is the context that a row is first thought to have."""
SORTING, NEWTON, POLISH = 6, 5, 3
"""Cheap steps for all candidates, full steps for a wave of them, and in double precision for what is nearly solved."""
WAVE = 48
NEAR = 0.02
"""Loss after `NEWTON` steps up to which a row is worth `POLISH`."""
SHORTLIST = 2.5
"""Candidates among which a text is looked for first, as a multiple of the batch's tokens."""
SAME = 0.02
"""Relative distance of two mixtures up to which they are the same row's."""
ALTERNATIVES = 12
TURNS = 3
"""Drafts that are edited after a wave."""
AGAIN, ROUNDS = 64, 4
"""Starts of a round from random contexts, when rows of one token and position in several texts hide one another,
and rounds a restart of the budget."""


def batch_reason(seen: Observation) -> str:
    """Empty when a message of several texts can be read, else what is missing."""
    sites = sites_of(seen.model)
    inner, reason = usable(seen, sites)
    if reason:
        return reason
    inner = [site for site in inner if not site.adapter]
    if not inner:
        return "several texts have more tokens than LoRA's rank, and the weights that it adapts are not shared"
    roles = {site.role for site in inner if site.block == 0}
    if first_block(Probe(seen.model), sites) is None:
        return "messages of several texts are read for post-norm encoders (BERT, RoBERTa, DistilBERT) only"
    if "mlp_out" not in roles:
        return "several texts need the first block's MLP output weight, which is not shared"
    if not roles & READERS:
        return "several texts need the first block's query, key or value weight, and none is shared"
    return ""


@dataclass
class _Found:
    """A text proposed so far.

    Attributes:
        ids: token ids.
        certain: it is proven.
        fits: nothing on the wire speaks against it.
        misfit: mean residual of its rows.
    """

    ids: list[int]
    certain: bool
    fits: bool
    misfit: float


class BatchReader:
    """Reads one message of several texts.

    Args:
        seen: what the adversary holds.
        rng: source of every draw.
        budget: steps, and candidates: rows that are solved and texts that are held against the message.
    """

    def __init__(self, seen: Observation, rng: torch.Generator, budget: Budget) -> None:
        self.seen, self.rng, self.budget = seen, rng, budget
        self.probe, self.sites = Probe(seen.model), sites_of(seen.model)
        tokenizer = seen.disclosed.tokenizer
        allowed = allowed_tokens(tokenizer, len(self.probe.embedding), unknown=True)
        self.tokens = allowed.nonzero().flatten().to(self.probe.device)
        self.frame: Frame = frame_of(tokenizer)
        self.steps = self.solved = 0
        self.texts: dict[tuple[int, ...], _Found] = {}
        self.explained: dict[int, list[Tensor]] = {}

    def read(self) -> Reconstruction:
        """Propose the batch's texts; see the module's text."""
        block = first_block(self.probe, self.sites)
        evidence = self._evidence()
        by_role = {e.site.role: e for e in reversed(evidence) if e.site.block == 0}
        readers = [e for e in evidence if e.site.role in READERS and e.site.block == 0]
        if block is None or not readers:
            reason = "no span of the first block rises above rounding or noise: more tokens than the model is wide"
            return Reconstruction([], [], notes={"reason": reason})
        self.block = block
        if "mlp_out" not in by_role:
            return self._wide(readers)
        self.judge = by_role["mlp_out"]
        self.witnesses = [e for e in evidence if not any(e is r for r in readers)]  # these made the pool
        self.pool = pool_of(block, readers, self.tokens, self.frame, self.rng)
        if not bool((self.pool.places >= len(self.frame.prefix)).any()):
            return Reconstruction([], [], notes={"reason": "no token's embedding lies in the first block's span"})
        self.repairs = Repairs(self.probe, self.judge, self.frame)
        self.solver = MemberSolver(block, self.pool)
        self.places = {self.pool.pair(i): i for i in range(len(self.pool))}
        outputs, inputs = (by_role[r].span if r in by_role else None for r in ("attention_output", "mlp_in"))
        spans = [self.judge.span, *(span for span in (outputs, inputs) if span is not None)]
        ranks = sorted(span.rank for span in spans)
        # rounding hides some from one weight or the other; weights that moved add some as well
        self.dimensions = ranks[len(ranks) // 2] if self.judge.span.drifted else ranks[-1]
        self.family = family_of(block, self.pool.rows, self._average(), outputs, inputs)
        self._search()
        return self._answer()

    def _wide(self, readers: list[Evidence]) -> Reconstruction:
        """Drafts, where the MLP's output weight has all the dimensions it can have."""
        told = self.seen.disclosed
        pool = pool_of(self.block, readers, self.tokens, self.frame, self.rng)
        words = bool((pool.places >= len(self.frame.prefix)).any())
        if not words or len(pool) > self.budget.candidates:
            reason = "more tokens than the model is wide, and too many or no pairs of token and position to draft from"
            return Reconstruction([], [], notes={"reason": reason, "pool": len(pool)})
        site = next(s for s in usable(self.seen, self.sites)[0] if s.block == 0 and s.role == "mlp_out")
        reader = WideReader(self.block, pool, self.frame, site.oriented(self.seen.message[site.name]), self.rng)
        return reader.read(told.texts)

    def _evidence(self) -> list[Evidence]:
        """Spans of the first block, and of one weight of a later block as a second opinion."""
        inner = [site for site in usable(self.seen, self.sites)[0] if not site.adapter]
        first = [site for site in inner if site.block == 0]
        later = [site for site in inner if site.block > 0]
        found = gather(self.seen, first, causal=False, most=len(first))
        return found + gather(self.seen, sorted(later, key=_by_width)[:1], causal=False, most=1)

    def _average(self) -> Tensor:
        """(P, d) mixtures over a sample of the pool."""
        some = torch.randperm(len(self.pool), generator=self.rng)[:CONTEXT].to(self.probe.device)
        quick = self.block.in_precision(torch.float32)
        return quick.mixtures(self.pool.rows.float(), self.pool.rows[some].float()).double()

    def _search(self) -> None:
        """Waves of candidates, likeliest first, until the texts found explain the span."""
        quick, fine = (
            Descent(self.block, self.pool.rows, self.family, self.judge.span.basis, kind)
            for kind in (torch.float32, torch.float64)
        )
        everyone = torch.arange(len(self.pool), device=self.probe.device)
        start = torch.zeros((len(self.pool), quick.size), device=self.probe.device)
        losses, start = quick.sort(everyone, start, self._spend(SORTING))
        order = losses.argsort()
        self.short = order[: int(SHORTLIST * self.judge.span.rank)]
        for wave in order.split(WAVE):  # type: ignore[no-untyped-call]
            if self._done():
                return
            self._wave(quick, fine, wave, start[wave])
            self._repair(TURNS)
        for _ in range(ROUNDS * self.budget.restarts):
            if self._done() or not quick.size:
                return
            self._wave(quick, fine, *self._restarts())
            self._repair(TURNS)

    def _wave(self, quick: Descent, fine: Descent, which: Tensor, y: Tensor) -> None:
        """Solve some rows from where they stand, and take those that arrive."""
        room = max(0, self.budget.candidates - self.solved - self.probe.scored)
        which, y = which[:room], y[:room]
        self.solved += len(which)
        loss, y = quick.descend(which, y, self._spend(NEWTON))
        near = loss < NEAR
        self._take(fine, which[near], y[near].double())

    def _spend(self, steps: int) -> int:
        """As many of these steps as the budget has left; they are counted."""
        steps = max(0, min(steps, self.budget.steps - self.steps))
        self.steps += steps
        return steps

    def _restarts(self) -> tuple[Tensor, Tensor]:
        """Candidates, those first that every text has, and y of contexts of random members."""
        ends = [i for (_, token), i in self.places.items() if token in self.frame.suffix]
        shared = [self.places[pair] for pair in enumerate(self.frame.prefix)] + ends
        some = torch.randint(len(self.short), (AGAIN,), generator=self.rng).to(self.probe.device)
        which = self.short[some]
        half = AGAIN // 2 if shared else 0
        which[:half] = torch.tensor((shared * half)[:half], device=which.device)
        contexts = []
        for index in which.tolist():
            size = int(torch.randint(2, 12, (1,), generator=self.rng))
            near = torch.randint(len(self.short), (size,), generator=self.rng).to(which.device)
            rows = self.pool.rows[torch.cat([self.short[near], which.new_tensor([index])])]
            contexts.append(self.block.mixtures(rows[-1:], rows)[0])
        gap = torch.stack(contexts) - self.family.start[which]
        return which, torch.linalg.lstsq(self.family.free.T, gap.T).solution.T.float()

    def _take(self, fine: Descent, which: Tensor, y: Tensor) -> None:
        """Finish what is nearly solved, and look for the texts around it."""
        if not len(which):
            return
        loss, y = fine.descend(which, y, POLISH)
        mixtures = self.family.start[which] + y @ self.family.free
        states = self.block.states(self.pool.rows[which], mixtures)
        true = self._in_span(self.block.act(self.block.mlp_in(states)))
        for k in loss.argsort().tolist():
            if self._done():
                return
            index = int(which[k])
            if true[k] and not self._is_explained(index, mixtures[k]):
                self._text_around(index, mixtures[k])

    def _done(self) -> bool:
        spent = self.steps >= self.budget.steps or self.solved + self.probe.scored >= self.budget.candidates
        counted = self.judge.span.drifted and sum(t.fits for t in self.texts.values()) == self.seen.disclosed.sequences
        return spent or counted or self._covered() >= self.dimensions

    def _covered(self) -> int:
        """Dimensions of the span that the accepted texts explain."""
        return sum(len(found.ids) for found in self.texts.values() if found.fits)

    def _is_explained(self, index: int, mixture: Tensor) -> bool:
        size = SAME * float(mixture.norm())
        return any(float((mixture - other).norm()) < size for other in self.explained.get(index, ()))

    def _text_around(self, index: int, mixture: Tensor) -> None:
        """The text that a solved row belongs to, from the likely candidates, else from all of them."""
        everyone = torch.arange(len(self.pool), device=self.probe.device)
        contexts = [self.short, everyone] if len(self.short) < len(self.pool) else [everyone]
        for context in contexts:
            found = self._members(index, mixture, context)
            self.steps += 1
            text = found.text(self.frame)
            if text is not None and self._propose(text, found):
                return

    def _members(self, index: int, mixture: Tensor, context: Tensor) -> Members:
        opening = [self.places[pair] for pair in enumerate(self.frame.prefix)]
        return self.solver.solve(mixture, list(dict.fromkeys([index, *opening])), context)

    def _propose(self, text: list[int], found: Members) -> bool:
        """Hold a text against the message; whether it stands."""
        if tuple(text) in self.texts:
            return self.texts[tuple(text)].fits
        known = self._held(text)
        if not known.fits and self.judge.span.blurred:
            self.repairs.add(text, found.alternatives(len(text), ALTERNATIVES))
        return known.fits

    def _held(self, text: list[int]) -> _Found:
        """Hold a text against the message, and remember what that said."""
        known = self.texts.get(tuple(text)) or self._judged(text)
        if known.fits and tuple(text) not in self.texts:
            self._explain(text)
        self.texts[tuple(text)] = known
        return known

    def _repair(self, turns: int) -> None:
        """Edit the drafts that fit best, as long as there are any."""
        bag = torch.unique(self.pool.tokens[self.short])
        limit = self.budget.candidates - self.solved
        for _ in range(turns):
            if self._done():
                return
            text = self.repairs.turn([t.ids for t in self.texts.values() if t.fits], bag, limit)
            if text is None:
                return
            self._held(text)

    def _judged(self, text: list[int]) -> _Found:
        ids = torch.tensor(text, device=self.probe.device)
        states = self.probe.states(self.judge.site.layer, ids[None])[0]
        misfit = float(self.judge.span.outside(states)[0].mean())
        proven = self.judge.proves(self.probe, ids) and not any(
            e.contradicts(self.probe, ids, self.dimensions) for e in self.witnesses
        )
        return _Found(text, proven, proven or bool(self._in_span(states).all()), misfit)

    def _in_span(self, activations: Tensor) -> Tensor:
        """(n,) whether the MLP output's inputs may be the client's, as far as the message tells.

        A coarse rounding hides whole directions, not only their precision: then it is what tells one text from
        another that counts. Such a text fits, and is never proven by it.
        """
        residual, allowed = self.judge.span.outside(activations)
        return residual <= (allowed.clamp_min(RESOLUTION) if self.judge.span.blurred else allowed)

    def _explain(self, text: list[int]) -> None:
        """Remember the rows of an accepted text."""
        index = [self.places.get((p, t), -1) for p, t in enumerate(text)]
        where = torch.arange(len(text), device=self.probe.device)
        rows = self.block.embed(torch.tensor(text, device=where.device), where)
        for i, mixture in zip(index, self.block.mixtures(rows, rows), strict=True):
            self.explained.setdefault(i, []).append(mixture)

    def _answer(self) -> Reconstruction:
        """The accepted texts, then the best of the others as far as the span has room for them."""
        certain = [t for t in self.texts.values() if t.certain]
        fitting = sorted((t for t in self.texts.values() if t.fits and not t.certain), key=lambda t: t.misfit)
        others = sorted((t for t in self.texts.values() if not t.fits), key=lambda t: t.misfit)
        chosen, room = certain + fitting, self.dimensions - self._covered()
        for text in others:
            if len(text.ids) <= room:
                chosen.append(text)
                room -= len(text.ids)
        chosen = self._repeated(chosen)[: self.seen.disclosed.sequences]
        covered = sum(len(t.ids) for t in certain)
        notes: dict[str, Any] = {
            "weight": self.judge.site.name,
            "rank": self.dimensions,
            "explained": covered,
            "complete": covered == self.dimensions,
            "pool": len(self.pool),
            "open": self.family.size,
        }
        scored = self.solved + self.probe.scored
        return Reconstruction([t.ids for t in chosen], [t.certain for t in chosen], self.steps, scored, notes)

    def _repeated(self, chosen: list[_Found]) -> list[_Found]:
        """The texts, as often as each is in the batch where the message tells."""
        counts = counts_of(self.seen, self.judge.site.name, [t.ids for t in chosen])
        if counts is None:
            return chosen
        return chosen + [t for t, count in zip(chosen, counts, strict=True) for _ in range(count - 1)]


def _by_width(site: Site) -> tuple[int, int]:
    """Later blocks' weights, those with the widest inputs first: they tell best."""
    return -int(max(site.layer.get_parameter("weight").shape)), site.block
