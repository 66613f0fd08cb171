"""The utility leg: what a policy's training is worth, and the weights that it leaves for the leakage leg."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dpguard.errors import UserError
from dpguard.federation.settings import Settings
from dpguard.inputs.models import LoadedModel
from dpguard.inputs.texts import Corpus
from dpguard.measure import utility
from dpguard.policy.table import Plan
from dpguard.study import federated
from dpguard.study.cache import cache_of, weights_key
from dpguard.study.ground import (
    Result,
    SkippedError,
    corpus_for,
    device_name,
    device_of,
    model_for,
    plan_for,
    refuse,
)
from dpguard.study.record import Cell
from dpguard.study.tensors import keep, shared


def run(cell: Cell, context: Mapping[str, Any]) -> Result:
    """Predictions on held-out texts after training under the policy, alone or in a federation."""
    corpus = corpus_for(cell, context)
    model = model_for(cell, context, corpus)
    plan = plan_for(cell, model)
    if "federation" in cell.settings:
        refuse(plan, Settings.of(cell.settings["federation"]))
        moments = [*context.get("keep_rounds", ()), "end"] if cell.id in context.get("keep_weights", ()) else []

        def write(moment: int | str, state: dict[str, Tensor]) -> None:
            keep(cache_of(context), _federation_key(cell.id, moment), state)

        found, run = federated.train(
            cell, model, plan, corpus, moments, write, engine=context.get("engine", "embedded")
        )
        return federated.utility(found, run, model), []
    try:
        utility.check_central(plan)
    except UserError as error:
        raise SkippedError(error.sentence) from None
    trained = _train(cell, model, plan, corpus, device_of(context))
    if cell.id in context.get("keep_weights", ()):
        keep(cache_of(context), weights_key(cell.id), _state(model))
    predictions, loss = utility.predict(model.module, model.tokenizer, corpus.test)
    labels = [e.label for e in corpus.test]
    return {
        "metrics": utility.scores(predictions, labels, loss, corpus.classes),
        "predictions": predictions,
        "labels": labels,
        "classes": corpus.classes,
        "steps": trained.steps,
        "sampling_rate": trained.sampling_rate,
        "clipped_fraction": trained.clipped_fraction,
        "dropped": trained.dropped,
        "train_seconds": round(trained.seconds, 3),
    }, []


def _train(cell: Cell, model: LoadedModel, plan: Plan, corpus: Corpus, device: str) -> utility.Trained:
    given = cell.settings
    return utility.train(
        model.module, model.tokenizer, corpus.cut(given.get("train_examples")).train, plan,
        epochs=given["epochs"], batch_size=given["batch_size"], learning_rate=given["learning_rate"],
        optimizer=given["optimizer"], seed=cell.seed, device=device,
    )  # fmt: skip


def federation_weights(
    context: Mapping[str, Any], cell_id: str, corpus: Corpus, moment: int | str
) -> tuple[dict[str, Tensor], str]:
    """Weights of a federation, which its utility cell kept; trained again (the same) if they are gone.

    Returns:
        The weights with what victims have at home, and the device on which they were trained again, "" when kept.
    """
    again = ""

    def make() -> dict[str, Tensor]:
        nonlocal again
        made: dict[int | str, dict[str, Tensor]] = {}
        cell = Cell(**context["trained"][cell_id])
        model = model_for(cell, context, corpus)
        federated.train(cell, model, plan_for(cell, model), corpus, [moment], made.__setitem__)
        again = "cpu"  # where clients train here
        return made[moment]

    state = shared(cache_of(context), _federation_key(cell_id, moment), make)
    return state, again


def _federation_key(cell_id: str, moment: int | str) -> dict[str, Any]:
    """The same with what some clients have at home: layers, moments and what pruning left out."""
    return {**weights_key(cell_id, moment), "beside": "states"}


def _state(model: LoadedModel) -> dict[str, Tensor]:
    """The weights; tied tensors once, which load_state_dict(strict=False) fills through their first name."""
    return {name: p.detach().cpu().contiguous() for name, p in model.module.named_parameters()}


def load_weights(model: LoadedModel, context: Mapping[str, Any], cell_id: str, corpus: Corpus) -> str:
    """Last weights of a utility cell, which it kept; trained again (same seed, same weights) if they are gone.

    The model ends on the CPU.

    Returns:
        The device on which they were trained again, "" when they were kept.
    """
    again = ""

    def make() -> dict[str, Tensor]:
        nonlocal again
        cell, device = Cell(**context["trained"][cell_id]), device_of(context)
        _train(cell, model, plan_for(cell, model), corpus, device)
        model.module.to("cpu")
        again = device_name(device)
        return _state(model)

    model.module.load_state_dict(shared(cache_of(context), weights_key(cell_id), make), strict=False)
    return again
