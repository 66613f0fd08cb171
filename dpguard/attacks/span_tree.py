"""Decoders: a tree of prefixes, grown by every token whose state lies in the span.

A decoder's state depends on what is left of it alone, so texts are found from left to right, all of them at
once. Texts with the same beginning share its states, so the tree's nodes are the batch's distinct states: their
number is the rank of the gradient when the tree is complete. Its leaves are the texts. One text that is the
beginning of another leaves no trace of its own, and without absolute positions a text's first token looks the
same however often it is repeated: a leaf that could go on like that is not proven.

After every prefix the likeliest tokens are tried first (`span_screen`), each at the price of one position
(`span_cache`), in longer and longer lists until the rank is reached.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dpguard.attacks.base import Budget
from dpguard.attacks.observation import Observation, Reconstruction
from dpguard.attacks.span_cache import Extender
from dpguard.attacks.span_evidence import Evidence, gather, usable
from dpguard.attacks.span_exact import CONTEXT_FREE
from dpguard.attacks.span_last import with_last_tokens
from dpguard.attacks.span_rank import RESOLUTION
from dpguard.attacks.span_screen import Screen
from dpguard.attacks.span_sites import Probe, Site, Sites
from dpguard.attacks.span_spectrum import by_gap
from dpguard.attacks.vocabulary import Frame
from dpguard.inputs.family import slots

WITNESSES = 2
PIECES = 32
"""Positions that a budget counts as one candidate text: the states of a prefix are computed once."""
FIRST_SAMPLE, SAMPLES = 1536, (384, 1536)
"""Tokens whose states a prefix's screen is fitted on: the very first prefix's, and at the first two levels."""
LISTS = (48, 512, 4096)
"""Tokens tried after every prefix at the levels of the search, likeliest first; in the end all of them."""
REPEATS = 3
"""How often a text's first token is tried in a row where that shows nowhere."""
SAME = 1e-4
"""Relative distance of two states that a message cannot tell apart."""
ROUGH = 1e-2
"""Squared residual that single precision tells from a true one's."""
FEW_TOKENS = 2000
"""A vocabulary so small that all of it is tried at once."""

Prefix = tuple[int, ...]


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


@dataclass
class _Node:
    """A prefix on the tree.

    Attributes:
        children: tokens found to follow it.
        tried: (n,) bool, tokens already tried.
        order: (k,) row numbers of tokens by how likely they follow, once ranked.
    """

    children: list[int] = field(default_factory=list)
    tried: Tensor | None = None
    order: Tensor | None = None


class TreeReader:
    """Reads one message of a decoder's texts; `read` may be called once.

    Args:
        seen: what the adversary holds.
        probe: the model; counts candidates.
        sites: its layers.
        tokens: (n,) tokens that a text can contain.
        frame: special tokens around a text.
        budget: candidates to score.
        rng: source of the tokens that screens are fitted on.
    """

    def __init__(
        self,
        seen: Observation,
        probe: Probe,
        sites: Sites,
        tokens: Tensor,
        frame: Frame,
        budget: Budget,
        rng: torch.Generator,
    ) -> None:
        self.seen, self.probe, self.sites, self.frame, self.rng = seen, probe, sites, frame, rng
        self.tokens = torch.cat([tokens, tokens.new_tensor(frame.suffix)])
        self.limit = probe.scored + budget.candidates * PIECES
        self.nodes: dict[Prefix, _Node] = {}
        self.repeated: set[Prefix] = set()
        self.relative = not any(slot.role == "position_embedding" for slot in slots(probe.model))

    def read(self) -> Reconstruction:
        """Propose the batch's texts."""
        evidence = gather(self.seen, tree_sites(self.seen, self.sites)[0], causal=True, most=WITNESSES)
        if not evidence:
            reason = "no span rises above rounding or noise: more tokens than the model is wide"
            return Reconstruction([], [], notes={"reason": reason})
        clear = not (evidence[0].span.blurred or evidence[0].span.drifted)
        if self.seen.disclosed.sequences == 1 and not clear:
            return Reconstruction([], [], notes={"reason": "noise or rounding: one text is searched for as a whole"})
        site = evidence[0].site
        span = by_gap(site.oriented(self.seen.message[site.name]), evidence[0].span)
        self.judge = replace(evidence[0], span=span)
        self.extender = Extender(self.probe, self.judge.site.layer)
        self.basis = self.judge.basis
        self.screen = Screen(self.judge.span, self.probe.embedding[self.tokens])
        self.states = torch.zeros((0, self.judge.span.inputs), device=self.probe.device, dtype=torch.float64)
        self._grow()
        return self._answer(evidence[1:])

    @property
    def _short(self) -> bool:
        """Whether states of the message are still unexplained."""
        return len(self.states) < self.judge.span.rank

    def _grow(self) -> None:
        """Try short lists after every prefix, then longer ones until the rank is reached: those without a
        continuation first."""
        longest = self.probe.family.max_tokens(self.probe.config)
        waiting: list[tuple[int, bool, int, Prefix]] = [(0, False, 0, ())]
        while waiting and self.probe.scored < self.limit:
            level, _, place, prefix = heapq.heappop(waiting)
            if (level and not self._short) or len(self.states) > 2 * self.judge.span.rank:
                break
            node = self.nodes.setdefault(prefix, _Node())
            opening = place < len(self.frame.prefix)
            found = self._opening(prefix) if opening else self._level(prefix, node, level)
            node.children += found
            for token in found:
                if place + 1 < longest:
                    heapq.heappush(waiting, (0, False, place + 1, (*prefix, token)))
                else:  # as long as a text can be
                    self.nodes.setdefault((*prefix, token), _Node())
            again = self._again(prefix)
            if again and again not in self.repeated and place + 1 < longest:
                self.repeated.add(again)
                heapq.heappush(waiting, (1, False, place + 1, again))
            if not opening and level < len(LISTS) and len(self.tokens) > FEW_TOKENS:
                heapq.heappush(waiting, (level + 1, bool(node.children), place, prefix))

    def _again(self, prefix: Prefix) -> Prefix:
        """A prefix of one token repeated, once more, where positions are relative: its states say nothing new."""
        alike = self.relative and len(set(prefix)) == 1 and not self.frame.prefix and len(prefix) < REPEATS
        return (*prefix, prefix[0]) if alike else ()

    def _opening(self, prefix: Prefix) -> list[int]:
        token = self.tokens.new_tensor(self.frame.prefix[len(prefix) : len(prefix) + 1])
        return self._members(prefix, token, self.extender.states(prefix, token).double())

    def _level(self, prefix: Prefix, node: _Node, level: int) -> list[int]:
        """Tokens found to follow a prefix in the list of a level."""
        if node.tried is None:
            node.tried = torch.zeros(len(self.tokens), dtype=torch.bool, device=self.probe.device)
        if len(self.tokens) <= FEW_TOKENS:
            return self._try(prefix, node, torch.arange(len(self.tokens), device=self.probe.device))[0]
        found: list[int] = []
        if level < len(SAMPLES):
            size = SAMPLES[level] if self.screen.seen else FIRST_SAMPLE
            picked = torch.randperm(len(self.tokens), generator=self.rng)[:size].to(self.probe.device)
            picked = picked[~node.tried[picked]]
            found, states = self._try(prefix, node, picked)
            if len(states) < len(picked):  # the budget is spent
                return found
            node.order = self.screen.rank(picked, states)[: sum(LISTS)]
        rows = torch.arange(len(self.tokens), device=self.probe.device) if level == len(LISTS) else node.order
        if rows is not None:
            rows = rows[~node.tried[rows]]
            found += self._try(prefix, node, rows if level == len(LISTS) else rows[: LISTS[level]])[0]
        return found

    def _try(self, prefix: Prefix, node: _Node, rows: Tensor) -> tuple[list[int], Tensor]:
        """Those of some tokens that follow a prefix, and the (k, inputs) states of all that the budget allows."""
        rows = rows[: max(0, self.limit - self.probe.scored)]
        if not len(rows):
            return [], self.states[:0]
        if node.tried is not None:
            node.tried[rows] = True
        states = self.extender.states(prefix, self.tokens[rows]).double()
        return self._members(prefix, self.tokens[rows], states), states

    def _members(self, prefix: Prefix, tokens: Tensor, states: Tensor) -> list[int]:
        """Tokens whose state lies in the span and is nobody else's."""
        found: list[int] = []
        rough = torch.nn.functional.normalize(states.float(), dim=1)
        limit = 1.0 if self.judge.span.blurred else ROUGH
        near = (1 - (rough @ self.basis.T).pow(2).sum(1) <= limit).nonzero().flatten()
        for k in near[self._true(states[near])].tolist():
            token = int(tokens[k])
            if self._is_new(states[k]):
                self.states = torch.cat([self.states, states[k][None]])
                found.append(token)
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
        leaves = [prefix for prefix, node in self.nodes.items() if self._is_leaf(prefix, node)]
        leaves = leaves[: self.seen.disclosed.sequences]
        complete = len(self.states) == self.judge.span.rank
        certain = [complete and not self._again(leaf) and self._proven(leaf, others) for leaf in leaves]
        notes: dict[str, Any] = {
            "weight": self.judge.site.name,
            "rank": self.judge.span.rank,
            "explained": len(self.states),
            "complete": complete,
        }
        texts, certain = with_last_tokens(
            self.seen, self.judge.site, [list(leaf) for leaf in leaves], certain, self.tokens, notes
        )
        return Reconstruction(texts, certain, 0, -(-self.probe.scored // PIECES), notes)

    def _is_leaf(self, prefix: Prefix, node: _Node) -> bool:
        """Whether a text ends here: nothing follows, not even once its only token was repeated."""
        if not prefix or node.children or prefix in self.repeated:
            return False
        more = self._again(prefix)
        while more and more in self.nodes:
            if self.nodes[more].children:
                return False
            more = self._again(more)
        return True

    def _proven(self, leaf: Prefix, others: list[Evidence]) -> bool:
        """Whether all states of a text lie in the span, and those of the same words in another order do not."""
        ids = self.tokens.new_tensor(leaf)
        if not self.judge.proves(self.probe, ids) or any(e.contradicts(self.probe, ids) for e in others):
            return False
        return not any(self._holds(other) for other in _swapped(ids))

    def _holds(self, ids: Tensor) -> bool:
        states = self.probe.states(self.judge.site.layer, ids[None])[0]
        return self.judge.span.holds(self.judge.vectors(states))


def _swapped(ids: Tensor) -> list[Tensor]:
    """The text with each two different neighbours exchanged."""
    out = []
    for k in range(len(ids) - 1):
        if ids[k] != ids[k + 1]:
            other = ids.clone()
            other[k], other[k + 1] = ids[k + 1], ids[k]
            out.append(other)
    return out
