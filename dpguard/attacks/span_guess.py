"""Guesses without a search: every (token, position) of the vocabulary held against one weight's span."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers.activations import ACT2FN

from dpguard.attacks.span_evidence import Evidence
from dpguard.attacks.span_picture import Album, Picture, View
from dpguard.attacks.span_rows import Rows
from dpguard.attacks.span_ruler import ruler
from dpguard.attacks.span_sites import Probe, Site, Sites
from dpguard.attacks.vocabulary import Frame

DECISIVE = 2.0
"""How much a token loses at a position for looking better at another one (in log units of the table)."""
COLUMNS = 20
"""Tokens a position that take part in an assignment."""
COPIES, SECOND = 3, 0.4
"""How often a token may be used, and what each further copy costs (log units)."""


@dataclass(frozen=True)
class Guess:
    """A table of how badly each token fits at each position.

    Attributes:
        misfit: (tokens, L) log share of the state that the span does not explain; small = likely.
        tokens: (tokens,) the token ids.
        known: (L,) a text that is better than what the table alone says, or None.
    """

    misfit: Tensor
    tokens: Tensor
    known: Tensor | None = None

    def best(self, count: int) -> Tensor:
        """(L, count) token ids by misfit, those first that fit nowhere better."""
        elsewhere = self.misfit - self.misfit.min(dim=1, keepdim=True).values
        order = (self.misfit + DECISIVE * elsewhere).topk(min(count, len(self.tokens)), dim=0, largest=False).indices
        return self.tokens[order].T

    def text(self) -> Tensor:
        """(L,) the assignment of tokens to positions with the least misfit; a second copy of a token costs."""
        if self.known is not None:
            return self.known
        length = self.misfit.shape[1]
        near = self.misfit.min(dim=1).values.topk(min(COLUMNS * length, len(self.tokens)), largest=False).indices
        once = self.misfit[near] + DECISIVE * (self.misfit[near] - self.misfit[near].min(dim=1, keepdim=True).values)
        cost = torch.cat([once, *(once + SECOND * copy for copy in range(1, COPIES))]).T
        chosen = torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=near.device)
        return self.tokens[near[chosen % len(near)]]

    def bag(self, count: int) -> Tensor:
        """(count,) token ids that fit best anywhere."""
        order = self.misfit.min(dim=1).values.topk(min(count, len(self.tokens)), largest=False).indices
        return self.tokens[order]


def guess(
    evidence: Evidence,
    sites: Sites,
    album: Album,
    length: int,
    tokens: Tensor,
    *,
    picture: Picture | None = None,
    rows: Rows | None = None,
) -> Guess | None:
    """Hold every token at every position against the evidence; None when the weight allows no such test.

    Args:
        evidence: one weight's.
        sites: the model's layers.
        album: pictures.
        length: tokens of the text.
        tokens: (n,) tokens that a text can contain.
        picture: use this one instead of the album's.
        rows: states found by `span_rows`, for the weight that gives them.
    """
    probe = album.probe
    seat = seat_of(evidence, sites, probe)
    if seat is None:
        return None
    seen = picture or album.picture(seat.name, seat.layer, length)
    if evidence.site.role == "mlp_out" and seat is not evidence.site:
        return None if rows is None else _named(probe, seen, rows, length, tokens, album.frame)
    view = view_of(evidence, seat, seen, probe)
    if view is None:
        return None
    share = seen.table(view, probe.embedding[tokens], probe.positions(length))
    return Guess(share.clamp_min(1e-9).log(), tokens)


def seat_of(evidence: Evidence, sites: Sites, probe: Probe) -> Site | None:
    """The layer whose linear picture tells about the evidence's inputs.

    Values tell more than the mixtures of them that the attention's output reads, but a text with as many tokens as a
    head is wide leaves no room in any head to test one: then the picture is of the mixtures, heads side by side. LoRA's
    B reads few numbers, neither heads nor neurons.
    """
    role, block = evidence.site.role, evidence.site.block
    if evidence.site.adapter == "B":
        return evidence.site
    if role == "attention_output":
        heads = int(probe.config.num_attention_heads)
        room = evidence.span.rank < evidence.span.inputs // heads
        return sites.find(block, "value", "qkv") if room else evidence.site
    if role == "mlp_out":
        return sites.find(block, "mlp_in")
    return evidence.site


def view_of(evidence: Evidence, seat: Site, picture: Picture, probe: Probe) -> View | None:
    """The linear conditions on a state that the evidence sets."""
    outside = evidence.span.complement()
    identity = torch.eye(evidence.span.inputs, dtype=torch.float64, device=outside.device)
    nothing = torch.zeros(len(identity), dtype=torch.float64, device=outside.device)
    if evidence.site.role == "attention_output" and seat is not evidence.site:
        return _heads(evidence, seat, probe)
    if evidence.differences:
        return View(outside, -outside @ picture.opening, identity, -picture.opening)
    return View(outside, torch.zeros(len(outside), dtype=torch.float64, device=outside.device), identity, nothing)


def _heads(evidence: Evidence, seat: Site, probe: Probe) -> View | None:
    """Each head's context is a mixture of the texts' values, so the values of the head lie in its span too."""
    heads = int(probe.config.num_attention_heads)
    weight = seat.oriented(seat.layer.get_parameter("weight"))
    if len(weight) < evidence.span.inputs:  # query groups share their values
        return None
    own = getattr(seat.layer, "bias", None)
    bias = weight.new_zeros(len(weight)) if own is None else own.detach().double()
    width = evidence.span.inputs // heads
    weight, bias = weight[-evidence.span.inputs :], bias[-evidence.span.inputs :]  # the last third of a fused one
    matrices, offsets = [], []
    scaled = evidence.span.basis * evidence.span.values[:, None]
    floor = evidence.span.tail**0.5 * 2
    for head in range(heads):
        cut = slice(head * width, (head + 1) * width)
        values, directions = torch.linalg.svd(scaled[:, cut], full_matrices=True)[1:]
        rank = int((values > max(floor, float(values[0]) * 1e-6)).sum())
        matrices.append(directions[rank:] @ weight[cut])
        offsets.append(directions[rank:] @ bias[cut])
    matrix = torch.cat(matrices)
    return View(matrix, torch.cat(offsets), weight, bias) if len(matrix) else None


def _named(probe: Probe, picture: Picture, rows: Rows, length: int, tokens: Tensor, frame: Frame) -> Guess | None:
    """Tokens and positions by their distance from known states; each state is given one position."""
    if not len(rows.states):
        return None
    scale = rows.scale if picture is rows.picture else ruler(probe, picture, tokens, length)
    nearest = torch.full((len(tokens), length), torch.inf, device=probe.device)
    costs, names = [], []
    for state in rows.states:
        near = scale.distances(state[None])[0]
        nearest = torch.minimum(nearest, near)
        cost, name = near.min(dim=0)
        costs.append(cost)
        names.append(name)
    misfit = nearest.clamp_min(1e-9).log()
    text = tokens[misfit.argmin(dim=0)]
    inner = slice(len(frame.prefix), length - len(frame.suffix))
    which, places = linear_sum_assignment(torch.stack(costs)[:, inner].clamp_min(1e-9).log().cpu().numpy())
    for row, place in zip(which.tolist(), places.tolist(), strict=True):
        position = place + len(frame.prefix)
        text[position] = tokens[names[row][position]]
    return Guess(misfit, tokens, known=text)


def activation(config: Any) -> Any:
    """The MLP's activation function, whatever the family calls it."""
    names = ("hidden_act", "activation_function", "activation")
    return ACT2FN[next(getattr(config, name) for name in names if hasattr(config, name))]
