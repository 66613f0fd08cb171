"""Batches of a decoder: a tree of prefixes, grown by every token whose state lies in the span.

A decoder's state depends on what is left of it alone, so texts are found from left to right, all of them at
once. Texts with the same beginning share its states, so the tree's nodes are the batch's distinct states: their
number is the rank of the gradient when the tree is complete. Its leaves are the texts. One text that is the
beginning of another leaves no trace of its own, and without absolute positions a text's first token looks the
same however often it is repeated: a leaf that could go on like that is not proven.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpguard.attacks.base import Budget
from dpguard.attacks.observation import Observation, Reconstruction
from dpguard.attacks.span_evidence import Evidence, gather, usable
from dpguard.attacks.span_exact import CONTEXT_FREE
from dpguard.attacks.span_guess import Guess, guess
from dpguard.attacks.span_picture import Album
from dpguard.attacks.span_rank import RESOLUTION
from dpguard.attacks.span_sites import CHUNK_TOKENS, Probe, Site, Sites
from dpguard.attacks.vocabulary import Frame

WITNESSES = 2
WIDTHS = (48, 400)
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
        table = self._table()
        if table is not None:
            for width in WIDTHS:
                self._grow(table.best(width))
        self._grow(None)
        return self._answer(others)

    def _table(self) -> Guess | None:
        """How badly each token fits at each position, where there are too many to try them all."""
        if len(self.tokens) <= FEW_TOKENS:
            return None
        length = min(self.judge.span.rank, self.probe.family.max_tokens(self.probe.config))
        return guess(self.judge, self.sites, self.album, length, self.tokens)

    def _nodes(self) -> int:
        return sum(map(len, self.children.values()))

    def _grow(self, likely: Tensor | None) -> None:
        """Add children to every prefix that has none, level by level, until the rank is reached."""
        level: list[tuple[int, ...]] = [()]
        longest = self.probe.family.max_tokens(self.probe.config)
        while level and len(level[0]) < longest:
            deeper = []
            for prefix in level:
                if not self.children.get(prefix) and self._nodes() < self.judge.span.rank:
                    self.children[prefix] = self._next(prefix, likely)
                deeper += [(*prefix, token) for token in self.children.get(prefix, [])]
            level = deeper

    def _next(self, prefix: tuple[int, ...], likely: Tensor | None) -> list[int]:
        """Tokens whose state after a prefix lies in the span and is nobody else's."""
        place = len(prefix)
        if place < len(self.frame.prefix):
            tokens = self.tokens.new_tensor([self.frame.prefix[place]])
        elif likely is None:
            tokens = torch.cat([self.tokens, self.tokens.new_tensor(self.frame.suffix)])
        elif place < len(likely):
            tokens = likely[place]
        else:
            return []
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
