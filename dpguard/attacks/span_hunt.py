"""One text from one weight's span: exact tests where they exist, else guess, search, refine and relax in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpguard.attacks.base import Budget
from dpguard.attacks.span_evidence import Evidence
from dpguard.attacks.span_exact import first_block, is_context_free, left_to_right
from dpguard.attacks.span_guess import Guess, activation, guess, seat_of
from dpguard.attacks.span_picture import Album, fit
from dpguard.attacks.span_relax import relax
from dpguard.attacks.span_rows import Rows, RowSolver
from dpguard.attacks.span_search import Search, Trail
from dpguard.attacks.span_shift import realign
from dpguard.attacks.span_sites import Probe, Sites
from dpguard.attacks.span_slope import STEEP, steepest
from dpguard.attacks.vocabulary import Frame, TokenTable

SUBSTITUTES = 80
ROUNDS = 8
NEAR = 0.1
"""Mean residual below which a text is near enough to look for shifts and by the derivative."""
PATIENCE = 3
"""Rounds before the continuous search is asked for new starts."""
SHORT = 8
"""Tokens up to which a search is quicker than a refined picture."""
NEARBY = 160
"""Texts near the best one that a picture is refined on."""
JITTER = 0.5
"""Noise on the starts of the continuous search, relative to an embedding's norm."""
PICTURES = 8
"""Pictures of mixtures, each refined around what the one before it led to."""
SLOW = 0.9
"""Energy relative to the picture's before, above which the continuous search has its turn."""
FEW_TOKENS = 5000
"""A vocabulary so small that a decoder's next token is found by trying all of it."""


@dataclass
class Case:
    """Everything about one reconstruction that its steps share."""

    probe: Probe
    sites: Sites
    album: Album
    tokens: Tensor
    table: TokenTable
    frame: Frame
    rng: torch.Generator
    budget: Budget
    limit: int
    common: Sequence[int] = ()
    steps: int = 0

    def fixed(self, length: int) -> tuple[Tensor, Tensor]:
        """(L,) bool of the special positions, and (L,) ids with -1 elsewhere."""
        ids = torch.tensor(self.frame.wrap([-1] * (length - self.frame.size)), device=self.probe.device)
        return ids >= 0, ids

    def framed(self, texts: Tensor) -> Tensor:
        """(B, L) texts with the special tokens in their places."""
        held, ids = self.fixed(texts.shape[1])
        return torch.where(held, ids, texts)


def solve(case: Case, evidence: Evidence, length: int) -> Trail:
    """One weight, one length: exact tests where they exist, else guess, search, refine, relax."""
    held = case.fixed(length)[0]
    search = Search(case.probe, evidence, held, case.limit, case.common)
    if is_context_free(evidence, case.frame):
        return _embeddings(case, evidence, search, length)
    rows = _rows(case, evidence, length)
    first = guess(evidence, case.sites, case.album, length, case.tokens, rows=rows)
    if evidence.causal and evidence.first == 0:
        ids = left_to_right(case.probe, evidence, length, case.tokens, case.frame, first, case.limit)
        trail = search.start(ids[None])
        if trail.done:
            return trail
    return _hunt(case, evidence, search, length, first, rows)


def _embeddings(case: Case, evidence: Evidence, search: Search, length: int) -> Trail:
    """The first block: tokens that the picture finds likely, then, when they do not fit, all of them."""
    likely = guess(evidence, case.sites, case.album, length, case.tokens)
    trail: Trail | None = None
    if likely is not None:
        few = first_block(case.probe, evidence, likely.best(SUBSTITUTES).T, case.frame)
        trail = search.start(case.framed(few[None]))
    if trail is None or not trail.done:
        everything = case.tokens[:, None].expand(-1, length)
        trail = search.start(case.framed(first_block(case.probe, evidence, everything, case.frame)[None]))
    return trail


def _offer(search: Search, trail: Trail, texts: Tensor) -> None:
    """Go on from the best of (B, L) texts where it beats the trail."""
    _take(trail, search.start(texts))


def _take(trail: Trail, other: Trail) -> None:
    if other.done or other.energy < trail.energy:
        trail.move(other)


def _rows(case: Case, evidence: Evidence, length: int) -> Rows | None:
    """The text's hidden states, where the weight gives them one by one and a decoder is not quicker without."""
    seat = seat_of(evidence, case.sites, case.probe)
    if evidence.site.role != "mlp_out" or seat is None or seat is evidence.site:
        return None
    if evidence.causal and len(case.tokens) < FEW_TOKENS:
        return None
    solver = RowSolver(case.probe, evidence, seat, activation(case.probe.config), case.frame, case.rng)
    picture = case.album.picture(seat.name, seat.layer, length)
    found = solver.solve(picture, case.tokens, length, case.budget.steps - case.steps)
    case.steps += solver.steps
    return found


def _hunt(case: Case, evidence: Evidence, search: Search, length: int, table: Guess | None, rows: Rows | None) -> Trail:
    """Guess and search, then refine the picture around the best text, then relax, until certain or spent."""
    held = case.fixed(length)[0]
    if table is not None:
        likely, bag = table.best(SUBSTITUTES), table.bag(2 * length)
        trail = search.start(case.framed(torch.stack([table.text(), likely[:, 0]])))
    else:
        likely = case.tokens[torch.randint(len(case.tokens), (length, 1), generator=case.rng).to(case.tokens.device)]
        bag = likely[:, 0]
        trail = search.start(case.framed(likely[:, 0][None]))
        likely, bag = _relaxed(case, evidence, search, trail, likely, held)
    if table is not None and _is_mixture(case, evidence):
        trail, likely, bag = _repeated(case, evidence, search, trail, likely, bag)
    for turn in range(ROUNDS):
        if turn or length > SHORT:
            refined = None if trail.done else _refined(case, evidence, trail, likely, length, rows)
            if refined is not None:
                likely, bag = refined.best(SUBSTITUTES), refined.bag(2 * length)
                other = search.start(case.framed(torch.stack([refined.text(), likely[:, 0]])))
                if turn:  # a search that is stuck needs another way in, even one that begins worse
                    other = search.run(other, likely, bag, levels=1)
                _take(trail, other)
        trail = _edited(case, search, trail, likely, bag, turn)
        if trail.done or case.probe.scored >= case.limit:
            break
        if turn >= PATIENCE and case.steps < case.budget.steps:
            likely, bag = _relaxed(case, evidence, search, trail, likely, held)
            trail = search.run(trail, likely, bag, levels=2)
    return trail


def _edited(case: Case, search: Search, trail: Trail, likely: Tensor, bag: Tensor, turn: int) -> Trail:
    """Words and their order; near the text also shifts, what the derivative asks for, and pieces; then farther."""
    trail = search.run(trail, likely, bag, levels=1)
    while turn and not trail.done and case.probe.scored < case.limit:
        near, before = float(trail.rows.mean()) < NEAR, trail.energy
        if not near and turn < PATIENCE:
            return trail  # another picture leads nearer than a long search here
        if near and not realign(search, trail, case.tokens):
            steep = steepest(case.probe, search.evidence, trail.ids, case.tokens, STEEP)
            trail = search.polish(trail, steep, few=STEEP, rounds=1)
            if trail.energy == before:
                search.relocate(trail)
        trail = search.run(trail, likely, bag, levels=1 if trail.energy < before else 2)
        if trail.energy == before:
            break
    return search.run(trail, likely, bag, levels=1 + turn) if turn > 1 else trail


def _is_mixture(case: Case, evidence: Evidence) -> bool:
    """Whether the picture is of mixtures, in which the words around a token weigh as much as the token."""
    return evidence.site.role == "attention_output" and seat_of(evidence, case.sites, case.probe) is evidence.site


def _repeated(
    case: Case, evidence: Evidence, search: Search, trail: Trail, likely: Tensor, bag: Tensor
) -> tuple[Trail, Tensor, Tensor]:
    """Refine the picture and substitute in turns: every right word makes the next picture sharper."""
    length, held = len(trail.ids), case.fixed(len(trail.ids))[0]
    for _ in range(PICTURES):
        refined = None if trail.done else _refined(case, evidence, trail, likely, length, None)
        if refined is None or case.probe.scored >= case.limit:
            break
        before, likely, bag = trail.energy, refined.best(SUBSTITUTES), refined.bag(2 * length)
        other = search.start(case.framed(torch.stack([refined.text(), likely[:, 0]])))
        _take(trail, search.polish(other, likely))
        if trail.energy > SLOW * before and case.steps < case.budget.steps:  # some words only their neighbours show
            likely, bag = _relaxed(case, evidence, search, trail, likely, held)
            trail = search.polish(trail, likely)
    return trail, likely, bag


def _refined(
    case: Case, evidence: Evidence, trail: Trail, likely: Tensor, length: int, rows: Rows | None
) -> Guess | None:
    """A guess from a picture of texts near the best one: same length, mostly the same words."""
    seat = seat_of(evidence, case.sites, case.probe)
    if seat is None:
        return None
    words = likely[:, : min(24, likely.shape[1])]
    pick = torch.randint(words.shape[1], (NEARBY, length), generator=case.rng).to(words.device)
    other = words[torch.arange(length, device=words.device), pick]
    stay = (torch.rand((NEARBY, length), generator=case.rng) < 0.6).to(words.device)
    texts = case.framed(torch.where(stay, trail.ids, other))
    scored = case.probe.scored
    prior = case.album.picture(seat.name, seat.layer, length)
    picture = fit(case.probe, seat.layer, texts.tolist(), case.album.table, prior)
    case.probe.scored = scored + NEARBY
    return guess(evidence, case.sites, case.album, length, case.tokens, picture=picture, rows=rows)


def _relaxed(
    case: Case, evidence: Evidence, search: Search, trail: Trail, likely: Tensor, held: Tensor
) -> tuple[Tensor, Tensor]:
    """New substitutes and bag from a continuous search around the best text; the trail takes a better start."""
    embedding = case.probe.embedding
    size = case.budget.restarts
    unit = case.table.mean_norm / embedding.shape[1] ** 0.5
    shaky = (trail.rows / trail.rows.max().clamp_min(1e-9)).clamp(0.1, 1)[None, :, None]
    noise = torch.randn((size, len(trail.ids), embedding.shape[1]), generator=case.rng).to(embedding.device)
    start = embedding[trail.ids] * (1 - shaky * JITTER) + noise * unit * shaky * 2 * JITTER
    start = torch.where(held[None, :, None], embedding[trail.ids], start)
    steps = min(200, case.budget.steps - case.steps)
    found, taken = relax(case.probe, evidence, start, held, steps=steps)
    case.steps += taken
    near = case.table.nearest(found, 8)
    texts = case.framed(near[:, :, 0])
    _offer(search, trail, texts)
    mixed = torch.cat([near.permute(1, 2, 0).flatten(1), likely], dim=1)
    return mixed[:, : SUBSTITUTES + 24], torch.unique(near[:, :, 0])
