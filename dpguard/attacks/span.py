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

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpguard.attacks.base import Budget, Capability
from dpguard.attacks.observation import Observation, Reconstruction
from dpguard.attacks.presets import choose
from dpguard.attacks.span_batch import BatchReader, batch_reason
from dpguard.attacks.span_evidence import Evidence, gather, usable
from dpguard.attacks.span_hunt import Case, solve
from dpguard.attacks.span_last import with_last_tokens
from dpguard.attacks.span_middle import MiddleReader, middle_reason
from dpguard.attacks.span_order import read_order
from dpguard.attacks.span_pairs import PairReader, pairs_site
from dpguard.attacks.span_picture import Album
from dpguard.attacks.span_search import Trail
from dpguard.attacks.span_sites import Probe, Site, left_as_found, sites_of
from dpguard.attacks.span_tree import TreeReader, tree_sites
from dpguard.attacks.vocabulary import TokenTable, allowed_tokens, frame_of
from dpguard.inputs.family import predicts_tokens, slots

KINDS = ("gradient", "delta")
WITNESSES = 3
"""Weights whose spectrum is computed: one to search with, the others to try next and to confirm."""
COMMON = 16
"""Words frequent in public texts that are tried in any place."""
PUBLIC = 400
"""Public texts that a picture may be fitted on."""


class Span:
    """See the module's text."""

    name = "span"
    cite = (
        "any depth, batches and certificate: this project; the span test of the first two layers: DAGER, "
        "arXiv 2405.15586"
    )
    capability = Capability(
        "the weight of a linear layer of an inner block, or LoRA's A or B",
        "read a last block under a class head (rank = texts) or noise above the singular values; prove more tokens "
        "than the width",
        kinds=("gradient", "delta"),
    )
    presets = {"default": Budget(steps=2000, candidates=20000, restarts=8), "quick": Budget(700, 2500, 4)}  # noqa: RUF012

    def applicable(self, seen: Observation) -> str:
        """Empty when a weight of an inner block that the attack can read is on the wire, else the reason."""
        told = seen.disclosed
        if told.kind not in KINDS:
            return f"needs a gradient or a change of weights, the message is {told.kind!r}"
        if told.texts != 1:
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
            if case.probe.family.causal and seen.disclosed.texts != 1 and not contextual:
                return PairReader(seen, case.probe, case.sites, case.tokens, case.frame).read()
            if contextual:
                found = TreeReader(seen, case.probe, case.sites, case.tokens, case.frame, budget, rng).read()
                if seen.disclosed.texts != 1 or any(found.certain) or found.notes.get("complete"):
                    return found
                case.probe.scored = found.candidates  # the search goes on with what the budget has left
            ordered = read_order(seen, case.probe, case.sites, case.tokens, case.frame, budget)
            if ordered is not None:
                return ordered
            if seen.disclosed.texts != 1 or _rank_is_no_length(seen, case):
                if not batch_reason(seen):
                    return BatchReader(seen, rng, budget).read()
                alone = replace(seen, disclosed=replace(seen.disclosed, lengths=None))
                single = partial(_single, case, alone)
                read = MiddleReader(seen, case.probe, case.sites, rng, budget, single).read()
                return replace(read, steps=max(read.steps, case.steps))
            sites = usable(seen, case.sites)[0]
            evidence = gather(seen, sites, causal=case.probe.family.causal, most=WITNESSES)
            return (
                _judge(case, seen, evidence) if evidence else Reconstruction([], [], notes={"reason": _silent(sites)})
            )


PLUGIN = Span()


def _rank_is_no_length(seen: Observation, case: Case) -> bool:
    """Whether one text is better read as a batch of unknown size: local steps raise the rank above its length."""
    return seen.disclosed.kind == "delta" and not case.probe.family.causal and not batch_reason(seen)


def _case(seen: Observation, rng: torch.Generator, budget: Budget) -> Case:
    probe = Probe(seen.model)
    tokenizer = seen.disclosed.tokenizer
    allowed = allowed_tokens(tokenizer, len(probe.embedding), unknown=True)
    tokens, frame = allowed.nonzero().flatten().to(probe.device), frame_of(tokenizer)
    encoded = [tokenizer(text)["input_ids"] for text in seen.disclosed.public_texts[:PUBLIC]]
    public = [ids for ids in encoded if ids and max(ids) < len(allowed)]
    album = Album(probe, tokens, frame, public, _positions(probe))
    return Case(
        probe, sites_of(seen.model), album, tokens, TokenTable(probe.embedding, tokenizer), frame, rng, budget,
        budget.candidates, _common(public, allowed),
    )  # fmt: skip


def _common(public: list[list[int]], allowed: Tensor) -> list[int]:
    """The words that are most frequent in public texts."""
    counts = Counter(token for ids in public for token in ids if bool(allowed[token]))
    return [token for token, _ in counts.most_common(COMMON)]


def _positions(probe: Probe) -> Tensor:
    """(P, p) position embeddings; p = 0 for a model that has none."""
    for slot in slots(probe.model):
        if slot.role == "position_embedding":
            return probe.model.get_parameter(slot.name).detach()
    return torch.zeros((int(probe.config.max_position_embeddings), 0), device=probe.device)


def _judge(case: Case, seen: Observation, evidence: list[Evidence]) -> Reconstruction:
    """Read the weights one after the other until one is certain; let the others confirm."""
    best: tuple[Trail, Evidence] | None = None
    for index, witness in enumerate(evidence[:2]):
        rest = max(0, case.budget.candidates - case.probe.scored)
        case.limit = case.probe.scored + (rest if index or len(evidence) == 1 else rest // 2)
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


def _single(case: Case, seen: Observation, evidence: Evidence, limit: int, steps: int) -> Trail | None:
    """One text of a batch, from evidence about it alone, up to a number of candidates, after steps spent before."""
    case.limit, case.steps = limit, max(case.steps, steps)
    return _read(case, seen, evidence)


def _silent(sites: list[Site]) -> str:
    """Why no weight has a span."""
    if any(site.adapter for site in sites):
        return "the text has as many tokens as LoRA's rank, or more, or noise hides the spectrum of its matrices"
    return "no shared weight has a spectrum that rises above its noise or rounding with room to test in"


def _order_unproven(model: nn.Module) -> bool:
    """Without position embeddings repeated words and the first block's inputs fit the span in more than one order.

    A text may well be right there, and is never called certain.
    """
    return not any(slot.role == "position_embedding" for slot in slots(model))


def _read(case: Case, seen: Observation, evidence: Evidence) -> Trail | None:
    """The best text for one weight over the lengths that its rank allows."""
    unseen = 1 if predicts_tokens(seen.model) else 0  # no layer sees the last token, which is only predicted
    lengths = [length - unseen for length in seen.disclosed.lengths or ()] or evidence.lengths
    most = case.probe.family.max_tokens(case.probe.config)
    best: Trail | None = None
    for length in lengths:
        if not case.frame.size < length <= most:
            continue
        trail = solve(case, evidence, length)
        if best is None or trail.done or trail.energy < best.energy:
            best = trail
        if best.done:
            break
    return best
