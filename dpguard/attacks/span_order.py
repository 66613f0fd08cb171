"""The first block's values of a decoder without position embeddings: a bag of words, put in order by the gradient.

There the layer's inputs know neither place nor context, so the span gives the bag of words and nothing else. But
the inputs being known, the gradient divides among them: G = sum over words of d_w x_w has one solution for the d_w,
each the sum of what the values at the word's places were graded with. Another order of the bag grades them
otherwise, so a local search over orders, copies and labels ends where all d_w agree, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from dpguard.attacks.base import Budget
from dpguard.attacks.labels import labels_of
from dpguard.attacks.observation import Observation, Reconstruction
from dpguard.attacks.span_cache import Extender
from dpguard.attacks.span_evidence import Evidence, gather, usable
from dpguard.attacks.span_sites import CHUNK_TOKENS, Probe, Sites
from dpguard.attacks.vocabulary import Frame
from dpguard.engine.gradients import per_example_losses
from dpguard.inputs.batch import Batch
from dpguard.inputs.family import predicts_tokens, slots

EQUAL = 1e-9
"""Squared sine between the message's grades and a text's that rounding explains (measured: at most 1e-14)."""
APART = 1e3
"""How much farther off every neighbour of a text must be for the text to be certain."""
COPIES = 6
"""How many more places than words a text may have: a wrong label is mended by ever more copies."""

Text = tuple[int, ...]


@dataclass(frozen=True)
class _Bag:
    """The words of a text.

    Attributes:
        words: (k,) distinct token ids.
        grades: (k, outputs) what the values at each word's places were graded with, summed.
    """

    words: Tensor
    grades: Tensor


def read_order(
    seen: Observation, probe: Probe, sites: Sites, tokens: Tensor, frame: Frame, budget: Budget
) -> Reconstruction | None:
    """One text from the first block's values, or None where the message or the model is of another kind.

    Args:
        seen: what the adversary holds.
        probe: the model; counts candidates.
        sites: its layers.
        tokens: (n,) tokens that a text can contain.
        frame: special tokens around a text.
        budget: candidates to score.
    """
    decoder = probe.family.causal and not predicts_tokens(seen.model)
    if seen.disclosed.texts != 1 or not decoder or any(slot.role == "position_embedding" for slot in slots(seen.model)):
        return None
    chosen = [s for s in usable(seen, sites)[0] if s.block == 0 and s.role in {"value", "qkv"}]
    evidence = gather(seen, chosen, causal=True, most=1)
    if not evidence or evidence[0].span.blurred or evidence[0].span.drifted:
        return None
    special = tokens.new_tensor(frame.wrap([]))
    bag = _bag(seen, probe, evidence[0], torch.unique(torch.cat([tokens, special])))
    if bag is None:
        return None
    labels = labels_of(seen)
    search = _Search(probe, evidence[0].site.layer, bag, frame, probe.scored)
    found: dict[int, tuple[Text, float]] = {}
    for label in labels:
        search.limit += max(1, budget.candidates // len(labels))
        found[label] = search.run(label)
        if found[label][1] <= EQUAL:
            break
    label = min(found, key=lambda each: found[each][1])
    text, residual = found[label]
    certain = len(bag.words) > 1 and search.alone(text, residual, label)
    notes = {"weight": evidence[0].site.name, "rank": evidence[0].span.rank, "residual": residual}
    return Reconstruction([list(text)], [certain], 0, probe.scored, notes)


def _bag(seen: Observation, probe: Probe, evidence: Evidence, tokens: Tensor) -> _Bag | None:
    """Words whose input lies in the span, with their grades; None when they are not as many as the rank."""
    states = Extender(probe, evidence.site.layer).states((), tokens).double()
    probe.scored -= len(tokens)  # one product with the basis, no candidate text
    residual, allowed = evidence.span.outside(states)
    inside = residual <= allowed
    if int(inside.sum()) != evidence.span.rank:
        return None
    gradient = evidence.site.oriented(seen.message[evidence.site.name])
    return _Bag(tokens[inside], (gradient @ torch.linalg.pinv(states[inside])).T)


class _Search:
    """Local search over texts made of a bag's words."""

    def __init__(self, probe: Probe, layer: nn.Module, bag: _Bag, frame: Frame, limit: int) -> None:
        self.probe, self.layer, self.bag, self.frame, self.limit = probe, layer, bag, frame, limit
        self.row = {word: k for k, word in enumerate(bag.words.tolist())}
        self.label = 0

    def run(self, label: int) -> tuple[Text, float]:
        """The best text under a label and its squared sine: orders first, then copies of words."""
        self.label = label
        inner = [w for w in self.row if w not in {*self.frame.prefix, *self.frame.suffix}]
        inner.sort(key=lambda word: float(self.bag.grades[self.row[word]].norm()))  # the last word is graded most
        text: Text = tuple(self.frame.wrap(inner))
        cost = self._costs([text])[0]
        while cost > EQUAL and self.probe.scored < self.limit:
            for options in (self._orders(text), self._copies(text)):
                best, least = self._best(options)
                if least < cost:
                    break
            if least >= cost:
                break
            text, cost = best, least
        return text, cost

    def alone(self, text: Text, cost: float, label: int) -> bool:
        """Whether a text agrees with the message to rounding and no neighbour of it comes near that."""
        self.label = label
        return cost <= EQUAL and self._best([*self._orders(text), *self._copies(text)])[1] > max(EQUAL, APART * cost)

    def _best(self, texts: Iterable[Text]) -> tuple[Text, float]:
        options = list(dict.fromkeys(texts))
        costs = self._costs(options)
        k = min(range(len(costs)), key=costs.__getitem__) if costs else -1
        return (options[k], costs[k]) if costs else ((), float("inf"))

    def _span(self, text: Text) -> range:
        return range(len(self.frame.prefix), len(text) - len(self.frame.suffix))

    def _orders(self, text: Text) -> list[Text]:
        """Two words exchanged, or one moved."""
        out: list[Text] = []
        for i, j in combinations(self._span(text), 2):
            out.append((*text[:i], text[j], *text[i + 1 : j], text[i], *text[j + 1 :]))
            out.append((*text[:i], *text[i + 1 : j + 1], text[i], *text[j + 1 :]))
            out.append((*text[:i], text[j], *text[i:j], *text[j + 1 :]))
        return [other for other in out if other != text]

    def _copies(self, text: Text) -> list[Text]:
        """One more copy of a word somewhere, or one fewer where there are several."""
        places = self._span(text)
        words = [w for w in self.row if w not in {*self.frame.prefix, *self.frame.suffix}]
        more = [(*text[:k], word, *text[k:]) for k in (*places, places.stop) for word in words]
        fewer = [(*text[:k], *text[k + 1 :]) for k in places if text.count(text[k]) > 1]
        longest = min(self.probe.family.max_tokens(self.probe.config), len(self.row) + COPIES)
        return [other for other in (*more, *fewer) if len(other) <= longest]

    def _costs(self, texts: list[Text]) -> list[float]:
        """Squared sines between the message's grades and those of texts under the label."""
        found: dict[Text, float] = {}
        for length in {len(text) for text in texts}:
            group = [text for text in texts if len(text) == length]
            size = max(1, CHUNK_TOKENS // length)
            for start in range(0, len(group), size):
                part = group[start : start + size]
                found.update(zip(part, self._sines(part), strict=True))
        return [found[text] for text in texts]

    def _sines(self, texts: list[Text]) -> list[float]:
        self.probe.scored += len(texts)
        ids = torch.tensor(texts, device=self.probe.device)
        rows = torch.tensor([[self.row[word] for word in text] for text in texts], device=self.probe.device)
        grades = self._grades(ids).double()
        mine = torch.zeros((len(texts), *self.bag.grades.shape), dtype=torch.float64, device=ids.device)
        mine.scatter_add_(1, rows[:, :, None].expand_as(grades), grades)
        inner = (mine * self.bag.grades).sum((1, 2))
        along = inner / self.bag.grades.pow(2).sum()
        apart = (mine - along[:, None, None] * self.bag.grades).pow(2).sum((1, 2))
        sines = apart / mine.pow(2).sum((1, 2)).clamp_min(1e-300)
        return torch.where(inner > 0, sines, 2 - sines).tolist()

    def _grades(self, ids: Tensor) -> Tensor:
        """(n, L, outputs) gradient of each text's loss by the layer's output."""
        kept: list[Tensor] = []

        def keep(_layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            kept.append(output.detach().requires_grad_(True))
            return kept[0]

        handle = self.layer.register_forward_hook(keep)
        try:
            with torch.enable_grad():
                batch = Batch(ids, torch.ones_like(ids), torch.full_like(ids[:, 0], self.label))
                losses = per_example_losses(self.probe.model, batch)
                return torch.autograd.grad(losses.sum(), kept[0])[0]
        finally:
            handle.remove()
