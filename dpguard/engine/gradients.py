"""Per-example losses and plain gradients: the conventions that client, training and attacks share.

Pure functions of (model, batch); no Opacus here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpguard.inputs.batch import Batch
from dpguard.inputs.family import family_of


def forward_arguments(model: nn.Module, batch: Batch, embeddings: Tensor | None = None) -> dict[str, Tensor]:
    """Keyword arguments of one forward pass, with explicit position ids for every example.

    Args:
        model: a Hugging Face model of a known family.
        batch: B examples of L tokens.
        embeddings: (B, L, d) token embeddings to use instead of the token ids.
    """
    positions = family_of(model).positions(batch.attention_mask, model.config)
    arguments: dict[str, Tensor] = {"attention_mask": batch.attention_mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        arguments["position_ids"] = positions
    if embeddings is None:
        return arguments | {"input_ids": batch.input_ids}
    return arguments | {"inputs_embeds": embeddings}


def per_example_losses(
    model: nn.Module,
    batch: Batch,
    *,
    embeddings: Tensor | None = None,
    label_weights: Tensor | None = None,
) -> Tensor:
    """One loss an example, so that no example changes another's gradient.

    Classification: cross-entropy. Next-token prediction: the mean over the example's own tokens (a mean
    over the batch's tokens would couple examples).

    Args:
        model: classifier or language model of a known family.
        batch: B examples.
        embeddings: (B, L, d), see `forward_arguments`.
        label_weights: (B, classes) probabilities instead of ``batch.labels`` (attacks that guess labels).

    Returns:
        (B,) float32.
    """
    arguments: dict[str, Any] = forward_arguments(model, batch, embeddings)
    if embeddings is not None and getattr(model.config, "model_type", "") == "gpt2":
        logits = _last_token_logits(model, arguments)
    else:
        logits = model(**arguments).logits
    return losses_of_logits(logits, batch.labels if label_weights is None else label_weights, batch.attention_mask)


def losses_of_logits(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """(B,) losses from (B, classes) or (B, L, vocabulary) logits; see `per_example_losses`."""
    logits = logits.float()
    if logits.dim() == 2:
        return F.cross_entropy(logits, labels, reduction="none")
    targets = labels.masked_fill(mask == 0, -100)[:, 1:]
    token = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return token.sum(1) / (targets != -100).sum(1).clamp(min=1)


def _last_token_logits(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """GPT-2's classifier finds the last token by its ids; with embeddings it is found by the mask."""
    if not hasattr(model, "score"):
        return model(**arguments).logits  # type: ignore[no-any-return]
    hidden = model.transformer(**arguments).last_hidden_state  # type: ignore[operator]
    logits = model.score(hidden)  # type: ignore[operator]
    last = arguments["attention_mask"].sum(1) - 1
    return logits[torch.arange(len(last), device=last.device), last]  # type: ignore[no-any-return]


def gradient(
    model: nn.Module,
    batch: Batch,
    names: Sequence[str],
    *,
    embeddings: Tensor | None = None,
    label_weights: Tensor | None = None,
    create_graph: bool = False,
) -> dict[str, Tensor]:
    """Gradient of the SUM of per-example losses, by plain autograd; unused parameters give zeros.

    Returns:
        parameter name -> tensor of the parameter's shape.
    """
    wanted = {name: p for name, p in model.named_parameters() if name in set(names)}
    losses = per_example_losses(model, batch, embeddings=embeddings, label_weights=label_weights)
    found = torch.autograd.grad(losses.sum(), list(wanted.values()), create_graph=create_graph, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(wanted.items(), found, strict=True)}


@contextmanager
def running_as(model: nn.Module, mode: str) -> Iterator[None]:
    """Run a model with dropout off (``eval``) or on (``train``), and put everything back afterwards.

    The model is in train mode either way, because gradient hooks capture nothing in eval mode; without
    dropout the two are the same function for every supported family.
    """
    before = {module: module.training for module in model.modules()}
    rates = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    model.train()
    if mode == "eval":
        for dropout in rates:
            dropout.p = 0.0
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
        for dropout, rate in rates.items():
            dropout.p = rate
