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

from dpguard.errors import UserError
from dpguard.inputs.batch import Batch
from dpguard.inputs.family import bare, family_of, predicts_tokens

SINGLE_LABEL = "single_label_classification"


def forward_arguments(model: nn.Module, batch: Batch, embeddings: Tensor | None = None) -> dict[str, Tensor]:
    """Keyword arguments of one forward pass, with explicit position ids for every example.

    Args:
        model: a Hugging Face model of a known family.
        batch: B examples of L tokens.
        embeddings: (B, L, d) token embeddings to use instead of the token ids.
    """
    positions = family_of(model).positions(batch.attention_mask, model.config)
    arguments: dict[str, Tensor] = {"attention_mask": batch.attention_mask}
    if "position_ids" in inspect.signature(bare(model).forward).parameters:
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
        (B,) float32, or float64 where the model is.

    Raises:
        UserError: a decoder's classifier without ``config.pad_token_id``, or padded with another token.
    """
    arguments: dict[str, Any] = forward_arguments(model, batch, embeddings)
    by_last_token = finds_last_token(model)
    if by_last_token and embeddings is not None:
        logits = _last_token_logits(bare(model), arguments)
    else:
        check_padding(model, batch.input_ids, batch.attention_mask)
        logits = model(**arguments).logits
    if label_weights is not None:
        return F.cross_entropy(_precise(logits), label_weights, reduction="none")
    return losses_of_logits(model, logits, batch.labels, batch.attention_mask)


def check_task(model: nn.Module) -> None:
    """Refuse a model whose own loss is another one than that of `per_example_losses`.

    Raises:
        UserError: masked tokens, several labels a text, or a number instead of classes.
    """
    inner = bare(model)
    config = getattr(inner, "config", None)
    if predicts_tokens(model):
        if not family_of(model).causal:
            raise UserError(
                f"{type(inner).__name__} predicts masked tokens; expected a classifier of texts, or a decoder that "
                "predicts the next token"
            )
        return
    task, classes = getattr(config, "problem_type", None), getattr(config, "num_labels", 2)
    if task not in (None, SINGLE_LABEL):
        raise UserError(f"config.problem_type is {task!r}; expected {SINGLE_LABEL!r}: one class a text")
    if classes < 2:
        raise UserError(f"the model has {classes} class, so it predicts a number; expected at least two classes")


def finds_last_token(model: nn.Module) -> bool:
    """Whether a model's classifier reads the last token of a text, as every decoder's of transformers does."""
    return hasattr(bare(model), "score")


def check_padding(model: nn.Module, ids: Tensor | None, mask: Tensor) -> None:
    """Refuse padding that a decoder's classifier takes for text.

    It looks for the last token that is not ``config.pad_token_id``; after other padding that is where the batch's
    longest text ends, and one text more or less would change every other's gradient.

    Args:
        model: any model; encoders are let through.
        ids: (B, L) token ids, None where embeddings are given.
        mask: (B, L) attention mask.

    Raises:
        UserError: the token is not set or another one stands there, or padded embeddings.
    """
    if not finds_last_token(model):
        return
    token = getattr(model.config, "pad_token_id", None)
    if token is None:
        raise UserError("config.pad_token_id is not set; a decoder's classifier finds the last token of a text by it")
    hidden = mask == 0
    if bool(hidden.any()) and (ids is None or bool((ids[hidden] != token).any())):
        what = "embeddings are padded" if ids is None else f"texts are padded with other tokens than {token}"
        raise UserError(
            f"{what}; expected token ids padded with config.pad_token_id, by which a decoder's classifier finds the "
            "last token of a text"
        )


def losses_of_logits(model: nn.Module, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """(B,) losses from (B, classes) or (B, L, vocabulary) logits; see `per_example_losses`.

    Raises:
        UserError: a class for every token, or other labels than one class a text.
    """
    logits = _precise(logits)
    if predicts_tokens(model):
        targets = labels.masked_fill(mask == 0, -100)[:, 1:]
        token = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=-100)
        return token.sum(1) / (targets != -100).sum(1).clamp(min=1)
    if logits.dim() != 2:
        raise UserError(f"{type(bare(model)).__name__} has a class for every token; expected one class a text")
    if labels.dim() != 1 or labels.is_floating_point():
        raise UserError(f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected one class index a text")
    return F.cross_entropy(logits, labels, reduction="none")


def _precise(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _last_token_logits(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """A decoder's classifier finds the last token by its ids; with embeddings it is found by the mask.

    Every decoder of transformers calls its classifier ``score`` and its blocks `base_model_prefix`.
    """
    backbone = getattr(model, str(model.base_model_prefix))
    logits = model.score(backbone(**arguments).last_hidden_state)  # type: ignore[operator]
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
    rates = [(module, name, getattr(module, name)) for module in model.modules() for name in _rates(module)]
    model.train()
    if mode == "eval":
        for module, name, _ in rates:
            setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
        for module, name, rate in rates:
            setattr(module, name, rate)


def _rates(module: nn.Module) -> list[str]:
    """Names of a module's dropout rates: Llama's attention keeps one as a number, without an `nn.Dropout`."""
    names = ["p"] if isinstance(module, nn.Dropout) else []
    return names + [name for name in ("attention_dropout",) if isinstance(getattr(module, name, None), float)]
