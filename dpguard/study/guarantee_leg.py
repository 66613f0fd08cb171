"""The guarantee leg: epsilon, statement and bounds of a policy, computed once and stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import dpguard
from dpguard.engine.accounting import guarantee
from dpguard.errors import UserError
from dpguard.federation import views
from dpguard.federation.leak import record_bound
from dpguard.federation.settings import Settings
from dpguard.inputs import models
from dpguard.inputs.models import LoadedModel
from dpguard.inputs.texts import Corpus
from dpguard.measure import kappa
from dpguard.policy.guarantee import Guarantee, plain_epsilon
from dpguard.policy.table import Plan
from dpguard.study import federated
from dpguard.study.cache import cache_of
from dpguard.study.ground import Result, SkippedError, corpus_for, plan_for, refuse
from dpguard.study.record import Cell, canonical

KAPPAS = (1e-4, 0.01)
"""Examples of a chance of success without the message, for which a bound is printed beside every guarantee."""


def run(cell: Cell, context: Mapping[str, Any]) -> Result:
    """Epsilon, statement and bounds: computed once, stored, never recomputed by a report."""
    corpus = corpus_for(cell, context)
    model = models.load(context["model"], labels=corpus.classes, seed=0)
    plan = plan_for(cell, model)
    found, seen, more = _promised(cell, plan, corpus)
    given = cell.settings.get("federation")
    closed = cell.settings.get("candidates")
    kappas = (KAPPAS[0], 1 / closed) if closed else KAPPAS
    bounds = [{"kappa": k, "success": found.bound(k, seen)} for k in kappas]
    return {
        "epsilon": plain_epsilon(found.epsilon),
        "sigma_eff": plain_epsilon(found.sigma_eff),
        "delta": found.delta,
        "sampling_rate": found.sampling_rate,
        "steps": found.steps,
        "statement": found.statement,
        "reasons": list(found.reasons),
        "bound": bounds[-1] if found.formal else None,
        "bounds": bounds if found.formal else [],
        "kappa": {
            metric: {**k, "bound": found.bound(min(k["upper"], 1 - 1e-9), seen) if found.formal else None}
            for metric, k in _kappa(cell, context, corpus, model).items()
        },
        "shared_fraction": plan.shared_fraction,
        "plan_hash": plan.hash,
        "table": table_of(views.own_plan(plan, Settings.of(given)) if given else plan),
        **more,
    }, []


def _promised(cell: Cell, plan: Plan, corpus: Corpus) -> tuple[Guarantee, int, dict[str, Any]]:
    """(guarantee, noised steps that an attacker saw of one record, what a federation adds to the record)."""
    given = cell.settings
    if "federation" not in given:
        # every local step behind a message is noised by itself, unless the whole change is
        seen = 1 if plan.unit == "update" else given.get("local_steps", 1)
        found = guarantee(
            plan, sampling_rate=given["sampling_rate"], steps=max(given["steps"], seen), delta=given["delta"],
            examples=round(given.get("examples", cell.data["train"])),
        )  # fmt: skip
        return found, seen, {}
    settings = Settings.of(given["federation"])
    refuse(plan, settings)
    promise = federated.promise(cell, plan, corpus)
    seen = given["messages"] * views.messages_a_round(plan, settings)
    worst = {"client": promise.client, "rounds": promise.rounds, "texts": promise.examples}
    found = promise.guarantee
    if given["messages"] > 1:
        several = record_bound(found, plan, settings, given["messages"], KAPPAS)
        found = replace(found, statement=f"{found.statement} {several}")
    return found, seen, {"seen": given["messages"], "federation": {"worst": worst, **given["federation"]}}


def epsilon(cell: Cell, plan: Plan, corpus: Corpus) -> tuple[float, str]:
    """(epsilon of a guarantee cell, ""), or (infinity, why the federation refuses the policy); before anything runs."""
    try:
        return _promised(cell, plan, corpus)[0].epsilon, ""
    except SkippedError as error:
        return float("inf"), str(error)


def check_split(cells: Sequence[Cell], corpus: Corpus) -> None:
    """Refuse a federation whose split the texts do not allow, before anything runs.

    Raises:
        UserError: see `split.split`; ``loc`` is in the federation's settings.
    """
    checked = set()
    for cell in cells:
        if cell.leg == "guarantee" and "federation" in cell.settings:
            key = canonical([cell.settings["federation"]["clients"], cell.settings["federation"]["split"]])
            try:
                if key not in checked:
                    federated.Rehearsal.of(cell, corpus)
                checked.add(key)
            except UserError as error:
                raise UserError(f"federation.{error.sentence}", loc=error.loc) from None


def _kappa(cell: Cell, context: Mapping[str, Any], corpus: Corpus, model: LoadedModel) -> dict[str, dict[str, Any]]:
    """Metric -> kappa, measured once a study."""
    told = bool(cell.settings.get("lengths"))
    key = {
        "what": "kappa",
        "model": cell.model,
        "data": cell.data,
        "lengths": told,
        "repeats": True,
        "dpguard": dpguard.__version__,
    }

    def make() -> dict[str, dict[str, Any]]:
        measured = kappa.measure(corpus.public, model.tokenizer, told)
        return {metric: vars(k) for metric, k in kappa.with_repeats(measured, corpus.repeated).items()}

    found: dict[str, dict[str, Any]] = cache_of(context).plain(key, make)
    return found


def table_of(plan: Plan) -> list[dict[str, Any]]:
    """The plan by part of the model and kind of treatment: what a report prints."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    total = sum(rule.slot.size for rule in plan.values())
    for rule in plan.values():
        idle = not (rule.train or rule.share)  # its clip and noise apply to nothing
        clip, group, noise = (None, None, 0.0) if idle else (rule.clip, rule.group, rule.noise)
        fixed = 0.0 if idle else rule.noise_std
        kind = (rule.slot.part, rule.train, rule.share, clip, group, noise, fixed)
        entry = merged.setdefault(
            (*kind, rule.describe()),
            {
                "parameters": rule.slot.part,
                "fraction": 0.0,
                "share": rule.share,
                "train": rule.train,
                "clip": clip,
                "group": group,
                "noise": noise,
                "std": noise * (clip or 0.0) if noise else fixed,
                "release": rule.describe(),
            },
        )
        entry["fraction"] += rule.slot.size / total
    return list(merged.values())
