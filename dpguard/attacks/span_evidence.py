"""One weight's testimony: which combinations of a text's states must lie in the span of its gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpguard.attacks.observation import Observation
from dpguard.attacks.span_rank import RESOLUTION, Span, span_of
from dpguard.attacks.span_sites import LINEAR, Probe, Site, Sites
from dpguard.inputs.family import predicts_tokens, slots

COVERAGE = 0.05
"""Weight of the log-volume that a candidate's rows take up in the span: two rows may not share a direction."""
TWINS, ALIKE = 8, 0.05
"""Nearest words of each word that a proof has to tell it from, and their distance relative to its embedding."""
FINAL_BLOCK = (
    "only the final block's weights are shared, and a classification head reads one state of a text: "
    "the gradients of the query, attention output and MLP have the rank of the texts (those of key and value at most "
    "heads times that), not of the tokens"
)
POOLED = (
    "only the head or the pooler is shared, whose gradients hold one pooled state a text and nothing of its single "
    "tokens"
)


@dataclass(frozen=True)
class Evidence:
    """A weight, the span of its gradient, and how states become vectors of that span.

    Attributes:
        site: the layer.
        span: of its inputs.
        causal: a position sees only what is left of it.
    """

    site: Site
    span: Span
    causal: bool

    @property
    def differences(self) -> bool:
        """Keys: softmax ignores a shift, so only differences from the first token's state are in the span."""
        return self.site.role == "key"

    @property
    def first(self) -> int:
        """First position that the weight testifies about; a decoder's first query has one key and no gradient."""
        return 1 if self.differences or (self.causal and self.site.role == "query") else 0

    @property
    def lengths(self) -> list[int]:
        """Lengths in tokens that the rank allows, likeliest first; under noise a rank may be too low, and where
        the weights moved too high as well."""
        exact = self.span.rank + self.first
        if self.span.drifted:
            return [exact, exact + 1, exact - 1, exact + 2, exact - 2]
        return [exact, exact + 1, exact + 2] if self.span.blurred else [exact]

    def vectors(self, states: Tensor) -> Tensor:
        """(..., L - first, inputs) what must lie in the span, from (..., L, inputs) states."""
        if self.differences:
            return states[..., 1:, :] - states[..., :1, :]
        return states[..., self.first :, :]

    def residuals(self, states: Tensor) -> Tensor:
        """(B, L) squared length outside the span relative to the vector's own, float32, 0 where nothing is said."""
        rows = torch.nn.functional.normalize(self.vectors(states).float(), dim=-1)
        out = 1 - (rows @ self.basis.T).pow(2).sum(-1)
        return torch.nn.functional.pad(out, (self.first, 0))

    def energy(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) mean residual plus coverage term, and the (B, L) residuals; differentiable."""
        rows = torch.nn.functional.normalize(self.vectors(states).float(), dim=-1)
        inside = rows @ self.basis.T
        out = 1 - inside.pow(2).sum(-1)
        count = rows.shape[-2]
        gram = inside @ inside.transpose(-1, -2) + 1e-3 * torch.eye(count, device=rows.device)
        volume = torch.linalg.cholesky_ex(gram).L.diagonal(dim1=-2, dim2=-1).log().sum(-1) * 2 / count
        return out.mean(-1) - COVERAGE * volume, torch.nn.functional.pad(out, (self.first, 0))

    def certifies(self, probe: Probe, ids: Tensor) -> tuple[bool, float]:
        """Whether a text of (L,) token ids explains the span to the message's precision; its worst residual."""
        if len(ids) not in self.lengths:
            return False, 1.0
        rows = self.vectors(probe.states(self.site.layer, ids[None])[0])
        if not len(rows):
            return False, 1.0
        return self.proves(probe, ids), float(self.span.outside(rows)[0].max())

    def proves(self, probe: Probe, ids: Tensor) -> bool:
        """Whether the span holds a text of (L,) token ids, and no text with a word of nearly the same embedding in
        place of one of its own (rows that were added to a vocabulary lie that close).
        """
        return self._holds(probe, ids) and not any(self._holds(probe, other) for other in twins(probe.embedding, ids))

    def _holds(self, probe: Probe, ids: Tensor) -> bool:
        return self.span.holds(self.vectors(probe.states(self.site.layer, ids[None])[0]))

    def contradicts(self, probe: Probe, ids: Tensor, tokens: int | None = None) -> bool:
        """Whether a text of (L,) token ids has a state that cannot be in the span, however imprecise it is.

        Args:
            probe: counts the candidate.
            ids: the text.
            tokens: how many the whole message has, None when unknown. A span of fewer dimensions hides some
                direction below the edge of its rank; true inputs may lean that way by more than rounding does,
                and only what tells one text from another speaks against a text then.
        """
        residual, allowed = self.span.outside(self.vectors(probe.states(self.site.layer, ids[None])[0]))
        if tokens is not None and self.span.rank + self.first != tokens:
            allowed = allowed.clamp_min(RESOLUTION)
        return bool((residual > allowed).any())

    @property
    def basis(self) -> Tensor:
        """The span's basis in the model's precision."""
        return self.span.basis.float()


def twins(embedding: Tensor, ids: Tensor) -> list[Tensor]:
    """Texts with one word of (L,) token ids exchanged for another whose embedding is nearly the same."""
    words = torch.unique(ids)
    rows = embedding[words].float()
    apart = torch.cdist(rows, embedding.float())
    near = apart.topk(min(TWINS + 1, len(embedding)), largest=False)
    close = near.values < ALIKE * rows.norm(dim=1, keepdim=True)
    found = {int(word): near.indices[k][close[k]].tolist() for k, word in enumerate(words)}
    out = []
    for place, word in enumerate(ids.tolist()):
        for twin in found[word]:
            if twin != word:
                other = ids.clone()
                other[place] = twin
                out.append(other)
    return out


def usable(seen: Observation, sites: Sites) -> tuple[list[Site], str]:
    """Sites whose weight on the wire can be read, best first, or the reason why there is none.

    LoRA's B come last: they show no more dimensions than LoRA's rank.
    """
    plan = seen.disclosed.plan
    shared = [s for s in sites.all if s.name in seen.message]
    if not shared:
        return [], _outside_blocks(seen)
    inner = shared if predicts_tokens(seen.model) else [s for s in shared if s.block < sites.last_block]
    if not inner:
        return [], FINAL_BLOCK
    rules = {s.name: plan[s.name] for s in inner if s.name in plan}
    whole = [s for s in inner if s.name in rules and rules[s.name].whole]
    if not whole:
        return [], "every shared weight is pruned or rounded, which leaves no low-rank gradient to read"
    return sorted(whole, key=lambda s: (s.adapter == "B", s.block, LINEAR.index(s.role))), ""


def _outside_blocks(seen: Observation) -> str:
    """Why nothing is read when no layer of a block is shared."""
    roles = {slot.role for slot in slots(seen.model) if slot.name in seen.message}
    if roles and roles <= {"head", "pooler"} and not predicts_tokens(seen.model):
        return POOLED
    return "no attention or MLP weight of a block is shared"


def gather(seen: Observation, sites: list[Site], *, causal: bool, most: int) -> list[Evidence]:
    """Evidence of the first ``most`` sites whose gradient has a span that leaves room for a test.

    Each A of LoRA shows as many dimensions as it has rows, so those that read the same vectors are read as one. Every
    B has vectors of its own.
    """
    found: list[Evidence] = []
    drifted = seen.disclosed.kind == "delta"
    left = list(sites)
    while left and len(found) < most:
        site = left[0]
        together = [s for s in left if s is site or (s.adapter == site.adapter == "A" and s.beside(site))]
        left = [s for s in left if s not in together]
        gradient = torch.cat([s.oriented(seen.message[s.name]) for s in together])
        span = span_of(gradient, max(seen.noise_std(s.name) for s in together), drifted=drifted)
        if span is not None:
            found.append(Evidence(site, span, causal))
    return found
