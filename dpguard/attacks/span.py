"""The span attack: shared linear weights of inner blocks say which hidden vectors were the client's.

The gradient of a linear layer has the span of the layer's inputs as its row space (arXiv 2405.15586 uses
that for the first two layers). Batches are read whole: encoders from the first block (`span_batch`), decoders
prefix by prefix, one text or many (`span_tree`; last tokens under a next-token loss by `span_last`, the first
block's values of rotary decoders by `span_order`, batches from a first block's fused qkv by `span_pairs`).

One text needs one weight of any inner block, and neither its label nor its length: the rank gives the length; a
linear picture of the layer's inputs (`span_picture`) guesses token and position without a search; a discrete
search (`span_search`) ends where every state lies in the span to the precision of the message, which no other
text does, so that the attack knows when it is right; a continuous search (`span_relax`) gives new starts when
it is stuck. The first block's attention inputs need no search (`span_exact`).

The change of weights after local steps is read like a gradient whose precision its own spectrum shows; an
average over clients is read as the batch of all their texts. Nothing is certain after local steps.

What it cannot use: the final block under a classification head (rank of the batch), pruned or rounded
weights (full rank), and noise above the signal's singular values (it says so and proposes nothing).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpguard.attacks.base import Budget, Capability
from dpguard.attacks.observation import Observation, Reconstruction
from dpguard.attacks.presets import choose
from dpguard.attacks.span_batch import BatchReader, batch_reason
from dpguard.attacks.span_evidence import Evidence, gather, usable
from dpguard.attacks.span_exact import first_block, is_context_free, left_to_right
from dpguard.attacks.span_guess import Guess, activation, guess, seat_of
from dpguard.attacks.span_last import with_last_tokens
from dpguard.attacks.span_middle import MiddleReader, middle_reason
from dpguard.attacks.span_order import read_order
from dpguard.attacks.span_pairs import PairReader, pairs_site
from dpguard.attacks.span_picture import Album, fit
from dpguard.attacks.span_relax import relax
from dpguard.attacks.span_rows import RowSolver
from dpguard.attacks.span_search import Search, Trail
from dpguard.attacks.span_sites import Probe, Site, Sites, left_as_found, sites_of
from dpguard.attacks.span_tree import TreeReader, tree_sites
from dpguard.attacks.vocabulary import Frame, TokenTable, allowed_tokens, frame_of
from dpguard.inputs.family import slots

KINDS = ("gradient", "delta")
WITNESSES = 3
"""Weights whose spectrum is computed: one to search with, the others to try next and to confirm."""
SUBSTITUTES = 80
ROUNDS = 8
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
PUBLIC = 400
"""Public texts that a picture may be fitted on."""
FEW_TOKENS = 5000
"""A vocabulary so small that a decoder's next token is found by trying all of it."""


@dataclass
class _Case:
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
    steps: int = 0

    def fixed(self, length: int) -> tuple[Tensor, Tensor]:
        """(L,) bool of the special positions, and (L,) ids with -1 elsewhere."""
        ids = torch.tensor(self.frame.wrap([-1] * (length - self.frame.size)), device=self.probe.device)
        return ids >= 0, ids

    def framed(self, texts: Tensor) -> Tensor:
        """(B, L) texts with the special tokens in their places."""
        held, ids = self.fixed(texts.shape[1])
        return torch.where(held, ids, texts)


class Span:
    """See the module's text."""

    name = "span"
    cite = (
        "any depth, batches and certificate: this project; the span test of the first two layers: DAGER, "
        "arXiv 2405.15586"
    )
    capability = Capability(
        "the weight of a linear layer of an inner block, or LoRA's A",
        "read a last block under a class head (rank = texts), noise above the singular values, tokens beyond the width",
        kinds=("gradient", "delta"),
    )
    presets = {"default": Budget(steps=2000, candidates=20000, restarts=8), "quick": Budget(700, 2500, 4)}  # noqa: RUF012

    def applicable(self, seen: Observation) -> str:
        """Empty when a weight of an inner block that the attack can read is on the wire, else the reason."""
        told = seen.disclosed
        if told.kind not in KINDS:
            return f"needs a gradient or a change of weights, the message is {told.kind!r}"
        if told.sequences != 1:
            with left_as_found(seen.model):
                probe, sites = Probe(seen.model), sites_of(seen.model)
                if probe.family.causal:
                    return "" if pairs_site(seen, probe, sites) else tree_sites(seen, sites)[1]
                reason = batch_reason(seen)
                return reason and _or_middle(reason, middle_reason(seen))
        return usable(seen, sites_of(seen.model))[1]

    def reconstruct(
        self, seen: Observation, *, rng: torch.Generator, budget: Budget | None = None, preset: str = ""
    ) -> Reconstruction:
        """Propose the texts behind a message; see `base.Attack`."""
        budget = choose(self.name, self.presets, preset, budget)[1]
        with left_as_found(seen.model):
            case = _case(seen, rng, budget)
            contextual = case.probe.family.causal and not tree_sites(seen, case.sites)[1]
            if case.probe.family.causal and seen.disclosed.sequences != 1 and not contextual:
                return PairReader(seen, case.probe, case.sites, case.tokens, case.frame).read()
            if contextual:
                found = TreeReader(seen, case.probe, case.sites, case.tokens, case.frame, budget, rng).read()
                if seen.disclosed.sequences != 1 or any(found.certain):
                    return found
            ordered = read_order(seen, case.probe, case.sites, case.tokens, case.frame, budget)
            if ordered is not None:
                return ordered
            if seen.disclosed.sequences != 1 or _rank_is_no_length(seen, case):
                if not batch_reason(seen):
                    return BatchReader(seen, rng, budget).read()
                alone = replace(seen, disclosed=replace(seen.disclosed, lengths=None))
                single = partial(_single, case, alone)
                return MiddleReader(seen, case.probe, case.sites, rng, budget, single).read()
            sites = usable(seen, case.sites)[0]
            evidence = gather(seen, sites, causal=case.probe.family.causal, most=WITNESSES)
            return (
                _judge(case, seen, evidence) if evidence else Reconstruction([], [], notes={"reason": _silent(sites)})
            )


PLUGIN = Span()


def _rank_is_no_length(seen: Observation, case: _Case) -> bool:
    """Whether one text is better read as a batch of unknown size: local steps raise the rank above its length."""
    return seen.disclosed.kind == "delta" and not case.probe.family.causal and not batch_reason(seen)


def _case(seen: Observation, rng: torch.Generator, budget: Budget) -> _Case:
    probe = Probe(seen.model)
    tokenizer = seen.disclosed.tokenizer
    allowed = allowed_tokens(tokenizer, len(probe.embedding))
    if tokenizer.unk_token_id is not None:
        allowed[tokenizer.unk_token_id] = True  # what the tokenizer makes of a word it cannot spell
    tokens, frame = allowed.nonzero().flatten().to(probe.device), frame_of(tokenizer)
    public = [tokenizer(text)["input_ids"] for text in seen.disclosed.public_texts[:PUBLIC]]
    album = Album(probe, tokens, frame, public, _positions(probe))
    return _Case(
        probe, sites_of(seen.model), album, tokens, TokenTable(probe.embedding, tokenizer), frame, rng, budget,
        budget.candidates,
    )  # fmt: skip


def _positions(probe: Probe) -> Tensor:
    """(P, p) position embeddings; p = 0 for a model that has none."""
    for slot in slots(probe.model):
        if slot.role == "position_embedding":
            return probe.model.get_parameter(slot.name).detach()
    return torch.zeros((int(probe.config.max_position_embeddings), 0), device=probe.device)


def _judge(case: _Case, seen: Observation, evidence: list[Evidence]) -> Reconstruction:
    """Read the weights one after the other until one is certain; let the others confirm."""
    best: tuple[Trail, Evidence] | None = None
    for index, witness in enumerate(evidence[:2]):
        case.limit = case.budget.candidates if index or len(evidence) == 1 else case.budget.candidates // 2
        trail = _read(case, seen, witness)
        if trail is not None and (best is None or trail.certain or trail.energy < best[0].energy):
            best = trail, witness
        if best is not None and best[0].certain:
            break
    if best is None:
        reason = "the rank fits no text of this model: more tokens than inputs, or fewer than the special tokens"
        return Reconstruction([], [], candidates=case.probe.scored, notes={"reason": reason})
    trail, witness = best
    scored = case.probe.scored
    others = [e for e in evidence if e is not witness]
    notes: dict[str, Any] = {
        "weight": witness.site.name,
        "rank": witness.span.rank,
        "residual": float(trail.rows.max().clamp_min(0)) if trail.worst == 1.0 else trail.worst,
        "witnesses": len(evidence),
    }
    certain = trail.certain and not any(e.contradicts(case.probe, trail.ids, len(trail.ids)) for e in others)
    certain = certain and not _order_unproven(seen.model)
    texts, flags = with_last_tokens(seen, witness.site, [trail.ids.tolist()], [certain], case.tokens, notes)
    return Reconstruction(texts, flags, case.steps, scored, notes)


def _or_middle(first: str, middle: str) -> str:
    """Empty when another block's weights can be read instead, else both reasons."""
    return middle and f"{first}; {middle}"


def _single(case: _Case, seen: Observation, evidence: Evidence, limit: int) -> Trail | None:
    """One text of a batch, from evidence about it alone, up to a number of candidates."""
    case.limit = limit
    return _read(case, seen, evidence)


def _silent(sites: list[Site]) -> str:
    """Why no weight has a span."""
    if any(site.adapter for site in sites):
        return "the text has as many tokens as LoRA's A matrices have rows, or more, or noise hides their spectrum"
    return "no shared weight has a spectrum that rises above its noise or rounding with room to test in"


def _order_unproven(model: nn.Module) -> bool:
    """Without position embeddings repeated words and the first block's inputs fit the span in more than one order.

    A text may well be right there, and is never called certain.
    """
    return not any(slot.role == "position_embedding" for slot in slots(model))


def _read(case: _Case, seen: Observation, evidence: Evidence) -> Trail | None:
    """The best text for one weight over the lengths that its rank allows."""
    told = seen.disclosed.lengths
    lengths = list(told) if told else evidence.lengths
    most = case.probe.family.max_tokens(case.probe.config)
    best: Trail | None = None
    for length in lengths:
        if not case.frame.size < length <= most:
            continue
        trail = _solve(case, evidence, length)
        if best is None or trail.done or trail.energy < best.energy:
            best = trail
        if best.done:
            break
    return best


def _solve(case: _Case, evidence: Evidence, length: int) -> Trail:
    """One weight, one length: exact tests where they exist, else guess, search, refine, relax."""
    held = case.fixed(length)[0]
    search = Search(case.probe, evidence, held, case.limit)
    if is_context_free(evidence, case.frame):
        return _embeddings(case, evidence, search, length)
    states = _states(case, evidence, length)
    first = guess(evidence, case.sites, case.album, length, case.tokens, states=states)
    if evidence.causal and evidence.first == 0:
        ids = left_to_right(case.probe, evidence, length, case.tokens, case.frame, first, case.limit)
        trail = search.start(ids[None])
        if trail.done:
            return trail
    return _hunt(case, evidence, search, length, first, states)


def _embeddings(case: _Case, evidence: Evidence, search: Search, length: int) -> Trail:
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


def _states(case: _Case, evidence: Evidence, length: int) -> Tensor | None:
    """The text's hidden states, where the weight gives them one by one and a decoder is not quicker without."""
    seat = seat_of(evidence, case.sites, case.probe)
    if evidence.site.role != "mlp_out" or seat is None or (evidence.causal and len(case.tokens) < FEW_TOKENS):
        return None
    solver = RowSolver(case.probe, evidence, seat, activation(case.probe.config), case.frame, case.rng)
    picture = case.album.picture(seat.name, seat.layer, length)
    found = solver.solve(picture, case.tokens, length, case.budget.steps - case.steps)
    case.steps += solver.steps
    return found


def _hunt(
    case: _Case, evidence: Evidence, search: Search, length: int, table: Guess | None, states: Tensor | None
) -> Trail:
    """Guess and search, then refine the picture around the best text, then relax, until certain or spent."""
    held = case.fixed(length)[0]
    if table is not None:
        likely, bag = table.best(SUBSTITUTES), table.bag(2 * length)
        trail = search.start(case.framed(torch.stack([table.text(), likely[:, 0]])))
    else:
        likely = case.tokens[torch.randint(len(case.tokens), (length, 1), generator=case.rng)]
        bag = likely[:, 0]
        trail = search.start(case.framed(likely[:, 0][None]))
        likely, bag = _relaxed(case, evidence, search, trail, likely, held)
    if table is not None and _is_mixture(case, evidence):
        trail, likely, bag = _repeated(case, evidence, search, trail, likely, bag)
    for turn in range(ROUNDS):
        if turn or length > SHORT:
            refined = None if trail.done else _refined(case, evidence, trail, likely, length, states)
            if refined is not None:
                likely, bag = refined.best(SUBSTITUTES), refined.bag(2 * length)
                other = search.start(case.framed(torch.stack([refined.text(), likely[:, 0]])))
                if turn:  # a search that is stuck needs another way in, even one that begins worse
                    other = search.run(other, likely, bag, levels=1)
                _take(trail, other)
        trail = search.run(trail, likely, bag, levels=1 + turn)
        if trail.done or case.probe.scored >= case.limit:
            break
        if turn >= PATIENCE and case.steps < case.budget.steps:
            likely, bag = _relaxed(case, evidence, search, trail, likely, held)
            trail = search.run(trail, likely, bag, levels=2)
    return trail


def _is_mixture(case: _Case, evidence: Evidence) -> bool:
    """Whether the picture is of mixtures, in which the words around a token weigh as much as the token."""
    return evidence.site.role == "attention_output" and seat_of(evidence, case.sites, case.probe) is evidence.site


def _repeated(
    case: _Case, evidence: Evidence, search: Search, trail: Trail, likely: Tensor, bag: Tensor
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
    case: _Case, evidence: Evidence, trail: Trail, likely: Tensor, length: int, states: Tensor | None
) -> Guess | None:
    """A guess from a picture of texts near the best one: same length, mostly the same words."""
    seat = seat_of(evidence, case.sites, case.probe)
    if seat is None:
        return None
    rows = likely[:, : min(24, likely.shape[1])]
    pick = torch.randint(rows.shape[1], (NEARBY, length), generator=case.rng)
    other = rows[torch.arange(length), pick]
    stay = torch.rand((NEARBY, length), generator=case.rng) < 0.6
    texts = case.framed(torch.where(stay, trail.ids, other))
    scored = case.probe.scored
    prior = case.album.picture(seat.name, seat.layer, length)
    picture = fit(case.probe, seat.layer, texts.tolist(), case.album.table, prior)
    case.probe.scored = scored + NEARBY
    return guess(evidence, case.sites, case.album, length, case.tokens, picture=picture, states=states)


def _relaxed(
    case: _Case, evidence: Evidence, search: Search, trail: Trail, likely: Tensor, held: Tensor
) -> tuple[Tensor, Tensor]:
    """New substitutes and bag from a continuous search around the best text; the trail takes a better start."""
    embedding = case.probe.embedding
    size = case.budget.restarts
    unit = case.table.mean_norm / embedding.shape[1] ** 0.5
    shaky = (trail.rows / trail.rows.max().clamp_min(1e-9)).clamp(0.1, 1)[None, :, None]
    noise = torch.randn((size, len(trail.ids), embedding.shape[1]), generator=case.rng)
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
