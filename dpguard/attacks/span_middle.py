"""Batches of an encoder from the weights of one block at any depth: rows first, then whose they are, then texts.

A row is one token of one text where it enters the block's MLP. Nothing is known of what such a row may be, as
the embeddings say it for the first block (`span_batch`), and nothing needs to be:

1. a row is a combination of as many directions as there are rows (the MLP input's span), normalised, and its
   activations lie in the MLP output's span. Newton's method (`span_descent`) gets from almost any start to
   some row; starts that lean towards what no row explains yet find the others;
2. a row before its normalisation is the block's input plus the attention's output, each in a span of its own:
   a linear system with fewer unknowns than equations gives both;
3. the attention's output is a mixture of the values of the row's own text: non-negative least squares over all
   rows (`span_members`) tells which rows share a text with it;
4. the rows of one text span what one text's gradient would span, so a text is read as a single one is.

Proof is what it is for every text: all its states in the message's own spans, to the message's precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpguard.attacks.base import Budget
from dpguard.attacks.observation import Observation, Reconstruction
from dpguard.attacks.span_affine import Family
from dpguard.attacks.span_block import FirstBlock, Linear, later_block
from dpguard.attacks.span_descent import Descent
from dpguard.attacks.span_evidence import Evidence, gather, usable
from dpguard.attacks.span_members import MemberSolver
from dpguard.attacks.span_pool import Pool
from dpguard.attacks.span_rank import Span
from dpguard.attacks.span_search import Trail
from dpguard.attacks.span_sites import Probe, Sites, sites_of

NEEDED = frozenset({"attention_output", "mlp_in", "mlp_out"})
READERS = ("value", "query")
STARTS, NEWTON, POLISH = 64, 12, 6
"""Starts of a round, and its steps in single and in double precision."""
ROUNDS = 5
"""Rounds a restart of the budget."""
NEAR, SOLVED, SAME = 1e-3, 1e-7, 1e-3
"""Loss worth `POLISH`, loss of a solved row, and relative distance of two that are the same."""
TOWARDS = 0.6
"""Share of the starts that stand at a known row and lean towards what none explains."""
TOGETHER = 0.5
"""Membership from which two rows have one text (right ones are at 1, others at 0)."""
EXACT = 1e-4
"""Relative error of a solved row (measured: at most 5e-5)."""


def middle_block(seen: Observation, sites: Sites) -> int:
    """The first inner block whose weights are all there to read, or -1."""
    roles: dict[int, set[str]] = {}
    for site in usable(seen, sites)[0]:
        if not site.adapter:
            roles.setdefault(site.block, set()).add(site.role)
    whole = [block for block, there in roles.items() if there >= NEEDED and there & set(READERS)]
    return min(whole, default=-1)


def middle_reason(seen: Observation) -> str:
    """Empty when a message of several texts can be read from one block, else what is missing."""
    sites = sites_of(seen.model)
    block = middle_block(seen, sites)
    if block < 0:
        return "no inner block shares its value or query, attention output and both MLP weights"
    return "" if later_block(Probe(seen.model), sites, block) else "the block is not that of a post-norm encoder"


@dataclass(frozen=True)
class Rows:
    """Solved rows.

    Attributes:
        states: (n, d) what enters the MLP.
        inputs: (n, d) what enters the block.
        mixtures: (n, d) what enters the attention's output layer.
    """

    states: Tensor
    inputs: Tensor
    mixtures: Tensor


class RowFinder:
    """Finds the rows of a block, each alone.

    Args:
        block: its layers, float64.
        spans: by role, of "mlp_in", "mlp_out", "attention_output" and the block's inputs ("inputs").
        rng: source of the starts.
    """

    def __init__(self, block: FirstBlock, spans: dict[str, Span], rng: torch.Generator) -> None:
        self.block, self.spans, self.rng = block, spans, rng
        self.device = block.norm.gain.device
        basis, norm = spans["mlp_in"].basis, block.norm
        wide = torch.cat([basis / norm.gain, -(norm.shift / norm.gain)[None]])
        mean = wide.mean(1, keepdim=True)
        self.centred = torch.linalg.qr(mean, mode="complete").Q[:, 1:].T  # combinations whose mean is 0
        free = self.centred @ wide
        nothing = torch.zeros((STARTS, block.width), dtype=torch.float64, device=self.device)
        zero, eye = nothing[0], torch.eye(block.width, dtype=torch.float64, device=self.device)
        family = Family(nothing, free, nothing[:, 0], self.centred[:, -1])
        bare = replace(block, output=Linear(eye, zero))
        self.quick, self.fine = (
            Descent(bare, nothing, family, spans["mlp_out"].basis, kind) for kind in (torch.float32, torch.float64)
        )
        self.free, self.steps, self.starts = free, 0, 0

    def find(self, rounds: int, steps: int) -> Rows:
        """As many rows as the span has dimensions, unless rounds or steps are spent before."""
        states = torch.zeros((0, self.block.width), dtype=torch.float64, device=self.device)
        for _ in range(rounds):
            if len(states) >= self.spans["mlp_out"].rank or self.steps >= steps:
                break
            for state in self._solved(self._starts(states)):
                apart = (states - state).norm(dim=1) > SAME * state.norm()
                if bool(apart.all()):
                    states = torch.cat([states, state[None]])
        inputs, mixtures = self._parts(states)
        return Rows(states, inputs, mixtures)

    def _solved(self, y: Tensor) -> Tensor:
        """(k, d) rows that a round of starts ends at."""
        which = torch.arange(len(y), device=self.device)
        loss, end = self.quick.descend(which, y.float(), NEWTON)
        near = loss < NEAR
        self.steps += NEWTON + POLISH
        self.starts += len(y)
        loss, end = self.fine.descend(which[near], end[near].double(), POLISH)
        states = self.block.norm(end @ self.free)
        activations = self.block.act(self.block.mlp_in(states))
        allowed = self.spans["mlp_in"].outside(states)[1] + self.spans["mlp_out"].outside(activations)[1]
        found: Tensor = states[loss < SOLVED + allowed.clamp_max(NEAR)]
        return found

    def _starts(self, states: Tensor) -> Tensor:
        """(STARTS, k) random coordinates, such as lean towards what no known row explains."""
        basis = self.spans["mlp_in"].basis
        drawn = self._normal(len(basis))
        if len(states):
            known = states @ basis.T
            mean = known.mean(0)
            size = (known - mean).norm(dim=1).mean()
            taken = torch.linalg.qr(known.T).Q
            new = torch.nn.functional.normalize(drawn - drawn @ taken @ taken.T, dim=1)
            some = torch.randint(len(known), (STARTS,), generator=self.rng).to(self.device)
            beside = known[some] + new * size * (0.2 + self._uniform())
            apart = new * size + mean * self._uniform()
            coordinates = torch.where(self._uniform() < TOWARDS, beside, apart)
        else:
            norm = self.block.norm
            size = (norm.gain.pow(2) + norm.shift.pow(2)).sum().sqrt()
            coordinates = torch.nn.functional.normalize(drawn, dim=1) * size * (0.2 + self._uniform())
        out: Tensor = torch.nn.functional.pad(coordinates, (0, 1), value=1.0) @ self.centred.T
        return out

    def _normal(self, width: int) -> Tensor:
        return torch.randn((STARTS, width), generator=self.rng, dtype=torch.float64).to(self.device)

    def _uniform(self) -> Tensor:
        return torch.rand((STARTS, 1), generator=self.rng, dtype=torch.float64).to(self.device)

    def _parts(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d) inputs and (n, d) mixtures: s z - x - W o = b - m for a deviation s and a mean m."""
        inputs, outputs = self.spans["inputs"].basis, self.spans["attention_output"].basis
        norm, layer = self.block.norm, self.block.output
        scaled = (states - norm.shift) / norm.gain
        shared = torch.cat([inputs, outputs @ layer.weight.T, torch.ones_like(scaled[:1, :])])
        x, o = [], []
        for row in scaled:
            system = torch.cat([shared, -row[None]]).T
            found = torch.linalg.lstsq(system, -layer.bias[:, None], driver="gelsd").solution[:, 0]
            x.append(found[: len(inputs)] @ inputs)
            o.append(found[len(inputs) : len(inputs) + len(outputs)] @ outputs)
        return (torch.stack(x), torch.stack(o)) if x else (states, states)  # none


def texts_of(block: FirstBlock, rows: Rows) -> list[Tensor]:
    """Indices of the rows of each text, long texts first."""
    count = len(rows.states)
    everyone = torch.arange(count, device=rows.states.device)
    solver = MemberSolver(block, Pool(everyone, torch.zeros_like(everyone), rows.inputs))
    share = rows.inputs.new_zeros((count, count))
    for index in range(count):
        found = solver.solve(rows.mixtures[index], [index], everyone)
        share[index, found.tokens] = found.share
    joined = (share + share.T) / 2 > TOGETHER
    left, groups = set(range(count)), []
    while left:
        group, open_ = set(), [min(left)]
        while open_:
            one = open_.pop()
            if one in left:
                left.discard(one)
                group.add(one)
                open_ += joined[one].nonzero().flatten().tolist()
        groups.append(torch.tensor(sorted(group), device=everyone.device))
    return sorted(groups, key=lambda g: -len(g))


class MiddleReader:
    """Reads one message of several texts from one block.

    Args:
        seen: what the adversary holds.
        probe: the model; counts candidates.
        sites: its layers.
        rng: source of every draw.
        budget: steps and candidates.
        single: reads one text from evidence about it alone, up to a value of ``probe.scored``, after so many steps.
    """

    def __init__(
        self,
        seen: Observation,
        probe: Probe,
        sites: Sites,
        rng: torch.Generator,
        budget: Budget,
        single: Callable[[Evidence, int, int], Trail | None],
    ) -> None:
        self.seen, self.probe, self.sites, self.rng, self.budget, self.single = seen, probe, sites, rng, budget, single

    def read(self) -> Reconstruction:
        """Propose the batch's texts."""
        index = middle_block(self.seen, self.sites)
        block = later_block(self.probe, self.sites, index)
        here = [s for s in usable(self.seen, self.sites)[0] if s.block == index and not s.adapter]
        evidence = {e.site.role: e for e in gather(self.seen, here, causal=False, most=len(here))}
        reader = next((evidence[role] for role in READERS if role in evidence), None)
        if block is None or reader is None or not evidence.keys() >= NEEDED:
            reason = "no span of the block rises above rounding or noise: more tokens than the model is wide"
            return Reconstruction([], [], notes={"reason": reason})
        self.judge, self.witnesses = evidence["mlp_out"], [e for r, e in evidence.items() if r != "mlp_out"]
        spans = {role: evidence[role].span for role in NEEDED} | {"inputs": reader.span}
        finder = RowFinder(block, spans, self.rng)
        rows = finder.find(ROUNDS * self.budget.restarts, self.budget.steps)
        self.probe.scored += finder.starts
        if not len(rows.states):
            reason = "no row of the block was found: the weights contradict one another, or the budget is too small"
            return Reconstruction([], [], finder.steps, self.probe.scored, {"reason": reason})
        groups = texts_of(block, rows)
        whole = len(rows.states) >= self.judge.span.rank
        found = []
        for number, group in enumerate(groups):
            share = (self.budget.candidates - self.probe.scored) // (len(groups) - number)
            span = _span_of_rows(rows.inputs[group], blurred=not whole)
            trail = self.single(replace(reader, span=span), self.probe.scored + max(0, share), finder.steps)
            if trail is not None:
                found.append((trail.ids.tolist(), self._proven(trail.ids)))
        return self._answer(found, len(rows.states), finder.steps)

    def _proven(self, ids: Tensor) -> bool:
        return self.judge.proves(self.probe, ids) and not any(e.contradicts(self.probe, ids) for e in self.witnesses)

    def _answer(self, found: list[tuple[list[int], bool]], rows: int, steps: int) -> Reconstruction:
        """Proven texts first, no text twice, no more than there are."""
        unique = list(dict.fromkeys((tuple(ids), sure) for ids, sure in sorted(found, key=lambda f: not f[1])))
        unique = unique[: self.seen.disclosed.sequences]
        covered = sum(len(ids) for ids, sure in unique if sure)
        notes: dict[str, Any] = {
            "weight": self.judge.site.name,
            "rank": self.judge.span.rank,
            "rows": rows,
            "explained": covered,
            "complete": covered == self.judge.span.rank,
        }
        sure = [certain for _, certain in unique]
        return Reconstruction([list(ids) for ids, _ in unique], sure, steps, self.probe.scored, notes)


def _span_of_rows(rows: Tensor, *, blurred: bool) -> Span:
    """What one text's gradient would span, from its rows."""
    values, basis = torch.linalg.svd(rows, full_matrices=False)[1:]
    tail = EXACT**2 * float(rows.pow(2).sum(1).mean())
    return Span(basis, values, tail, rows.shape[1], blurred=blurred)
