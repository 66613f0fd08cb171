"""Batches of a decoder: a tree of prefixes, grown by every token whose state lies in the span.

A decoder's state depends on what is left of it alone, so texts are found from left to right, all of them at
once. Texts with the same beginning share its states, so the tree's nodes are the batch's distinct states: their
number is the rank of the gradient when the tree is complete. Its leaves are the texts. One text that is the
beginning of another leaves no trace of its own, and without absolute positions a text's first token looks the
same however often it is repeated: a leaf that could go on like that is not proven.
"""

from __future__ import annotations

import heapq
from typing import Any

import torch
from torch import Tensor

from dpguard.attacks.base import Budget
from dpguard.attacks.observation import Observation, Reconstruction
from dpguard.attacks.span_evidence import Evidence, gather, usable
from dpguard.attacks.span_exact import CONTEXT_FREE
from dpguard.attacks.span_guess import guess
from dpguard.attacks.span_picture import Album
from dpguard.attacks.span_rank import RESOLUTION
from dpguard.attacks.span_sites import CHUNK_TOKENS, Probe, Site, Sites
from dpguard.attacks.vocabulary import Frame

WITNESSES = 2
FIRST, SECOND = 48, 300
"""Tokens tried after every prefix, by how well they fit the position whatever is around; in the end all of them."""
SAME = 1e-4
"""Relative distance of two states that a message cannot tell apart."""
FEW_TOKENS = 2000
"""A vocabulary so small that all of it is tried at once."""


def tree_sites(seen: Observation, sites: Sites) -> tuple[list[Site], str]:
    """Weights that tell the states of a decoder's texts apart, or the reason why there is none."""
    inner, reason = usable(seen, sites)
    if reason:
        return [], reason
    whole = [s for s in inner if s.role not in {"query", "key"}]
    found = [s for s in whole if s.block > 0 or s.role not in CONTEXT_FREE]
    if not found:
        return [], (
            "several texts of a decoder need a weight that sees every token with what is left of it: a value, a fused "
            "qkv or an MLP weight behind the first block's attention"
        )
    return sorted(found, key=lambda s: (s.role in {"mlp_out", "attention_output"}, s.block)), ""


class TreeReader:
    """Reads one message of several texts of a decoder; `read` may be called once.

    Args:
        seen: what the adversary holds.
        probe: the model; counts candidates.
        sites: its layers.
        album: pictures, which say which tokens to try first.
        tokens: (n,) tokens that a text can contain.
        frame: special tokens around a text.
        budget: candidates to score.
    """

    def __init__(
        self, seen: Observation, probe: Probe, sites: Sites, album: Album, tokens: Tensor, frame: Frame, budget: Budget
    ) -> None:
        self.seen, self.probe, self.sites, self.album = seen, probe, sites, album
        self.tokens, self.frame, self.budget = tokens, frame, budget
        self.children: dict[tuple[int, ...], list[int]] = {}
        self.hidden: set[tuple[int, ...]] = set()
        self.states = torch.zeros(0, device=probe.device, dtype=torch.float64)

    def read(self) -> Reconstruction:
        """Propose the batch's texts."""
        evidence = gather(self.seen, tree_sites(self.seen, self.sites)[0], causal=True, most=WITNESSES)
        if not evidence:
            reason = "no span rises above rounding or noise: more tokens than the model is wide"
            return Reconstruction([], [], notes={"reason": reason})
        self.judge, others = evidence[0], evidence[1:]
        self.states = torch.zeros((0, self.judge.span.inputs), device=self.probe.device, dtype=torch.float64)
        self._grow(self._lists())
        return self._answer(others)

    def _lists(self) -> list[Tensor]:
        """Each (L, k): tokens to try at each position, likely ones first; the last list has all the others."""
        everything = torch.cat([self.tokens, self.tokens.new_tensor(self.frame.suffix)])
        length = min(self.judge.span.rank, self.probe.family.max_tokens(self.probe.config))
        few = len(everything) <= FEW_TOKENS
        table = None if few else guess(self.judge, self.sites, self.album, length, everything)
        if table is None:
            return [everything.expand(length, -1)]
        return list(table.best(len(everything)).split([FIRST, SECOND, len(everything) - FIRST - SECOND], dim=1))  # type: ignore[no-untyped-call]

    def _nodes(self) -> int:
        return sum(map(len, self.children.values()))

    def _grow(self, lists: list[Tensor]) -> None:
        """Try each list after every prefix, short lists and short prefixes first, until the rank is reached."""
        waiting: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, ())]
        while waiting and self._nodes() < self.judge.span.rank and self.probe.scored < self.budget.candidates:
            level, place, prefix = heapq.heappop(waiting)
            opening = place < len(self.frame.prefix)
            tokens = self.tokens.new_tensor(self.frame.prefix[place : place + 1]) if opening else lists[level][place]
            for token in self._next(prefix, tokens):
                self.children.setdefault(prefix, []).append(token)
                if place + 1 < len(lists[0]):
                    heapq.heappush(waiting, (0, place + 1, (*prefix, token)))
            if level + 1 < len(lists) and not opening:
                heapq.heappush(waiting, (level + 1, place, prefix))

    def _next(self, prefix: tuple[int, ...], tokens: Tensor) -> list[int]:
        """Those of some tokens whose state after a prefix lies in the span and is nobody else's."""
        place = len(prefix)
        found: list[int] = []
        for part in tokens.split(max(1, CHUNK_TOKENS // (place + 1))):  # type: ignore[no-untyped-call]
            part = part[: max(0, self.budget.candidates - self.probe.scored)]
            if not len(part):
                break
            texts = torch.cat([self.tokens.new_tensor(prefix).expand(len(part), -1), part[:, None]], dim=1)
            states = self.probe.states(self.judge.site.layer, texts)[:, -1].double()
            for k in self._true(states).nonzero().flatten().tolist():
                if self._is_new(states[k]):
                    self.states = torch.cat([self.states, states[k][None]])
                    found.append(int(part[k]))
                else:
                    self.hidden.add(prefix)
        return found

    def _true(self, states: Tensor) -> Tensor:
        """(n,) bool: states that are the client's as far as the message can tell."""
        residual, allowed = self.judge.span.outside(states)
        return residual <= (allowed.clamp_min(RESOLUTION) if self.judge.span.blurred else allowed.clamp_max(RESOLUTION))

    def _is_new(self, state: Tensor) -> bool:
        """Whether no node has this state; without absolute positions a repeated first token has its state twice."""
        return not bool(((self.states - state).norm(dim=1) < SAME * state.norm()).any())

    def _answer(self, others: list[Evidence]) -> Reconstruction:
        """The leaves; proven when the tree is complete and no other weight contradicts."""
        leaves = [
            (*prefix, token)
            for prefix, tokens in self.children.items()
            for token in tokens
            if not self.children.get((*prefix, token))
        ][: self.seen.disclosed.sequences]
        complete = self._nodes() == self.judge.span.rank
        certain = [complete and leaf not in self.hidden and self._proven(leaf, others) for leaf in leaves]
        notes: dict[str, Any] = {
            "weight": self.judge.site.name,
            "rank": self.judge.span.rank,
            "explained": self._nodes(),
            "complete": complete,
        }
        return Reconstruction([list(leaf) for leaf in leaves], certain, 0, self.probe.scored, notes)

    def _proven(self, leaf: tuple[int, ...], others: list[Evidence]) -> bool:
        ids = self.tokens.new_tensor(leaf)
        states = self.judge.vectors(self.probe.states(self.judge.site.layer, ids[None])[0])
        return self.judge.span.holds(states) and not any(e.contradicts(self.probe, ids) for e in others)
