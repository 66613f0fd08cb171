"""What every leg of a cell needs: the study's texts, model, resolved policy, cache and device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dpguard.errors import UserError
from dpguard.federation import views
from dpguard.federation.settings import Settings
from dpguard.inputs import models
from dpguard.inputs.family import slots
from dpguard.inputs.models import LoadedModel
from dpguard.inputs.texts import Corpus
from dpguard.policy.table import Plan, Policy
from dpguard.study.corpora import corpus_of
from dpguard.study.record import Cell, TextRow

Result = tuple[dict[str, Any], list[TextRow]]
"""Of a leg: the record's result, and true and recovered texts."""
PROVENANCE = "provenance"
"""Entry of a leg's result that goes into the record's provenance instead: no figure is made of it."""


class SkippedError(Exception):
    """A cell that has no answer by its nature; the reason goes on record."""


def corpus_for(cell: Cell, context: Mapping[str, Any]) -> Corpus:
    """The cell's texts, as they were when it was planned."""
    found = corpus_of(context)
    if found.fingerprint != cell.data["hash"]:
        raise UserError(f"the texts of {cell.data['name']!r} changed since the study was planned; run the study again")
    return found


def model_for(cell: Cell, context: Mapping[str, Any], corpus: Corpus) -> LoadedModel:
    """The cell's model at its first weights, as it was when it was planned."""
    found = models.load(context["model"], labels=corpus.classes, seed=0)
    if found.fingerprint != cell.model["hash"]:
        raise UserError(f"model {context['model']!r} changed since the study was planned; run the study again")
    return found


def plan_for(cell: Cell, model: LoadedModel) -> Plan:
    """The cell's policy, resolved for its model."""
    return Policy(cell.table, cell.policy).plan(slots(model.module))


def refuse(plan: Plan, settings: Settings) -> None:
    """Skip a cell whose policy the federation cannot run."""
    try:
        views.check(plan, settings)
    except UserError as error:
        raise SkippedError(error.sentence) from None


def device_of(context: Mapping[str, Any]) -> str:
    """``cuda`` in a worker that was given a device which torch can use, else ``cpu``."""
    if context.get("device", "cpu") == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return str(context["device"])
    if context.get("need_device"):
        raise UserError("torch cannot use the CUDA device that --devices names, expected --devices none or another")
    return "cpu"


def device_name(device: str) -> str:
    """The device as provenance has it."""
    return device if device == "cpu" else f"{device} ({torch.cuda.get_device_name()})"
