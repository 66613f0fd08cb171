"""From a study to its cells: what runs, in which order, and what makes each one the same or another."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpguard.errors import UserError
from dpguard.federation.settings import Settings
from dpguard.study.record import Cell, Leg
from dpguard.study.schedule import training
from dpguard.study.sections import CEILING

if TYPE_CHECKING:
    from dpguard.study.policies import Named
    from dpguard.study.spec import Study

_MOMENTS = ("start", "tuned", "rounds", "end")
NEEDS = "needs"
"""Setting of a cell that starts from what another cell leaves: that cell's id."""


def cells(study: Study, model: dict[str, Any], data: dict[str, Any], panel: dict[str, Any] | None = None) -> list[Cell]:
    """Every cell of a study, guarantees first, then all policies at the first seed before the second.

    A cell's settings hold what changes its result and nothing else: not the metric that the report leads
    with (all are recorded), not the number of seeds. A leakage cell at ``end`` or ``rounds`` holds the id of the
    utility cell whose weights it attacks (`NEEDS`), and with it everything that training depends on;
    that is the one with its own seed, or else with the first utility seed. At ``tuned`` it is the undefended
    control's at the first utility seed.

    Raises:
        UserError: more training examples, a larger batch or a larger delta than the data allows, or less
            than one step of training; with its place.
    """
    texts = examples(study, data)
    _check_targets(study, int(data["train"]))

    def cell(leg: Leg, index: int, settings: dict[str, Any], seed: int = 0) -> Cell:
        named = study.policies[index]
        if named.epsilon is not None:
            raise ValueError(f"policy {named.label!r} still has a target epsilon; the study is not calibrated")
        if named.open:
            raise ValueError(f"policy {named.label!r} still waits for the model's blocks; expected Study.on(slots)")
        return Cell(leg, named.label, named.table, model, data, settings, seed)

    out = [cell("guarantee", index, _exposure(study, named, texts)) for index, named in enumerate(study.policies)]
    trainings = [_training(study, named, texts) for named in study.policies]
    control = next(index for index, named in enumerate(study.policies) if named.label == CEILING)
    rounds: list[tuple[int, int, int, Cell]] = []
    for index, named in enumerate(study.policies):
        attack = _attack(study, named, panel)
        trained: dict[int, tuple[int, Cell]] = {}
        for turn, seed in enumerate(study.utility.seeds if study.utility and trainings[index] else ()):
            trained[seed] = turn, cell("utility", index, trainings[index], seed)
            rounds.append((turn, index, 0, trained[seed][1]))
        for turn, seed in enumerate(study.leakage.seeds if study.leakage else ()):
            for at in sorted(study.leakage.at if study.leakage else (), key=_MOMENTS.index):
                settings, when = {**attack, "at": at}, turn
                if at == "rounds" and study.federation:
                    settings["observe"] = list(study.federation.observe)
                if at == "tuned" and study.utility:
                    settings[NEEDS] = cell("utility", control, trainings[control], study.utility.seeds[0]).id
                elif at != "start":
                    ready_at, needed = trained.get(seed) or next(iter(trained.values()))
                    settings[NEEDS], when = needed.id, max(turn, ready_at)
                rounds.append((when, index, 1 if at == "start" else 2, cell("leakage", index, settings, seed)))
    tuned = study.leakage is not None and "tuned" in study.leakage.at
    # what other policies' cells need comes before them
    rounds.sort(key=lambda entry: (entry[0], not (tuned and entry[1:3] == (control, 0)), *entry[1:3]))
    return _distinct(study, out + [entry[3] for entry in rounds])


def _check_targets(study: Study, texts: int) -> None:
    """Messages hold different texts: intervals take them for independent."""
    if study.leakage is None:
        return
    each = study.leakage.batch_size * max(_clients_a_message(study, named) for named in study.policies)
    seeds = len(study.leakage.seeds)
    if study.leakage.targets * each * seeds > texts:
        more = f" at each of {seeds} seeds" if seeds > 1 else ""
        one = "1 text" if each == 1 else f"{each} texts"
        raise UserError(
            f"leakage.targets: {study.leakage.targets} messages of {one}{more} are more than the {texts} training "
            f"texts, expected at most {texts // (each * seeds)}",
            loc=("leakage", "targets"),
        )
    for width in {study.leakage.batch_size * _clients_a_message(study, named) for named in study.policies}:
        _check_apart(study.leakage.seeds, study.leakage.targets * width, texts)


def _check_apart(seeds: Sequence[int], width: int, texts: int) -> None:
    """Seed s attacks the texts from s * width on (`leakage.pick_targets`), around the end of the list."""
    first = sorted((seed * width % texts, seed) for seed in set(seeds))
    for (start, seed), (after, other) in zip(first, [*first[1:], (first[0][0] + texts, first[0][1])], strict=True):
        if after - start < width and seed != other:
            raise UserError(
                f"leakage.seeds: {min(seed, other)} and {max(seed, other)} attack some of the same texts (of {texts}), "
                f"which intervals count as different ones; expected seeds such as 0 to {len(first) - 1}",
                loc=("leakage", "seeds"),
            )


def _clients_a_message(study: Study, named: Named) -> int:
    """How many clients' texts are in what the server sees at once."""
    found = study.federation_of(named)
    if found is not None:
        return Settings.of(found.model_dump()).summed
    return 1 if study.leakage is None else study.leakage.threat.clients


def _distinct(study: Study, planned: list[Cell]) -> list[Cell]:
    seen: dict[str, Cell] = {}
    for cell in planned:
        twin = seen.setdefault(cell.id, cell)
        if twin is not cell:
            named = next(named for named in study.policies if named.label == cell.policy)
            with named.document.locating(*named.loc):
                raise UserError(
                    f"policies {twin.policy!r} and {cell.policy!r} come to the same table in the same training, "
                    "expected each one once"
                )
    return planned


def examples(study: Study, data: dict[str, Any]) -> int:
    """How many texts are trained on: the public N of the guarantee.

    Raises:
        UserError: more of them, more clients or a larger delta than the data allows.
    """
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


def _exposure(study: Study, named: Named, texts: int) -> dict[str, Any]:
    """What a guarantee is asked about: the sampling and steps of one training, or the federation and its seeds."""
    asked = {"delta": study.privacy.delta, "examples": texts}
    threat = None if study.leakage is None else study.leakage.threat
    if threat is not None and "lengths" in threat.know:
        asked["lengths"] = True  # the best guess without the message knows them as well
    if study.federation is None or study.utility is None:
        found = study.schedule_of(named, texts)
        if threat is not None and threat.candidates:
            asked["candidates"] = threat.candidates
        if threat is not None and threat.local_steps > 1:
            asked["local_steps"] = threat.local_steps
        return {"sampling_rate": found.sampling_rate, "steps": found.steps, **_own(named), **asked}
    seen = {"seeds": list(study.utility.seeds), "messages": max(1, len(study.federation.observe))}
    return {**_federation(study, named), **seen, **asked}


def _federation(study: Study, named: Named) -> dict[str, Any]:
    """The policy's federation, without the rounds that are looked at and the engine: they change no training."""
    found = study.federation_of(named)
    return {} if found is None else {"federation": found.model_dump(mode="json", exclude={"observe", "engine"})}


def _training(study: Study, named: Named, texts: int) -> dict[str, Any]:
    utility = study.utility_of(named)
    if utility is None:
        return {}
    if study.federation is not None:
        return {**_federation(study, named), "train_examples": texts, "delta": study.privacy.delta}
    with study.training_of(named):
        return training(utility, texts)


def _own(named: Named) -> dict[str, Any]:
    """A policy's own training: two policies with one table and two trainings share no cell."""
    return {"training": dict(named.utility)} if named.utility else {}


def _attack(study: Study, named: Named, panel: dict[str, Any] | None) -> dict[str, Any]:
    if study.leakage is None:
        return {}
    kept = study.leakage.model_dump(mode="json", include={"targets", "batch_size", "threat"})
    if not kept["threat"]["candidates"]:
        del kept["threat"]["candidates"]  # the open world, as ever: its cells keep their ids
    asked = study.leakage.attacks
    attacker = panel or {"name": study.leakage.panel, "attacks": asked and list(asked)}
    return {**kept, **_federation(study, named), **_own(named), "panel": attacker}


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
        epsilon: of its guarantee (``inf`` is an answer).
        cells: leg -> number of cells.
        finished: how many of all of them are in the store already.
    """

    policy: str
    epsilon: float
    cells: dict[Leg, int]
    finished: int


def plan_table(
    study: Study,
    cells: Sequence[Cell],
    *,
    epsilons: Mapping[str, float],
    finished: Collection[str] = (),
) -> list[PlanRow]:
    """The grid of a study, one row a policy, for ``--dry-run``: nothing is run.

    Args:
        study: the study.
        cells: its cells, or those of one shard.
        epsilons: policy label -> its epsilon.
        finished: ids that the store holds already.
    """
    rows = []
    for named in study.policies:
        own = [cell for cell in cells if cell.policy == named.label]
        legs: dict[Leg, int] = {"guarantee": 0, "leakage": 0, "utility": 0}
        for cell in own:
            legs[cell.leg] += 1
        done = sum(cell.id in finished for cell in own)
        rows.append(PlanRow(named.label, epsilons[named.label], legs, done))
    return rows
