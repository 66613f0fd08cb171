"""Exact tests, token by token: the first block's inputs know no context, a decoder's know only the left."""

from __future__ import annotations

import torch
from torch import Tensor

from dpguard.attacks.span_evidence import Evidence
from dpguard.attacks.span_guess import Guess
from dpguard.attacks.span_sites import CHUNK_TOKENS, Probe
from dpguard.attacks.vocabulary import Frame
from dpguard.inputs.family import slots

CONTEXT_FREE = frozenset({"query", "key", "value", "qkv"})
FINALISTS = 4
SHORTLIST = 64


def is_context_free(evidence: Evidence, frame: Frame) -> bool:
    """Whether the evidence is about embeddings alone: the first block's attention, with a known first token
    where differences from it are what the span holds."""
    site = evidence.site
    return site.block == 0 and site.role in CONTEXT_FREE and (evidence.first == 0 or bool(frame.prefix))


def first_block(probe: Probe, evidence: Evidence, texts: Tensor, frame: Frame) -> Tensor:
    """(L,) at each position the token of (k, L) texts whose embedding lies in the span.

    A text shows a candidate at every position at once, because embeddings know no context; the test is one
    product with the span's basis, so it is not counted as a candidate text.
    """
    opening = frame.prefix[0] if evidence.first else -1
    scored = probe.scored
    best: list[tuple[Tensor, Tensor]] = []
    for part in texts.split(max(1, CHUNK_TOKENS // texts.shape[1])):  # type: ignore[no-untyped-call]
        if evidence.first:
            part = torch.cat([torch.full_like(part[:, :1], opening), part[:, 1:]], dim=1)
        residual = evidence.residuals(probe.states(evidence.site.layer, part))
        low = residual.topk(min(FINALISTS, len(part)), dim=0, largest=False)
        best.append((low.values, part.gather(0, low.indices)))
    values, names = torch.cat([v for v, _ in best]), torch.cat([n for _, n in best])
    finalists = names.gather(0, values.topk(min(FINALISTS, len(values)), dim=0, largest=False).indices)
    exact = evidence.span.outside(evidence.vectors(probe.states(evidence.site.layer, finalists)))[0]
    chosen = torch.nn.functional.pad(exact, (evidence.first, 0)).argmin(dim=0)
    probe.scored = scored
    return finalists.gather(0, chosen[None])[0]


def left_to_right(
    probe: Probe, evidence: Evidence, length: int, tokens: Tensor, frame: Frame, guess: Guess | None, limit: int
) -> Tensor:
    """(L,) a decoder's text, prefix by prefix: the next token is the one whose own state lies in the span.

    Args:
        probe: the model; counts candidates.
        evidence: of a weight that testifies about every position.
        length: tokens of the text.
        tokens: (n,) tokens that a text can contain.
        frame: special tokens around a text.
        guess: a table that decides which tokens are tried first.
        limit: value of ``probe.scored`` at which to stop looking beyond the shortlist.
    """
    text = torch.zeros(length, dtype=torch.int64, device=probe.device)
    words = frame.wrap([-1] * max(0, length - frame.size))
    rotary = not any(slot.role == "position_embedding" for slot in slots(probe.model))
    likely = guess.best(SHORTLIST) if guess is not None else None
    for position in range(length):
        if words[position] >= 0:
            text[position] = words[position]
            continue
        fresh = _adding(tokens, text[:position]) if rotary else tokens
        short = fresh[:SHORTLIST] if likely is None else _adding(likely[position], text[: position if rotary else 0])
        found, fits = _next(probe, evidence, text[:position], short)
        if not fits and len(fresh) > len(short):
            room = max(0, limit - probe.scored)
            other, other_fits = _next(probe, evidence, text[:position], fresh[:room] if room else short)
            found = other if other_fits or not fits else found
        text[position] = found
    return text


def _adding(tokens: Tensor, prefix: Tensor) -> Tensor:
    """Tokens that can add to the rank: without position embeddings the first token again has the state it had."""
    return tokens[tokens != prefix[0]] if len(prefix) and bool((prefix == prefix[0]).all()) else tokens


def _next(probe: Probe, evidence: Evidence, prefix: Tensor, tokens: Tensor) -> tuple[int, bool]:
    """The token that fits best after a prefix, and whether it fits to the message's precision."""
    texts = torch.cat([prefix.expand(len(tokens), -1), tokens[:, None]], dim=1)
    residuals = []
    for part in texts.split(max(1, CHUNK_TOKENS // texts.shape[1])):  # type: ignore[no-untyped-call]
        last = probe.states(evidence.site.layer, part)[:, -1]
        residuals.append(torch.stack(evidence.span.outside(last)))
    outside, allowed = torch.cat(residuals, dim=1)
    best = int(outside.argmin())
    return int(tokens[best]), bool(outside[best] <= allowed[best])
