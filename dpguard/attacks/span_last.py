"""Last tokens under a next-token loss: no layer sees them as inputs, but the prediction of each was graded.

A text's last token is only the label of its last position. There the loss is ``log sum exp(logits) - u . h``, with
h the last hidden state and u the head's row of the label. Once the inputs are known, everything in the gradient of
a weight is known but the gradients of ``u . h``, and these are linear in u. So u is solved for by conjugate
gradients, all texts at once, and the nearest row of the head is the token. When the whole gradient is then
explained to rounding, tokens, texts and their order are proven together.

A clip by example, or a step's rate, multiplies each text's gradient by a factor that nobody tells. Then u is solved for
in what no multiple of the texts' known parts explains, and the factors are fitted to the rows found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpguard.attacks.observation import Observation
from dpguard.attacks.span_sites import Site
from dpguard.engine.gradients import forward_arguments
from dpguard.inputs.batch import Batch
from dpguard.inputs.family import bare, predicts_tokens

ITERATIONS, LOOK = 96, 6
"""Steps of the solver, and after how many of them its answer is looked at."""
EXPLAINED = 1e-3
"""What may stay unexplained of the part of the gradient that the labels make; a wrong label leaves a good share."""


@dataclass(frozen=True)
class LastTokens:
    """One token a text.

    Attributes:
        tokens: ids, as many as texts, or none.
        certain: the gradient is explained to rounding.
        reason: why they are missing or uncertain, else empty.
    """

    tokens: list[int]
    certain: bool
    reason: str = ""


def with_last_tokens(
    seen: Observation, site: Site, texts: list[list[int]], certain: list[bool], tokens: Tensor, notes: dict[str, Any]
) -> tuple[list[list[int]], list[bool]]:
    """Texts with their last tokens where the model's loss hides these, and what is then certain.

    Args:
        seen: what the adversary holds.
        site: the layer whose weight was read.
        texts: token ids of what the layer saw as inputs.
        certain: one flag a text.
        tokens: (n,) tokens that a text can contain.
        notes: gets an entry on where the last tokens come from.
    """
    if not texts or not predicts_tokens(seen.model):
        return texts, certain
    labels = last_tokens(seen, site, texts, tokens)
    notes["last_tokens"] = labels.reason or "read off the gradient of their prediction"
    whole = [[*text, *labels.tokens[k : k + 1]] for k, text in enumerate(texts)]
    return whole, [flag and labels.certain for flag in certain]


def last_tokens(seen: Observation, site: Site, texts: list[list[int]], tokens: Tensor) -> LastTokens:
    """The last tokens of texts of which all others are known.

    Args:
        seen: what the adversary holds.
        site: a layer whose weight was read.
        texts: token ids without the last one; all texts of the message.
        tokens: (n,) tokens that a text can contain.
    """
    model, weight = seen.model, site.layer.get_parameter("weight")
    head: nn.Module = bare(model).get_output_embeddings()  # type: ignore[operator]
    rows = head.get_parameter("weight").detach()[tokens]
    wanted = weight.requires_grad
    weight.requires_grad_(True)
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            hidden, known = _known(model, head, weight, texts)
            lengths = torch.tensor([[len(text)] for text in texts], device=rows.device)
            labels = _Labels(hidden / -lengths, weight)
            message = seen.message[site.name].to(known) * seen.disclosed.batch_size * seen.disclosed.clients
            if _is_scaled(seen, site.name):
                sent = -message if seen.disclosed.kind == "delta" else message
                return _solve(_Scaled(labels, known), sent, rows, tokens)
            return _solve(labels, message - known.sum(0), rows, tokens)
    finally:
        weight.requires_grad_(wanted)


def _is_scaled(seen: Observation, name: str) -> bool:
    """Whether each text's gradient comes times a factor that is not known."""
    told = seen.disclosed
    return told.kind == "delta" or name not in told.plan or told.plan[name].clip is not None


def _known(model: nn.Module, head: nn.Module, weight: Tensor, texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(B, d) last hidden states as functions of the weight, and (B, *weight) gradients of all of each text's loss but
    ``u . h``."""
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=weight.device)
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=weight.device)
    inner = bare(model)
    backbone = getattr(inner, str(inner.base_model_prefix))
    arguments = forward_arguments(model, Batch(ids, mask, ids), None)
    hidden = backbone(**arguments).last_hidden_state
    logits = head(hidden).float()
    inside = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids.masked_fill(mask == 0, -100)[:, 1:], reduction="none")
    each = torch.arange(len(texts), device=ids.device)
    last = mask.sum(1) - 1
    losses = (inside.sum(1) + logits[each, last].logsumexp(1)) / mask.sum(1)
    parts = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses]
    return hidden[each, last], torch.stack(parts)


class _Labels:
    """The linear map from head rows (B, d) to the gradient of the weight, and its transpose."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden, self.weight = hidden, weight
        self.dual = torch.zeros_like(hidden).requires_grad_(True)
        self.back = torch.autograd.grad(hidden, weight, self.dual, create_graph=True)[0]

    def outside(self, gradient: Tensor) -> Tensor:
        """What has to be explained of a gradient."""
        return gradient

    def forward(self, rows: Tensor) -> Tensor:
        return torch.autograd.grad(self.hidden, self.weight, rows.to(self.hidden), retain_graph=True)[0]

    def transposed(self, gradient: Tensor) -> Tensor:
        return torch.autograd.grad(self.back, self.dual, gradient, retain_graph=True)[0]

    def left(self, message: Tensor, rows: Tensor) -> Tensor:
        """What rows (B, d) leave of the message."""
        return message - self.forward(rows)


class _Scaled(_Labels):
    """The same where each text's gradient comes times a factor: in what no multiple of the known parts explains.

    Args:
        labels: the map.
        known: (B, *weight) the known parts.
    """

    def __init__(self, labels: _Labels, known: Tensor) -> None:
        self.hidden, self.weight, self.dual, self.back = labels.hidden, labels.weight, labels.dual, labels.back
        self.known = known.flatten(1).double()
        self.basis = torch.linalg.qr(self.known.T).Q.to(known)

    def outside(self, gradient: Tensor) -> Tensor:
        """A gradient without its part along the known ones."""
        flat = gradient.flatten()
        outside: Tensor = flat - self.basis @ (self.basis.T @ flat)
        return outside.reshape(gradient.shape)

    def forward(self, rows: Tensor) -> Tensor:
        return self.outside(super().forward(rows))

    def transposed(self, gradient: Tensor) -> Tensor:
        return super().transposed(self.outside(gradient))

    def left(self, message: Tensor, rows: Tensor) -> Tensor:
        """What is left at the factors that fit best."""
        alone = torch.diag_embed(torch.ones(len(rows), device=rows.device)).to(rows)[:, :, None] * rows
        parts = torch.stack([_Labels.forward(self, row).flatten() for row in alone]).double() + self.known
        factors = torch.linalg.lstsq(parts.T, message.flatten().double()[:, None]).solution[:, 0]
        explained: Tensor = (factors @ parts).to(message)
        return message - explained.reshape(message.shape)


def _solve(labels: _Labels, message: Tensor, rows: Tensor, tokens: Tensor) -> LastTokens:
    """Conjugate gradients on the normal equations until the nearest rows explain the message."""
    directions = F.normalize(rows.float(), dim=1)
    answer = torch.zeros_like(labels.dual)
    left = labels.outside(message)
    size_of_all = left.norm().clamp_min(1e-38)
    slope = labels.transposed(left)
    step, size = slope.clone(), slope.pow(2).sum()
    best: tuple[float, Tensor] | None = None
    for turn in range(1, ITERATIONS + 1):
        image = labels.forward(step)
        scale = size / image.pow(2).sum().clamp_min(1e-38)
        answer, left = answer + scale * step, left - scale * image
        slope = labels.transposed(left)
        size, before = slope.pow(2).sum(), size
        step = slope + size / before.clamp_min(1e-38) * step
        if turn % LOOK == 0 or turn == 1:
            found = (F.normalize(answer, dim=1) @ directions.T).argmax(1)
            misfit = float(labels.left(message, rows[found]).norm() / size_of_all)
            if best is None or misfit < best[0]:
                best = misfit, found
            if misfit < EXPLAINED:
                break
    if best is None:
        return LastTokens([], False, "no step was made")
    certain = best[0] < EXPLAINED and not _another(labels, message, rows, best[1], answer, float(size_of_all))
    reason = "" if certain else f"the gradient is explained but for {best[0]:.2g} of what the last labels make"
    if best[0] < EXPLAINED and not certain:
        reason = "another last label explains the gradient as well"
    return LastTokens(tokens[best[1]].tolist(), certain, reason)


def _another(labels: _Labels, message: Tensor, rows: Tensor, found: Tensor, answer: Tensor, size: float) -> bool:
    """Whether the next likely row in place of one that was found explains the message as well."""
    like = F.normalize(answer, dim=1) @ F.normalize(rows.float(), dim=1).T
    for k in range(len(found) if len(rows) > 1 else 0):
        other = found.clone()
        other[k] = next(row for row in like[k].topk(2).indices.tolist() if row != int(found[k]))
        if float(labels.left(message, rows[other]).norm()) < EXPLAINED * size:
            return True
    return False
