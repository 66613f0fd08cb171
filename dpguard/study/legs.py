"""Runs one cell of a study: guarantee, leakage or utility. Imported by worker processes only."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import dpguard
from dpguard.engine.accounting import guarantee
from dpguard.engine.client import Client
from dpguard.errors import UserError
from dpguard.inputs import models, texts
from dpguard.inputs.family import slots
from dpguard.inputs.models import LoadedModel
from dpguard.inputs.texts import Corpus
from dpguard.measure import defence, kappa, leakage, utility
from dpguard.measure.threat import Threat
from dpguard.policy.table import Plan, Policy
from dpguard.study.cache import Cache
from dpguard.study.record import Cell, Record, TextRow

Result = tuple[dict[str, Any], list[TextRow]]
KAPPAS = (1e-4, 0.01)
"""Chances of success without the message for which the bound is printed beside every guarantee."""


def execute(cell: Cell, context: Mapping[str, Any]) -> tuple[Record, list[TextRow]]:
    """Run a cell.

    Args:
        cell: what to run.
        context: ``model`` (name), ``data`` (arguments of `texts.load`), ``folder`` (where weights are kept).

    Returns:
        The record, done or skipped with its reason, and its texts. Anything unexpected is raised: the
        runner makes it a failed record.
    """
    torch.set_num_threads(1)
    started = time.perf_counter()
    leg = _LEGS[cell.leg]
    try:
        result, rows = leg(cell, context)
        status, reason = "done", ""
    except SkippedError as skip:
        result, rows, status, reason = {}, [], "skipped", str(skip)
    provenance = {
        "seconds": round(time.perf_counter() - started, 3),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "device": "cpu",
        "versions": versions(),
    }
    return Record(cell, status, reason, result, provenance), rows  # type: ignore[arg-type]


class SkippedError(Exception):
    """A cell that has no answer by its nature; the reason goes on record."""


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    import importlib.metadata as metadata

    found = {name: metadata.version(name) for name in ("torch", "transformers", "opacus")}
    return {"dpguard": dpguard.__version__, "python": platform.python_version(), "platform": sys.platform, **found}


@lru_cache(maxsize=1)
def load_corpus(key: tuple[tuple[str, str], ...]) -> Corpus:
    """The study's texts, once a process."""
    arguments: dict[str, Any] = dict(key)
    root = Path(arguments.pop("beside", "."))
    return texts.load(locate=lambda name: root / name if (root / name).exists() else Path(name), **arguments)


def corpus_of(context: Mapping[str, Any]) -> Corpus:
    """The corpus that a context names."""
    return load_corpus(tuple(sorted((k, v) for k, v in context["data"].items() if v is not None)))


def _model(cell: Cell, context: Mapping[str, Any], corpus: Corpus) -> LoadedModel:
    found = models.load(context["model"], labels=corpus.classes, seed=0)
    if found.fingerprint != cell.model["hash"]:
        raise UserError(f"model {context['model']!r} changed since the study was planned; run the study again")
    return found


def _plan(cell: Cell, model: LoadedModel) -> Plan:
    return Policy(cell.table, cell.policy).plan(slots(model.module))


def _guarantee(cell: Cell, context: Mapping[str, Any]) -> Result:
    """Epsilon, statement and bounds: computed once, stored, never recomputed by a report."""
    corpus = corpus_of(context)
    model = models.load(context["model"], labels=corpus.classes, seed=0)
    plan = _plan(cell, model)
    given = cell.settings
    found = guarantee(
        plan,
        sampling_rate=given["sampling_rate"],
        steps=given["steps"],
        delta=given["delta"],
        examples=round(given.get("examples", cell.data["train"])),
    )
    bounds = [{"kappa": k, "success": found.bound(k)} for k in KAPPAS]
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
            metric: {**k, "bound": found.bound(min(k["upper"], 1 - 1e-9)) if found.formal else None}
            for metric, k in _kappa(cell, context, corpus, model).items()
        },
        "shared_fraction": plan.shared_fraction,
        "plan_hash": plan.hash,
        "table": table_of(plan),
    }, []


def _kappa(cell: Cell, context: Mapping[str, Any], corpus: Corpus, model: LoadedModel) -> dict[str, dict[str, Any]]:
    """Metric -> kappa, measured once a study."""
    key = {"what": "kappa", "model": cell.model, "data": cell.data, "dpguard": dpguard.__version__}

    def make() -> dict[str, dict[str, Any]]:
        return {metric: vars(k) for metric, k in kappa.measure(corpus.public, model.tokenizer).items()}

    found: dict[str, dict[str, Any]] = Cache(context["folder"]).plain(key, make) if "folder" in context else make()
    return found


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
    corpus = corpus_of(context)
    model = _model(cell, context, corpus)
    given = cell.settings
    if given["at"] == "end":
        _load_weights(model, context, given["needs"], corpus)
    plan = _plan(cell, model)
    if not plan.shared:
        raise SkippedError("the policy shares nothing, so there is no message to attack")
    threat = Threat.of(given["threat"])
    messages = leakage.pick_targets(
        corpus, targets=given["targets"], batch_size=given["batch_size"] * threat.clients, seed=cell.seed
    )
    effect = _effect(model, plan, corpus, messages[0])
    scores: list[dict[str, Any]] = []
    rows: list[TextRow] = []
    skipped: dict[str, str] = {}
    for number, indices in enumerate(messages):
        seed = cell.seed * 1_000_003 + number
        leak = leakage.attack_message(
            model, plan, corpus, indices, attacks=given["panel"]["attacks"], seed=seed, noise_seed=seed, threat=threat
        )
        scores += [score.plain() for score in leak.scores]
        rows += [TextRow(t, "truth", text) for t, text in leak.truths.items()]
        rows += [TextRow(s.target, s.attack, s.guess) for s in leak.scores if not s.inherited]
        skipped |= leak.skipped
    return {
        "at": given["at"],
        "scores": scores,
        "skipped": skipped,
        "defence": {"clip": effect.clip, "noise": effect.noise},
        "shared_fraction": plan.shared_fraction,
        "messages": len(messages),
    }, rows


def _effect(model: LoadedModel, plan: Plan, corpus: Corpus, indices: list[int]) -> defence.Effect:
    batch = leakage.encode(model, [corpus.train[i] for i in indices])
    return defence.check(Client(model.module, plan, seed=0, batch_size=len(batch)), batch)


def _utility(cell: Cell, context: Mapping[str, Any]) -> Result:
    corpus = corpus_of(context)
    model = _model(cell, context, corpus)
    plan = _plan(cell, model)
    try:
        utility.check_central(plan)
    except UserError as error:
        raise SkippedError(error.sentence) from None
    trained = _train(cell, model, plan, corpus)
    if cell.id in context.get("keep_weights", ()):
        _save_weights(model, context, cell.id)
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


def _train(cell: Cell, model: LoadedModel, plan: Plan, corpus: Corpus) -> utility.Trained:
    given = cell.settings
    return utility.train(
        model.module, model.tokenizer, corpus.cut(given.get("train_examples")).train, plan,
        epochs=given["epochs"], batch_size=given["batch_size"], learning_rate=given["learning_rate"],
        optimizer=given["optimizer"], seed=cell.seed,
    )  # fmt: skip


def _weights(context: Mapping[str, Any], cell_id: str) -> Path:
    return Path(context["folder"]) / "weights" / f"{cell_id}.safetensors"


def _save_weights(model: LoadedModel, context: Mapping[str, Any], cell_id: str) -> None:
    """Keep last weights for the cells that attack them; written beside, then renamed, so never half a file."""
    path = _weights(context, cell_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    # tied tensors are stored once; load_state_dict(strict=False) fills them through their first name
    state = {name: p.detach().contiguous() for name, p in model.module.named_parameters()}
    save_file(state, part)
    part.replace(path)


def _load_weights(model: LoadedModel, context: Mapping[str, Any], cell_id: str, corpus: Corpus) -> None:
    """Last weights of a utility cell: from the file, or trained again (same seed, same weights) when it is gone."""
    path = _weights(context, cell_id)
    if not path.is_file():
        cell = Cell(**context["trained"][cell_id])
        _train(cell, model, _plan(cell, model), corpus)
        _save_weights(model, context, cell_id)
        return
    model.module.load_state_dict(load_file(path), strict=False)


_LEGS: dict[str, Callable[[Cell, Mapping[str, Any]], Result]] = {
    "guarantee": _guarantee,
    "leakage": _leakage,
    "utility": _utility,
}
