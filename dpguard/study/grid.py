"""From a study to its cells: what runs, in which order, and what makes each one the same or another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpguard.errors import UserError
from dpguard.study.record import Cell, Leg

if TYPE_CHECKING:
    from dpguard.policy.table import Policy
    from dpguard.study.spec import Named, Study

NEEDS = "needs"
"""Setting of a cell that starts from what another cell leaves: that cell's id."""


def cells(study: Study, model: dict[str, Any], data: dict[str, Any], panel: dict[str, Any] | None = None) -> list[Cell]:
    """Every cell of a study, guarantees first, then all policies at the first seed before the second.

    A cell's settings hold what changes its result and nothing else: not the metric that the report leads
    with (all are recorded), not the number of seeds. A leakage cell at ``end`` or ``rounds`` holds the id of the
    utility cell whose weights it attacks (`NEEDS`), and with it everything that training depends on;
    that is the one with its own seed, or else with the first utility seed.

    Raises:
        UserError: more training examples, a larger batch or a larger delta than the data allows, or less
            than one step of training; ``loc`` is in the study file.
    """
    examples = _examples(study, data)

    def cell(leg: Leg, index: int, settings: dict[str, Any], seed: int = 0) -> Cell:
        named = study.policies[index]
        return Cell(leg, named.label, named.table, model, data, settings, seed)

    out = [cell("guarantee", index, _exposure(study, named, examples)) for index, named in enumerate(study.policies)]
    rounds: list[tuple[int, int, int, Cell]] = []
    for index, named in enumerate(study.policies):
        training, attack = _training(study, named, examples), _attack(study, named, panel)
        trained: dict[int, tuple[int, Cell]] = {}
        for turn, seed in enumerate(study.utility.seeds if study.utility else ()):
            trained[seed] = turn, cell("utility", index, training, seed)
            rounds.append((turn, index, 0, trained[seed][1]))
        for turn, seed in enumerate(study.leakage.seeds if study.leakage else ()):
            for at in sorted(study.leakage.at if study.leakage else (), reverse=True):
                settings, when = {**attack, "at": at}, turn
                if at == "rounds" and study.federation:
                    settings["observe"] = list(study.federation.observe)
                if at != "start":
                    ready_at, needed = trained.get(seed) or next(iter(trained.values()))
                    settings[NEEDS], when = needed.id, max(turn, ready_at)
                rounds.append((when, index, 1 if at == "start" else 2, cell("leakage", index, settings, seed)))
    rounds.sort(key=lambda entry: entry[:3])
    return out + [entry[3] for entry in rounds]


def _examples(study: Study, data: dict[str, Any]) -> int:
    """How many texts are trained on: the public N of the guarantee."""
    count = int(data["train"])
    delta = study.privacy.delta
    if study.utility and study.utility.train_examples is not None:
        if study.utility.train_examples > count:
            raise UserError(
                f"utility.train_examples: {study.utility.train_examples} is more than the data holds, "
                f"expected at most {count}",
                loc=("utility", "train_examples"),
            )
        count = study.utility.train_examples
    if study.federation and study.federation.clients > count:
        raise UserError(
            f"federation.clients: {study.federation.clients} is more than the {count} training texts, "
            f"expected at most {count}",
            loc=("federation", "clients"),
        )
    if delta > 1 / count:
        raise UserError(
            f"privacy.delta: {delta:g} is larger than one over the number of training examples, "
            f"expected at most 1/{count}",
            loc=("privacy", "delta"),
        )
    return count


def _schedule(study: Study, examples: int) -> tuple[float, int]:
    """Sampling rate and steps of the training; one message of a known batch when nothing is trained."""
    if study.utility is None:
        return 1.0, 1
    if study.utility.batch_size > examples:
        raise UserError(
            f"utility.batch_size: {study.utility.batch_size} is more than the {examples} training examples, "
            f"expected at most {examples}",
            loc=("utility", "batch_size"),
        )
    sampling_rate = study.utility.batch_size / examples
    steps = round(study.utility.epochs / sampling_rate)
    if steps < 1:
        raise UserError(
            f"utility.epochs: {study.utility.epochs:g} is less than one step, expected at least {sampling_rate:.2g}",
            loc=("utility", "epochs"),
        )
    return sampling_rate, steps


def _exposure(study: Study, named: Named, examples: int) -> dict[str, Any]:
    """What a guarantee is asked about: the sampling and steps of one training, or the federation and its seeds."""
    asked = {"delta": study.privacy.delta, "examples": examples}
    if study.federation is None or study.utility is None:
        sampling_rate, steps = _schedule(study, examples)
        return {"sampling_rate": sampling_rate, "steps": steps, **asked}
    seen = {"seeds": list(study.utility.seeds), "messages": max(1, len(study.federation.observe))}
    return {**_federation(study, named), **seen, **asked}


def _federation(study: Study, named: Named) -> dict[str, Any]:
    """The policy's federation, without the rounds that are looked at and the engine: they change no training."""
    found = study.federation_of(named)
    return {} if found is None else {"federation": found.model_dump(mode="json", exclude={"observe", "engine"})}


def _training(study: Study, named: Named, examples: int) -> dict[str, Any]:
    if study.utility is None:
        return {}
    if study.federation is not None:
        return {**_federation(study, named), "train_examples": examples, "delta": study.privacy.delta}
    kept = study.utility.model_dump(mode="json", include={"epochs", "batch_size", "learning_rate", "optimizer"})
    return {**kept, "train_examples": examples}


def _attack(study: Study, named: Named, panel: dict[str, Any] | None) -> dict[str, Any]:
    if study.leakage is None:
        return {}
    kept = study.leakage.model_dump(mode="json", include={"targets", "batch_size", "threat"})
    asked = study.leakage.attacks
    attacker = panel or {"name": study.leakage.panel, "attacks": asked and list(asked)}
    return {**kept, **_federation(study, named), "panel": attacker}


def describe(cell: Cell) -> str:
    """A cell in words.

    >>> describe(Cell("leakage", "dp-sgd noise=0.6", [], {}, {}, {"at": "end"}, 1))
    'leakage at end, dp-sgd noise=0.6, seed 1'
    """
    at = f" at {cell.settings['at']}" if "at" in cell.settings else ""
    seed = "" if cell.leg == "guarantee" else f", seed {cell.seed}"
    return f"{cell.leg}{at}, {cell.policy}{seed}"


@dataclass(frozen=True)
class PlanRow:
    """What a study plans for one policy.

    Attributes:
        policy: its label.
        epsilon: of its guarantee (``inf`` is an answer), None when it was not asked for.
        cells: leg -> number of cells.
        finished: how many of all of them are in the store already.
    """

    policy: str
    epsilon: float | None
    cells: dict[Leg, int]
    finished: int


def plan_table(
    study: Study,
    cells: Sequence[Cell],
    *,
    epsilon: Callable[[Policy], float] | None = None,
    finished: Collection[str] = (),
) -> list[PlanRow]:
    """The grid of a study, one row a policy, for ``--dry-run``: nothing is run.

    Args:
        study: the study.
        cells: its cells.
        epsilon: gives the epsilon of a policy.
        finished: ids that the store holds already.
    """
    rows = []
    for named in study.policies:
        own = [cell for cell in cells if cell.policy == named.label]
        legs: dict[Leg, int] = {"guarantee": 0, "leakage": 0, "utility": 0}
        for cell in own:
            legs[cell.leg] += 1
        done = sum(cell.id in finished for cell in own)
        rows.append(PlanRow(named.label, epsilon(named.policy) if epsilon else None, legs, done))
    return rows
