"""Row by row: the MLP's output weight gives the hidden states themselves, not only their span.

The inputs of that layer are act(W h + b), far more numbers than the state h has, and nonlinear in it, so
almost no state other than the client's own lands in their span. Each state is found alone, by descent from
a random one: no text is needed for it, wrong starts drift to true states, and states already found are
taken out of the objective. A known state names its token and position through the linear picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpguard.attacks.span_evidence import Evidence
from dpguard.attacks.span_picture import Picture
from dpguard.attacks.span_ruler import Ruler, ruler
from dpguard.attacks.span_sites import Probe, Site
from dpguard.attacks.vocabulary import Frame

STARTS = 192
FIRST, HALF, SECOND, MORE = 20, 30, 40, 60
"""Adam steps from all starts, then from the better part of them, then from the best, and more where few arrive."""
PART = 0.4
"""The better part."""
LAST = 200
"""Steps that all states found take together in the end."""
FINALISTS = 3
"""Starts that go on, as a multiple of the text's length (at least `FEWEST`)."""
FEWEST = 40
SOLVED = 2e-3
"""Residual below which a descent has arrived (wrong ones stay above .005, true ones go on to zero)."""
ZERO = 1e-6
"""Residual at which a descent in single precision has nothing left to gain."""
DISTINCT = 0.25
"""Relative distance between two states that are not the same."""
MOST_ROUNDS = 8
SCREENED, NEAREST, AT_MOST = 48, 64, 2
"""Tokens that explain most of what no state explains yet, starts made of them, and places of one token among those."""
CHUNK = 4000
"""States that go through the activation together."""
SPREAD = 0.5
"""Random displacement of a start, in standard deviations of what context adds."""


@dataclass(frozen=True)
class Rows:
    """Hidden states of a text.

    Attributes:
        states: (k, d), in no order.
        picture: what they were looked for with.
        scale: its ruler.
    """

    states: Tensor
    picture: Picture
    scale: Ruler


@dataclass(frozen=True)
class _Ends:
    """Where descents from k states stand: residuals and goals (k,), displacements (k, d)."""

    residual: Tensor
    goal: Tensor
    shift: Tensor


class RowSolver:
    """Descends on states until their activations lie in the span.

    Args:
        probe: the model.
        evidence: of an MLP's output weight.
        seat: the MLP's first layer.
        act: its activation function.
        frame: special tokens, whose states are found first.
        rng: source of the starts.
    """

    def __init__(
        self,
        probe: Probe,
        evidence: Evidence,
        seat: Site,
        act: Callable[[Tensor], Tensor],
        frame: Frame,
        rng: torch.Generator,
    ) -> None:
        self.probe, self.evidence, self.seat, self.act, self.frame, self.rng = probe, evidence, seat, act, frame, rng
        self.steps = 0

    def solve(self, picture: Picture, tokens: Tensor, length: int, budget: int) -> Rows:
        """States of the text's content tokens, at most one each.

        Args:
            picture: of the seat.
            tokens: (n,) tokens that a text can contain, frequent ones first.
            length: tokens of the text.
            budget: most Adam steps.
        """
        scale = ruler(self.probe, picture, tokens, length)
        special = self._special(picture, scale, length).repeat(4, 1)
        found = self._round(special, scale, length, self._noise(len(special)), special[:0], budget)
        known = len(found)
        places = scale.places[len(self.frame.prefix) : length - len(self.frame.suffix)]
        typical = self._inside(scale.tokens + places.mean(0)) if len(places) else None
        for _ in range(MOST_ROUNDS):
            if len(found) >= self.evidence.span.rank or self.steps >= budget:
                break
            states = self._starts(scale, found, known, length, typical)
            found = self._round(states, scale, length, self._noise(len(states)), found, budget)
        return Rows(self._polished(found[known:], scale, budget), picture, scale)

    def _polished(self, found: Tensor, scale: Ruler, budget: int) -> Tensor:
        """The same states, closer: flat directions of the activation need longer."""
        if not len(found):
            return found
        shift = torch.zeros_like(found)
        ends = self._descend(found, scale, shift, None, min(LAST, budget - self.steps), 0.05, 0.0)
        return found + ends.shift @ scale.back

    def _noise(self, count: int) -> Tensor:
        width = self.evidence_width
        return SPREAD * torch.randn((count, width), generator=self.rng).to(self.probe.device)

    @property
    def evidence_width(self) -> int:
        """Numbers in a state."""
        weight = self.seat.layer.get_parameter("weight")
        return int(weight.shape[0] if self.seat.transposed else weight.shape[1])

    def _special(self, picture: Picture, scale: Ruler, length: int) -> Tensor:
        """States to expect of the special tokens around the text."""
        ids = self.frame.wrap([-1] * (length - self.frame.size))
        width = self.probe.embedding.shape[1]
        out = [picture.opening.float()] if self.frame.prefix else []
        for position, token in enumerate(ids):
            if token >= 0 and position > 0:
                out.append(self.probe.embedding[token] @ picture.weights[:width].float() + scale.places[position])
        return torch.stack(out) if out else scale.places[:0]

    def _starts(self, scale: Ruler, found: Tensor, known: int, length: int, typical: Tensor | None) -> Tensor:
        """Tokens at the positions that no state found so far claims: such as explain more of the rest of the span
        than others, and random ones, frequent ones more often.

        Args:
            scale: the picture.
            found: (k, d) states found so far.
            known: how many of them are those of special tokens.
            length: tokens of the text.
            typical: (n, r) coordinates in the span that each token has at no position in particular.
        """
        first = len(self.frame.prefix)
        free = set(range(first, length - len(self.frame.suffix)))
        for state in found[known:]:
            free.discard(int(scale.distances(state[None])[0].argmin()) % length)
        places = torch.tensor(sorted(free) or list(range(length)), device=self.probe.device)
        count = len(scale.tokens)
        near = self._nearest(scale, self._taken(found), places, typical)
        drawn = STARTS - len(near)
        rank = torch.rand(drawn, generator=self.rng).mul(math.log(count)).exp().long().clamp(1, count) - 1
        where = places[torch.randint(len(places), (drawn,), generator=self.rng).to(places.device)]
        return torch.cat([near, scale.tokens[rank.to(self.probe.device)] + scale.places[where]])

    def _nearest(self, scale: Ruler, taken: Tensor | None, places: Tensor, typical: Tensor | None) -> Tensor:
        """(s, d) predicted states whose activations reach furthest into what the states found leave of the span."""
        if typical is None:
            return scale.tokens[:0]
        tokens = _open_share(typical, taken).topk(min(SCREENED, len(typical)), largest=False).indices
        states = (scale.tokens[tokens, None] + scale.places[places]).flatten(0, 1)
        share = _open_share(self._inside(states), taken).reshape(len(tokens), len(places))
        best = share.topk(min(AT_MOST, len(places)), dim=1, largest=False)
        chosen = best.values.flatten().topk(min(NEAREST, best.values.numel()), largest=False).indices
        token = chosen // best.values.shape[1]
        return states[token * len(places) + best.indices.flatten()[chosen]]

    def _inside(self, states: Tensor) -> Tensor:
        """(n, r) coordinates in the span of the activations, of norm 1, of (n, d) states."""
        with torch.no_grad():
            parts = [self._unit(part) @ self.evidence.basis.T for part in states.split(CHUNK)]  # type: ignore[no-untyped-call]
        return torch.cat(parts)

    def _round(self, states: Tensor, scale: Ruler, length: int, noise: Tensor, found: Tensor, budget: int) -> Tensor:
        """The states found before and the new ones that a batch of starts leads to."""
        if not len(states):
            return found
        taken, few = self._taken(found), max(FEWEST, FINALISTS * length)
        last = self._descend(states, scale, noise, taken, min(FIRST, budget - self.steps), 0.3, 0.01)
        keep = last.goal.argsort()[: max(few, int(PART * len(states)))]
        states = states[keep]
        last = self._descend(states, scale, last.shift[keep], taken, min(HALF, budget - self.steps), 0.3, 0.01)
        keep = last.residual.argsort()[:few]
        states = states[keep]
        last = self._descend(states, scale, last.shift[keep], None, min(SECOND, budget - self.steps), 0.1, 0.0)
        if int((last.residual < SOLVED).sum()) < len(states) / 2:
            last = self._descend(states, scale, last.shift, None, min(MORE, budget - self.steps), 0.1, 0.0)
        ends, residual = states + last.shift @ scale.back, last.residual
        for index in residual.argsort().tolist():
            if float(residual[index]) > SOLVED or len(found) >= self.evidence.span.rank:
                break
            if not len(found) or float(torch.cdist(ends[index][None], found).min() / ends[index].norm()) > DISTINCT:
                found = torch.cat([found, ends[index][None]])
        return found

    def _unit(self, states: Tensor) -> Tensor:
        return torch.nn.functional.normalize(self.act(self.seat.layer(states)), dim=1)

    def _taken(self, found: Tensor) -> Tensor | None:
        """(t, r) orthonormal rows: which coordinates of the span the states found so far take up."""
        if not len(found):
            return None
        values, rows = torch.linalg.svd(self._inside(found), full_matrices=False)[1:]
        taken: Tensor = rows[values > 0.05 * values[0]]
        return taken

    def _descend(
        self, states: Tensor, scale: Ruler, start: Tensor, taken: Tensor | None, steps: int, rate: float, hold: float
    ) -> _Ends:
        """Adam from (k, d) states, all side by side.

        Args:
            states: what the picture predicts.
            scale: units of the displacement.
            start: (k, d) displacement at the start.
            taken: (t, r) coordinates of the span that are explained already.
            steps: Adam steps.
            rate: their size at the beginning; falls to a twentieth.
            hold: weight that holds a state to what the picture predicts; falls to 0.
        """
        shift = start.clone().requires_grad_(True)
        optimiser = torch.optim.Adam([shift], lr=rate, betas=(0.9, 0.99))
        residual = goal = torch.ones(len(states), device=states.device)
        for step in range(steps):
            left = 1 - step / steps
            optimiser.param_groups[0]["lr"] = rate * (0.05 + 0.95 * left)
            unit = self._unit(states + shift @ scale.back)
            inside = unit @ self.evidence.basis.T
            residual = 1 - inside.pow(2).sum(1)
            goal = residual if taken is None else _open_share(inside, taken)
            goal = goal + hold * left * shift.pow(2).mean(1)
            shift.grad = torch.autograd.grad(goal.sum(), shift)[0]
            optimiser.step()
            self.steps += 1
            if float(residual.detach().max()) < ZERO:
                break
        return _Ends(residual.detach(), goal.detach(), shift.detach())


def _open_share(inside: Tensor, taken: Tensor | None) -> Tensor:
    """(n,) part of (n, r) unit vectors' coordinates that no span holds, of what is not ``taken`` already."""
    outside = 1 - inside.pow(2).sum(1)
    share: Tensor = outside if taken is None else outside / (1.02 - (inside @ taken.T).pow(2).sum(1))
    return share
