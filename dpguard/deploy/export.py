"""From a study's records to a folder that can be run: the table, the card, a self-test, and a project."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpguard import registry
from dpguard.deploy import card, golden
from dpguard.deploy.rehearsal import Budget, MessageForm, ModelCard, Rehearsal, content_of
from dpguard.errors import UserError, did_you_mean
from dpguard.federation.settings import Settings
from dpguard.inputs import models
from dpguard.inputs.family import slots
from dpguard.inputs.models import LoadedModel
from dpguard.policy.layers import ADAPTERS
from dpguard.policy.table import Plan, Policy
from dpguard.report.frontier import frontier
from dpguard.report.recommend import Recommendation, recommend
from dpguard.report.result import StudyResult
from dpguard.study.record import Record
from dpguard.study.store import Store

PACKAGE = "dpguard.deploy.exporters"
PROJECTS = Path(__file__).parent / "projects"
MOST_CLASSES = 64
"""A study's number of classes is not in its records where nothing was trained; it is found by the model's hash."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        rehearsal: the policy and what it is held against.
        decision: under the study's caps.
        warnings: what the user must know before shipping it.
    """

    folder: Path
    rehearsal: Rehearsal
    decision: Recommendation
    warnings: tuple[str, ...]


def export(
    records: str | Path,
    *,
    to: str,
    policy: str | None = None,
    out: str | Path | None = None,
    metrics: Sequence[str] = (),
) -> Exported:
    """Write the folder of one policy for one framework.

    Args:
        records: folder of a study's records.
        to: ``opacus``, ``flower`` or ``nvflare``.
        policy: its name in the study; None = the one that the study's caps recommend.
        out: the folder to make; None = ``RECORDS/export/FRAMEWORK``.
        metrics: names of numbers that clients may send beside the tensors, past clip and noise.

    Raises:
        UserError: an unknown framework or policy, nothing recommended, no guarantee on record, a model that changed, a
            table or federation that the framework cannot carry, or a folder that is not empty.
    """
    plugin = registry.load(PACKAGE, to, "framework").PLUGIN
    with Store.open(records) as store:
        result = StudyResult.read(store)
    decision = _decide(result)
    name = policy or decision.policy
    if not name:
        raise UserError(f"no policy is recommended ({decision.sentence}) Expected --policy NAME")
    if name not in result.policies:
        raise UserError(f"no policy of this study is called {name!r}{did_you_mean(name, result.policies)}")
    made = rehearse(result, name, metrics)
    plugin.check(made)
    folder = Path(out) if out is not None else Path(records) / "export" / to
    _new(folder)
    made.write(folder)
    golden.make(made).write(folder)
    card.write(card.make(result, made, decision), folder)
    told = _dealing(result, name)
    fill(to, folder, made, plugin.values(made) | told)
    return Exported(folder, made, decision, tuple(_warnings(made, decision)))


def _dealing(result: StudyResult, policy: str) -> dict[str, str]:
    """Whether a simulation deals the study's texts out, and to how many a round: the policy's own federation."""
    cells = [r.cell.settings for r in result.records if r.cell.policy == policy and r.cell.leg == "guarantee"]
    federation: Mapping[str, Any] = next((settings["federation"] for settings in cells if "federation" in settings), {})
    deal, clients = bool(federation), federation.get("per_round", 2)
    return {"DEAL": str(deal).lower(), "DEAL_PYTHON": str(deal), "CLIENTS": str(clients)}


def rehearse(result: StudyResult, policy: str, metrics: Sequence[str] = ()) -> Rehearsal:
    """What the records say about one policy, as a message is held against it.

    Raises:
        UserError: no guarantee on record, a model that changed since, or a federation that no exported client can be.
    """
    own = [r for r in result.records if r.cell.policy == policy and r.status == "done"]
    claim = next((r for r in own if r.cell.leg == "guarantee"), None)
    if claim is None:
        raise UserError(f"policy {policy!r} has no guarantee on record; expected a study that ran (dpguard run)")
    loaded, labels = _model(claim, own)
    rows = tuple(dict(row) for row in claim.cell.table)
    form, rows = _form(claim, own, rows, loaded)
    plan = Policy([dict(row) for row in rows], policy).plan(slots(loaded.module))
    content_of(plan, form.kind)
    if not plan.shared:
        raise UserError(f"policy {policy!r} shares nothing; expected one that lets something leave")
    if any(group.quantile for group in plan.groups.values()):
        raise UserError(
            f"policy {policy!r} has clips that follow a quantile, which would move at every client on its own; "
            "expected fixed clips (dpguard fit-clips finds them)"
        )
    found = claim.result
    budget = Budget(found["delta"], float(found["epsilon"]), _messages(plan, form, int(found["steps"])))
    return Rehearsal(
        str(result.study["name"]), policy, rows, ModelCard.of(loaded, labels), form, budget, tuple(metrics)
    )


def _messages(plan: Plan, form: MessageForm, steps: int) -> int:
    """The guarantee's steps as the site's ledger counts them.

    The guarantee counts the local steps of a difference wherever the unit is an example. Where nothing is clipped or
    noised, the ledger counts the difference as one message, and the steps are not to be taken for rounds.
    """
    counted = form.kind == "delta" and plan.unit == "example" and content_of(plan, form.kind) == "raw"
    return max(1, steps // form.local_steps) if counted else steps


def _model(claim: Record, own: Sequence[Record]) -> tuple[LoadedModel, int]:
    """The model of the study, recognised by its hash, and its number of classes."""
    name, wanted = str(claim.cell.model["name"]), claim.cell.model["hash"]
    seen = [max(r.result["labels"]) + 1 for r in own if r.cell.leg == "utility" and r.result.get("labels")]
    for labels in dict.fromkeys([*(max(2, n) for n in seen), *range(2, MOST_CLASSES + 1)]):
        loaded = models.load(name, labels=labels, seed=0)
        if loaded.fingerprint == wanted:
            return loaded, loaded.classes
    raise UserError(f"model {name!r} is not the one of the study (hash {wanted}); expected the same weights")


def _form(
    claim: Record, own: Sequence[Record], rows: tuple[dict[str, Any], ...], loaded: LoadedModel
) -> tuple[MessageForm, tuple[dict[str, Any], ...]]:
    """How messages were made: as the federation says, else as the training and the threat model do."""
    settings = claim.cell.settings
    worst = (claim.result.get("federation") or {}).get("worst") or {}
    examples = round(worst.get("texts", settings.get("examples", claim.cell.data["train"])))
    rate = float(claim.result.get("sampling_rate", settings.get("sampling_rate", 1.0)))
    if "federation" in settings:
        return _federated(Settings.of(settings["federation"]), rate, examples, rows, loaded)
    trained = next((r.cell.settings for r in own if r.cell.leg == "utility"), {})
    attacked = next((r.cell.settings for r in own if r.cell.leg == "leakage"), {})
    threat = attacked.get("threat") or {}
    batch = int(trained.get("batch_size") or attacked.get("batch_size") or 1)
    steps = int(threat.get("local_steps", 0))
    if steps:
        form = MessageForm("delta", batch, rate, float(threat.get("learning_rate", 1e-3)), "sgd", examples,
                           local_steps=steps)  # fmt: skip
        return form, rows
    optimizer, step = str(trained.get("optimizer", "sgd")), float(trained.get("learning_rate", 0.1))
    server = "fedsgd" if optimizer == "sgd" else optimizer
    return MessageForm("gradient", batch, rate, step, "sgd", examples, server=server, server_rate=step), rows


def _federated(
    federation: Settings, rate: float, examples: int, rows: tuple[dict[str, Any], ...], loaded: LoadedModel
) -> tuple[MessageForm, tuple[dict[str, Any], ...]]:
    if federation.view == "aggregate":
        raise UserError(
            "the study supposes secure aggregation (view: aggregate), and each client adds only a share of the noise; "
            "no exported project sets secure aggregation up, expected a study with view: client"
        )
    for name, unset in (("keep_state", False), ("error_feedback", False), ("weights", "equal")):
        if getattr(federation, name) != unset:
            raise UserError(
                f"the study's federation has {name}: {getattr(federation, name)}, which exported clients do not carry "
                f"from round to round; expected {unset}"
            )
    if federation.personal == "frozen":
        withheld = Policy([dict(row) for row in rows]).plan(slots(loaded.module)).withheld
        rows = (*rows, {"layers": [f"name:{name}" for name in withheld], "train": False}) if withheld else rows
    kind: Any = federation.kind
    return MessageForm(
        kind, federation.batch_size, rate, federation.learning_rate, federation.optimizer, examples,
        local_steps=federation.local_steps, momentum=federation.momentum, server=federation.server,
        server_rate=federation.server_rate,
    ), rows  # fmt: skip


def _decide(result: StudyResult) -> Recommendation:
    caps = card.caps_of(result)
    return recommend(
        frontier(result), max_leakage=caps.max_leakage, min_utility=caps.min_utility, max_epsilon=caps.max_epsilon
    )


def _warnings(made: Rehearsal, decision: Recommendation) -> list[str]:
    told = []
    if made.budget.epsilon == float("inf"):
        told.append("epsilon is infinite: this policy proves nothing, and the card says why")
    if decision.policy != made.policy:
        told.append(
            f"this is not the policy that the study recommends (recommended is {decision.policy})"
            if decision.policy
            else f"the study recommends no policy ({decision.sentence.rstrip('.')})"
        )
    told += [f"metric {name!r} leaves past clip and noise" for name in made.metrics]
    return told


def _new(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = next(folder.iterdir(), None)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}; expected a folder that can be written") from None
    if held is not None:
        raise UserError(f"{folder} is not empty (it holds {held.name}); expected a new folder, or --out another one")


def fill(to: str, folder: Path, made: Rehearsal, values: Mapping[str, str]) -> None:
    """Copy the framework's project and what every project has; ``@NAME@`` stands for a value.

    The files of a project are kept with the suffix ``.txt``, so that nothing imports them here.
    """
    form, lora = made.message, any(slot.role in ADAPTERS for slot in made.model.slots)
    values = {
        "LORA": "[lora]" if lora else "",  # what the project installs reads the model
        "AND_LORA": ",lora" if lora else "",
        "POLICY": made.policy,
        "MODEL": made.model.name,
        "LABELS": str(made.model.labels),
        "BATCH_SIZE": str(form.batch_size),
        "EXAMPLES": str(form.examples),
        "ROUNDS": str(made.rounds),
        "DELTA": repr(made.budget.delta),
        "LEARNING_RATE": repr(form.server_rate if form.kind == "gradient" else form.learning_rate),
        **values,
    }
    for source in (PROJECTS / "common", PROJECTS / to):
        for path in sorted(source.rglob("*.txt")):
            target = folder / path.relative_to(source).with_suffix("")
            target.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text("utf-8")
            for name, value in values.items():
                text = text.replace(f"@{name}@", value)
            target.write_text(text, "utf-8")
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
