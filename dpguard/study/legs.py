"""Runs one cell of a study: guarantee, leakage or utility. Imported by worker processes only."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dpguard
from dpguard.engine.accounting import guarantee
from dpguard.engine.client import Client
from dpguard.errors import UserError
from dpguard.federation import views
from dpguard.federation.leak import record_bound
from dpguard.federation.settings import Settings
from dpguard.inputs import models, texts
from dpguard.inputs.family import slots
from dpguard.inputs.models import LoadedModel
from dpguard.inputs.texts import Corpus
from dpguard.measure import defence, kappa, leakage, utility
from dpguard.measure.threat import Threat
from dpguard.policy.guarantee import Guarantee
from dpguard.policy.table import Plan, Policy
from dpguard.study import federated
from dpguard.study.cache import GIGABYTES, Cache
from dpguard.study.record import Cell, Record, TextRow, canonical
from dpguard.study.tensors import shared

Result = tuple[dict[str, Any], list[TextRow]]
KAPPAS = (1e-4, 0.01)
"""Chances of success without the message for which the bound is printed beside every guarantee."""


def execute(cell: Cell, context: Mapping[str, Any]) -> tuple[Record, list[TextRow]]:
    """Run a cell.

    Args:
        cell: what to run.
        context: ``model`` (name), ``data`` (arguments of `texts.load`), ``folder`` (where the cache is),
            ``cache_gigabytes`` (its room), ``plans`` (policy label -> hash of the resolved policy), ``device``
            (``cuda`` when this worker was given one), ``need_device`` (whether to fail when it cannot be used).

    Returns:
        The record, done or skipped with its reason, and its texts. Anything unexpected is raised: the
        runner makes it a failed record.
    """
    started = time.perf_counter()
    leg = _LEGS[cell.leg]
    try:
        result, rows = leg(cell, context)
        status, reason = "done", ""
    except SkippedError as skip:
        result, rows, status, reason = {}, [], "skipped", str(skip)
    provenance = {
        "seconds": round(time.perf_counter() - started, 3),
        "device": _device_name(_device(context)),
        "plan": context.get("plans", {}).get(cell.policy),
    }
    return Record(cell, status, reason, result, provenance), rows  # type: ignore[arg-type]


def _device(context: Mapping[str, Any]) -> str:
    """``cuda`` in a worker that was given a device which torch can use, else ``cpu``."""
    if context.get("device", "cpu") == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return str(context["device"])
    if context.get("need_device"):
        raise UserError("torch cannot use the CUDA device that --devices names, expected --devices none or another")
    return "cpu"


def _device_name(device: str) -> str:
    return device if device == "cpu" else f"{device} ({torch.cuda.get_device_name()})"


class SkippedError(Exception):
    """A cell that has no answer by its nature; the reason goes on record."""


@lru_cache(maxsize=1)
def load_corpus(key: tuple[tuple[str, str], ...]) -> Corpus:
    """The study's texts, once a process."""
    arguments: dict[str, Any] = dict(key)
    root = Path(arguments.pop("beside", "."))
    return texts.load(locate=lambda name: root / name if (root / name).exists() else Path(name), **arguments)


def corpus_of(context: Mapping[str, Any]) -> Corpus:
    """The corpus that a context names."""
    return load_corpus(tuple(sorted((k, v) for k, v in context["data"].items() if v is not None)))


def _corpus(cell: Cell, context: Mapping[str, Any]) -> Corpus:
    found = corpus_of(context)
    if found.fingerprint != cell.data["hash"]:
        raise UserError(f"the texts of {cell.data['name']!r} changed since the study was planned; run the study again")
    return found


def _model(cell: Cell, context: Mapping[str, Any], corpus: Corpus) -> LoadedModel:
    found = models.load(context["model"], labels=corpus.classes, seed=0)
    if found.fingerprint != cell.model["hash"]:
        raise UserError(f"model {context['model']!r} changed since the study was planned; run the study again")
    return found


def _plan(cell: Cell, model: LoadedModel) -> Plan:
    return Policy(cell.table, cell.policy).plan(slots(model.module))


def _guarantee(cell: Cell, context: Mapping[str, Any]) -> Result:
    """Epsilon, statement and bounds: computed once, stored, never recomputed by a report."""
    corpus = _corpus(cell, context)
    model = models.load(context["model"], labels=corpus.classes, seed=0)
    plan = _plan(cell, model)
    found, seen, more = _promised(cell, plan, corpus)
    closed = cell.settings.get("candidates")
    kappas = (KAPPAS[0], 1 / closed) if closed else KAPPAS
    bounds = [{"kappa": k, "success": found.bound(k, seen)} for k in kappas]
    return {
        "epsilon": _plain(found.epsilon),
        "sigma_eff": _plain(found.sigma_eff),
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
        "table": table_of(plan),
        **more,
    }, []


def _promised(cell: Cell, plan: Plan, corpus: Corpus) -> tuple[Guarantee, int, dict[str, Any]]:
    """(guarantee, noised steps that an attacker saw of one record, what a federation adds to the record)."""
    given = cell.settings
    if "federation" not in given:
        found = guarantee(
            plan, sampling_rate=given["sampling_rate"], steps=given["steps"], delta=given["delta"],
            examples=round(given.get("examples", cell.data["train"])),
        )  # fmt: skip
        return found, 1, {}
    settings = Settings.of(given["federation"])
    _refuse(plan, settings)
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


def _refuse(plan: Plan, settings: Settings) -> None:
    try:
        views.check(plan, settings)
    except UserError as error:
        raise SkippedError(error.sentence) from None


def _kappa(cell: Cell, context: Mapping[str, Any], corpus: Corpus, model: LoadedModel) -> dict[str, dict[str, Any]]:
    """Metric -> kappa, measured once a study."""
    key = {"what": "kappa", "model": cell.model, "data": cell.data, "dpguard": dpguard.__version__}

    def make() -> dict[str, dict[str, Any]]:
        return {metric: vars(k) for metric, k in kappa.measure(corpus.public, model.tokenizer).items()}

    found: dict[str, dict[str, Any]] = _cache(context).plain(key, make)
    return found


def _cache(context: Mapping[str, Any]) -> Cache:
    """The study's cache; one without room where there is no folder."""
    room = context.get("cache_gigabytes", GIGABYTES) if "folder" in context else 0
    return Cache(context.get("folder", ""), room)


def _plain(value: float) -> float | str:
    return "inf" if value == float("inf") else value


def table_of(plan: Plan) -> list[dict[str, Any]]:
    """The plan by part of the model and kind of treatment: what a report prints."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    total = sum(rule.slot.size for rule in plan.values())
    for rule in plan.values():
        kind = (rule.slot.part, rule.train, rule.share, rule.clip, rule.group, rule.noise, rule.noise_std)
        entry = merged.setdefault(
            (*kind, rule.describe()),
            {
                "parameters": rule.slot.part,
                "fraction": 0.0,
                "share": rule.share,
                "train": rule.train,
                "clip": rule.clip,
                "group": rule.group,
                "noise": rule.noise,
                "std": rule.noise * (rule.clip or 0.0) if rule.noise else rule.noise_std,
                "release": rule.describe(),
            },
        )
        entry["fraction"] += rule.slot.size / total
    return list(merged.values())


def _leakage(cell: Cell, context: Mapping[str, Any]) -> Result:
    corpus = _corpus(cell, context)
    model = _model(cell, context, corpus)
    given = cell.settings
    plan = _plan(cell, model)
    if not plan.shared:
        raise SkippedError("the policy shares nothing, so there is no message to attack")
    if "federation" in given:
        return _federated_leakage(cell, context, model, plan, corpus)
    if given["at"] in ("end", "tuned"):
        _load_weights(model, context, given["needs"], corpus)
    threat = Threat.of(given["threat"])
    messages = leakage.pick_targets(
        corpus, targets=given["targets"], batch_size=given["batch_size"] * threat.clients, seed=cell.seed
    )
    effect = _effect(model, plan, corpus, messages[0])
    leaks = []
    for number, indices in enumerate(messages):
        seed = cell.seed * 1_000_003 + number
        leaks.append(
            leakage.attack_message(
                model, plan, corpus, indices,
                attacks=given["panel"]["attacks"], seed=seed, noise_seed=seed, threat=threat,
            )
        )  # fmt: skip
    return _attacked(cell, plan, leaks, effect)


def _federated_leakage(
    cell: Cell, context: Mapping[str, Any], model: LoadedModel, plan: Plan, corpus: Corpus
) -> Result:
    """One victim at the first or last weights, or the same record at several rounds: every message in turn."""
    given = cell.settings
    settings = Settings.of(given["federation"])
    _refuse(plan, settings)
    each = given["batch_size"] * (settings.per_round if settings.view == "aggregate" else 1)
    messages = leakage.pick_targets(corpus, targets=given["targets"], batch_size=each, seed=cell.seed)
    effect = _effect(model, views.message_plan(plan, settings), corpus, messages[0])
    by_moment = []
    for moment in federated.moments(cell):
        state = {} if moment == "start" else _federation_weights(context, given["needs"], corpus, moment)
        at = federated.go_to(model, state, moment, settings)
        by_moment.append(
            [
                federated.observe(model, plan, corpus, indices, cell, at, seed=cell.seed * 1_000_003 + number)
                for number, indices in enumerate(messages)
            ]
        )
    return _attacked(cell, plan, [federated.together(same) for same in zip(*by_moment, strict=True)], effect)


def _attacked(cell: Cell, plan: Plan, leaks: Sequence[leakage.Leak], effect: defence.Effect) -> Result:
    """The result of a leakage cell."""
    rows: list[TextRow] = []
    skipped: dict[str, str] = {}
    for leak in leaks:
        rows += [TextRow(t, "truth", text) for t, text in leak.truths.items()]
        rows += [TextRow(s.target, s.attack, s.guess) for s in leak.scores if not s.inherited]
        skipped |= leak.skipped
    return {
        "at": cell.settings["at"],
        "scores": [score.plain() for leak in leaks for score in leak.scores],
        "skipped": skipped,
        "defence": {"clip": effect.clip, "noise": effect.noise},
        "shared_fraction": plan.shared_fraction,
        "messages": len(leaks),
    }, rows


def _effect(model: LoadedModel, plan: Plan, corpus: Corpus, indices: list[int]) -> defence.Effect:
    batch = leakage.encode(model, [corpus.train[i] for i in indices])
    return defence.check(Client(model.module, plan, seed=0, batch_size=len(batch)), batch)


def _utility(cell: Cell, context: Mapping[str, Any]) -> Result:
    corpus = _corpus(cell, context)
    model = _model(cell, context, corpus)
    plan = _plan(cell, model)
    if "federation" in cell.settings:
        _refuse(plan, Settings.of(cell.settings["federation"]))
        kept = [*context.get("keep_rounds", ()), "end"] if cell.id in context.get("keep_weights", ()) else []

        def write(moment: int | str, state: dict[str, Tensor]) -> None:
            shared(_cache(context), weights_key(cell.id, moment), lambda: state)

        found, run = federated.train(cell, model, plan, corpus, kept, write, engine=context.get("engine", "embedded"))
        return federated.utility(found, run, model), []
    try:
        utility.check_central(plan)
    except UserError as error:
        raise SkippedError(error.sentence) from None
    trained = _train(cell, model, plan, corpus, _device(context))
    if cell.id in context.get("keep_weights", ()):
        shared(_cache(context), weights_key(cell.id), lambda: _state(model))
    predictions, loss = utility.predict(model.module, model.tokenizer, corpus.test)
    labels = [e.label for e in corpus.test]
    return {
        "metrics": utility.scores(predictions, labels, loss),
        "predictions": predictions,
        "labels": labels,
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


def _federation_weights(
    context: Mapping[str, Any], cell_id: str, corpus: Corpus, moment: int | str
) -> dict[str, Tensor]:
    """Weights of a federation, which its utility cell kept; trained again (the same) if they are gone."""

    def make() -> dict[str, Tensor]:
        made: dict[int | str, dict[str, Tensor]] = {}
        cell = Cell(**context["trained"][cell_id])
        model = _model(cell, context, corpus)
        federated.train(cell, model, _plan(cell, model), corpus, [moment], made.__setitem__)
        return made[moment]

    return shared(_cache(context), weights_key(cell_id, moment), make)


def weights_key(cell_id: str, moment: int | str = "end") -> dict[str, Any]:
    """What weights are kept by: the utility cell that trained them, and when (``end``, or before a round)."""
    return {"what": "weights", "cell": cell_id, "moment": moment}


def _state(model: LoadedModel) -> dict[str, Tensor]:
    """The weights; tied tensors once, which load_state_dict(strict=False) fills through their first name."""
    return {name: p.detach().cpu().contiguous() for name, p in model.module.named_parameters()}


def _load_weights(model: LoadedModel, context: Mapping[str, Any], cell_id: str, corpus: Corpus) -> None:
    """Last weights of a utility cell, which it kept; trained again (same seed, same weights) if they are gone."""

    def make() -> dict[str, Tensor]:
        cell = Cell(**context["trained"][cell_id])
        _train(cell, model, _plan(cell, model), corpus, _device(context))
        return _state(model)

    model.module.load_state_dict(shared(_cache(context), weights_key(cell_id), make), strict=False)


_LEGS: dict[str, Callable[[Cell, Mapping[str, Any]], Result]] = {
    "guarantee": _guarantee,
    "leakage": _leakage,
    "utility": _utility,
}
