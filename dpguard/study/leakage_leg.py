"""The leakage leg: what the attacks read from the messages of a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dpguard.engine.client import Client
from dpguard.engine.local import LocalState
from dpguard.federation import views
from dpguard.federation.leak import FederatedThreat
from dpguard.federation.settings import Settings
from dpguard.inputs.models import LoadedModel
from dpguard.inputs.texts import Corpus
from dpguard.measure import defence, leakage
from dpguard.measure.threat import Threat
from dpguard.policy.table import Plan
from dpguard.study import federated
from dpguard.study.ground import PROVENANCE, Result, SkippedError, corpus_for, model_for, plan_for, refuse
from dpguard.study.record import Cell, TextRow
from dpguard.study.utility_leg import federation_weights, load_weights


def run(cell: Cell, context: Mapping[str, Any]) -> Result:
    """Scores of every attack on every message, what did not run and why, and what the defence was measured to do."""
    corpus = corpus_for(cell, context)
    model = model_for(cell, context, corpus)
    given = cell.settings
    plan = plan_for(cell, model)
    if not plan.shared:
        raise SkippedError("the policy shares nothing, so there is no message to attack")
    if "federation" in given:
        return _federated_leakage(cell, context, model, plan, corpus)
    again = load_weights(model, context, given["needs"], corpus) if given["at"] in ("end", "tuned") else ""
    threat = Threat.of(given["threat"])
    messages = leakage.pick_targets(
        corpus, targets=given["targets"], batch_size=given["batch_size"] * threat.clients, seed=cell.seed
    )
    effect = _effect(model, plan, corpus, messages[0], threat)
    leaks = []
    for number, indices in enumerate(messages):
        seed = cell.seed * 1_000_003 + number
        leaks.append(
            leakage.attack_message(
                model, plan, corpus, indices,
                attacks=given["panel"]["attacks"], seed=seed, noise_seed=seed, threat=threat,
            )
        )  # fmt: skip
    return _attacked(cell, plan, leaks, effect, again)


def _federated_leakage(
    cell: Cell, context: Mapping[str, Any], model: LoadedModel, plan: Plan, corpus: Corpus
) -> Result:
    """One victim at the first or last weights, or the same record at several rounds: every message in turn."""
    given = cell.settings
    settings = Settings.of(given["federation"])
    refuse(plan, settings)
    messages = leakage.pick_targets(
        corpus, targets=given["targets"], batch_size=given["batch_size"] * settings.summed, seed=cell.seed
    )
    threat = FederatedThreat.within(Threat.of(given["threat"]), settings)
    effect = _effect(model, views.message_plan(plan, settings), corpus, messages[0], threat)
    by_moment, again = [], ""
    before: list[list[LocalState]] = [[] for _ in messages]
    for moment in federated.moments(cell):
        state: dict[str, Tensor] = {}
        if moment != "start":
            state, device = federation_weights(context, given["needs"], corpus, moment)
            again = again or device
        at = federated.go_to(model, plan, state, moment, settings)
        seen = [
            federated.observe(
                model, plan, corpus, indices, cell, at, seed=cell.seed * 1_000_003 + number, before=before[number]
            )
            for number, indices in enumerate(messages)
        ]
        by_moment.append([leak for leak, _ in seen])
        before = [left for _, left in seen]
    leaks = [federated.together(same) for same in zip(*by_moment, strict=True)]
    return _attacked(cell, plan, leaks, effect, again)


def _attacked(cell: Cell, plan: Plan, leaks: Sequence[leakage.Leak], effect: defence.Effect, again: str) -> Result:
    """The result of a leakage cell; ``again`` names the device on which its weights had to be trained once more."""
    rows: list[TextRow] = []
    skipped: dict[str, str] = {}
    for leak in leaks:
        rows += [TextRow(t, "truth", text) for t, text in leak.truths.items()]
        rows += [TextRow(s.target, s.attack, s.guess) for s in leak.scores if not s.inherited]
        skipped |= leak.skipped
    result = {
        "at": cell.settings["at"],
        "scores": [score.plain() for leak in leaks for score in leak.scores],
        "skipped": skipped,
        "defence": {"clip": effect.clip, "noise": effect.noise, "judged": effect.judged},
        "shared_fraction": plan.shared_fraction,
        "messages": len(leaks),
    }
    return result | ({PROVENANCE: {"trained_again": again}} if again else {}), rows


def _effect(model: LoadedModel, plan: Plan, corpus: Corpus, indices: Sequence[int], threat: Threat) -> defence.Effect:
    """What the defence does to a message of the kind that is attacked."""
    each = len(indices) // threat.clients if threat.local_steps else len(indices)
    found = [corpus.train[i] for i in indices]
    batches = [leakage.encode(model, found[i : i + each]) for i in range(0, len(found), each)]
    if threat.local_steps:
        return defence.check_change(threat, model, plan, batches)
    return defence.check(Client(model.module, plan, seed=0, batch_size=len(found)), batches[0])
