"""A client's own work in a round, up to the gate: what `Site.send` takes. Under any framework, with real texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dpguard.deploy.checks import Refused
from dpguard.deploy.gate import before_the_gate
from dpguard.deploy.rehearsal import MessageForm, Rehearsal, check_model
from dpguard.deploy.site import Reply, Site
from dpguard.engine.client import Client
from dpguard.engine.local import LocalTraining
from dpguard.errors import UserError
from dpguard.federation.personal import at_home
from dpguard.federation.settings import derive
from dpguard.federation.turn import client_batches
from dpguard.inputs.batch import Batch, collate
from dpguard.inputs.models import LoadedModel
from dpguard.inputs.texts import Example, check_lengths, examples, load


def one_round(
    site: Site,
    model: LoadedModel,
    texts: Sequence[Example],
    weights: Mapping[str, Tensor],
    *,
    round_number: int,
    plan_hash: str | None = None,
    seed: int | None = None,
    client: int = 0,
) -> Reply:
    """Check what the server sent, train on the site's texts, and let the message leave.

    Args:
        site: the client.
        model: the rehearsed model; left at the weights of the round.
        texts: the client's own.
        weights: the global weights of the round.
        round_number: from 1.
        plan_hash: the table that the server says it runs.
        seed, client: for tests and rehearsals, see `federation.turn.one_client_round`; None = secret, as in the field.

    Raises:
        Refused, BudgetSpent: as `Site.begin` and `Site.send`; nothing leaves.
    """
    again = site.begin(weights, round_number=round_number, plan_hash=plan_hash)
    if again is not None:
        return again
    set_weights(model.module, weights)
    update, form = local_update(site, model, texts, round_number=round_number, seed=seed, client=client)
    return site.send(update, weights, round_number=round_number, form=form)


def local_update(
    site: Site,
    model: LoadedModel,
    texts: Sequence[Example],
    *,
    round_number: int,
    seed: int | None = None,
    client: int = 0,
) -> tuple[dict[str, Tensor], MessageForm]:
    """What a client computes in a round, as the gate takes it: a clipped sum, or a difference of weights.

    Withheld layers go on from where they were at home, and are kept there.

    Args:
        model: at the global weights of the round; left as it was found.
        site, texts, round_number, seed, client: as in `one_round`.

    Returns:
        (update, how it was made).

    Raises:
        Refused: another model than the rehearsed one, too few texts for the rehearsed sampling rate, or too many for
            the rehearsed delta.
    """
    meant = site.rehearsal.message
    check_model(site.rehearsal.model, model.module)
    rate = sampling_rate(meant, len(texts))
    check_delta(site.rehearsal, len(texts))
    drawn = client_batches(
        seed, client, round_number, examples=len(texts), batch_size=meant.batch_size, steps=meant.local_steps
    )
    batches = [_batch([texts[i] for i in rows], model) for rows in drawn]
    made = Client(
        model.module, before_the_gate(site.plan),
        seed=None if seed is None else derive(seed, "noise", client, round_number),
        batch_size=meant.batch_size,
        mode="train",
        dropout_seed=None if seed is None else derive(seed, "dropout", client, round_number),
        training=LocalTraining(meant.optimizer, meant.learning_rate, meant.momentum),
    )  # fmt: skip
    own = site.personal() or _now(model.module, site.plan.withheld)
    form = replace(meant, sampling_rate=rate, examples=len(texts))
    if site.content == "clipped":
        site.keep_personal(own)
        with at_home(model.module, own):
            return made.clipped(batches[0]).sums, form
    made.state.personal = own
    update = made.observe(batches).tensors
    site.keep_personal(made.state.personal)
    return update, form


def sampling_rate(meant: MessageForm, texts: int) -> float:
    """The rate at which a site with so many texts samples: the rehearsed one or less.

    Raises:
        Refused: too few texts, so that every one would be in more batches than was rehearsed.
    """
    rate = min(1.0, meant.batch_size / max(1, texts))
    if rate > meant.sampling_rate * (1 + 1e-9):
        needed = math.ceil(meant.batch_size / meant.sampling_rate - 1e-6)
        raise Refused(
            f"the site has {texts} texts, and batches of {meant.batch_size} at rate {meant.sampling_rate:.4g} "
            f"were rehearsed; expected at least {needed} texts"
        )
    return rate


def check_delta(rehearsal: Rehearsal, texts: int) -> None:
    """The rehearsed delta promises something to each of so many texts.

    Raises:
        Refused: a delta above one over their number.
    """
    budget = rehearsal.budget
    if budget.epsilon < math.inf and rehearsal.plan.unit == "example" and budget.delta > 1 / max(1, texts):
        raise Refused(
            f"the site has {texts} texts, and epsilon was rehearsed at delta {budget.delta:g}; expected a delta of at "
            f"most {1 / max(1, texts):.1e}"
        )


def own_texts(path: str, labels: int, model: LoadedModel | None = None) -> list[Example]:
    """All texts of a site to train on: of a file every one, nothing is held out.

    Args:
        path: a jsonl, csv or parquet file with the columns ``text`` and ``label``; else what `inputs.texts.load` knows
            (``demo``, a hub name), of which the training part.
        labels: number of classes of the model.
        model: whose positions every text must fit: one that does not would fail exactly the rounds that draw it.

    Raises:
        UserError: see `inputs.texts.load`; a label that the model has no class for; or a text that is too long for it.
    """
    place = Path(path)
    found = list(examples(place)) if place.is_file() else list(load(path).train)
    for example in found:
        if example.label >= labels:
            raise UserError(
                f"label is {example.label}; expected a class index below {labels}, as the model was rehearsed with",
                where=example.where,
            )
    if model is not None:
        check_lengths(found, model.tokenizer, model.max_tokens)
    return found


def set_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put a round's global weights into the model."""
    named = dict(module.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in weights.items():
            named[name].copy_(value)


def first_weights(model: LoadedModel) -> dict[str, Tensor]:
    """Every parameter as it is now, tied ones once: what a server begins with and sends."""
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


def _batch(texts: Sequence[Example], model: LoadedModel) -> Batch:
    return collate([e.text for e in texts], [e.label for e in texts], model.tokenizer)


def _now(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    return {name: named[name].detach().clone() for name in names}
