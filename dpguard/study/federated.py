"""The legs of a study with a federation: the worst client's guarantee, the rounds, and one victim's messages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dpguard.engine.local import LocalState
from dpguard.federation import flower, kept, rounds, views, worth
from dpguard.federation.leak import FederatedThreat, several
from dpguard.federation.settings import Settings, rounds_of
from dpguard.federation.split import Parts, split
from dpguard.federation.turn import local_training
from dpguard.inputs.models import LoadedModel
from dpguard.inputs.texts import Corpus
from dpguard.measure import leakage
from dpguard.measure import utility as scoring
from dpguard.measure.leakage import Score
from dpguard.measure.threat import Threat
from dpguard.policy.guarantee import plain_epsilon
from dpguard.policy.table import Plan
from dpguard.study.record import Cell

HOME = "home:"
"""Marks what victims have at home in a file of weights: ``home:PLACE:`` and the names of `kept.flat`."""


@dataclass(frozen=True)
class Rehearsal:
    """A federation that a cell describes, with its texts in place.

    Attributes:
        settings: the federation.
        corpus: the texts, cut to what is trained on.
        train, test: whose texts are whose.
    """

    settings: Settings
    corpus: Corpus
    train: Parts
    test: Parts

    @staticmethod
    def of(cell: Cell, corpus: Corpus) -> Rehearsal:
        """The federation of a utility or guarantee cell.

        Raises:
            UserError: a split that the texts do not allow.
        """
        settings = Settings.of(cell.settings["federation"])
        cut = corpus.cut(cell.settings.get("train_examples") or cell.settings.get("examples"))
        return Rehearsal(settings, cut, *split(cut.train, cut.test, settings))

    @property
    def sizes(self) -> list[int]:
        """Number of texts of every client; public."""
        return [len(part) for part in self.train]


def victims(settings: Settings, seed: int) -> list[int]:
    """The clients of an observed message, by what they have at home: those that take part most often."""
    taken = rounds_of(settings, seed)
    often = sorted(range(settings.clients), key=lambda client: -taken[client])
    return often[: settings.summed]


def promise(cell: Cell, plan: Plan, corpus: Corpus) -> views.Promise:
    """The guarantee of a guarantee cell, over all its seeds."""
    found = Rehearsal.of(cell, corpus)
    return views.promise(plan, found.settings, found.sizes, seeds=cell.settings["seeds"], delta=cell.settings["delta"])


def train(
    cell: Cell,
    model: LoadedModel,
    plan: Plan,
    corpus: Corpus,
    keep: Collection[int | str] = (),
    write: Callable[[int | str, dict[str, Tensor]], None] = lambda moment, state: None,
    *,
    engine: str = "embedded",
) -> tuple[Rehearsal, rounds.Run]:
    """Run a utility cell's federation; the model ends with the last global weights.

    Args:
        cell: the utility cell.
        model: at its first weights.
        plan: the policy.
        corpus: all texts.
        keep: which weights to hand to ``write``: rounds, or ``end``.
        write: called with the round (or ``end``) and the weights, and what `victims` have at home.
        engine: ``embedded`` or ``flower``.
    """
    found = Rehearsal.of(cell, corpus)
    observed = victims(found.settings, cell.seed)

    def on_weights(round_: int, weights: Mapping[str, Tensor], states: Sequence[LocalState]) -> None:
        if round_ in keep:
            write(round_, _state(weights, [states[client] for client in observed]))

    if engine == "flower":
        run = flower.run(
            model, found.corpus.train, found.train, plan, found.settings,
            labels=corpus.classes, seed=cell.seed, delta=cell.settings["delta"], on_weights=on_weights,
            keep=[moment for moment in keep if isinstance(moment, int)],
        )  # fmt: skip
    else:
        run = rounds.run(
            model.module, model.tokenizer, found.corpus.train, found.train, plan, found.settings,
            seed=cell.seed, delta=cell.settings["delta"], on_weights=on_weights,
        )  # fmt: skip
    if "end" in keep:
        write("end", _state(run.weights, [run.states[client] for client in observed]))
    return found, run


def utility(found: Rehearsal, run: rounds.Run, model: LoadedModel) -> dict[str, Any]:
    """The result of a utility cell: what each client would use on its own held-out texts, and the global model."""
    test = found.corpus.test
    judged = worth.judge(model.module, model.tokenizer, test, found.test, run.states, found.corpus.classes)
    labels = [e.label for e in test]
    epsilons = run.epsilons()
    return {
        "metrics": scoring.scores(judged.predictions, labels, judged.loss, found.corpus.classes),
        "predictions": judged.predictions,
        "labels": labels,
        "classes": found.corpus.classes,
        "steps": found.settings.rounds,
        "sampling_rate": found.settings.per_round / found.settings.clients,
        "clipped_fraction": None,
        "train_seconds": round(run.seconds, 3),
        "federation": {
            "global": judged.global_scores,
            "commonest": worth.commonest(found.corpus.train, found.train, test, found.test),
            "personal": {"mean": judged.mean, "worst_tenth": judged.worst_tenth, "clients": judged.clients},
            "bytes_per_round": round(sum(run.bytes) / len(run.bytes)),
            "bytes_per_message": round(sum(run.bytes) / (len(run.bytes) * found.settings.per_round)),
            "bytes": sum(run.bytes),
            "epsilon": {"max": plain_epsilon(max(epsilons)), "median": plain_epsilon(float(np.median(epsilons)))},
            "texts": found.sizes,
            "rounds": list(run.taken),
        },
    }


def _state(weights: Mapping[str, Tensor], at_home: Sequence[LocalState]) -> dict[str, Tensor]:
    made = {name: value.detach().clone().contiguous() for name, value in weights.items()}
    for place, state in enumerate(at_home):
        made |= {f"{HOME}{place}:{name}": value for name, value in kept.flat(state).items()}
    return made


def moments(cell: Cell) -> list[int | str]:
    """The weights that a leakage cell attacks: ``start``, ``end``, or the rounds that are observed."""
    at = cell.settings["at"]
    return list(cell.settings["observe"]) if at == "rounds" else [at]


@dataclass(frozen=True)
class Moment:
    """When clients are observed.

    Attributes:
        round_: of the message.
        home: what they have at home, in the order of `victims`.
    """

    round_: int
    home: tuple[LocalState, ...]

    def states(self, before: Sequence[LocalState]) -> tuple[LocalState, ...]:
        """What the clients of one message have at home when they make it; copies, for it brings them up to date.

        Args:
            before: the same clients' after their message with the same record before this one, if there was one. It
                is in what that left to optimizer and error feedback; their layers are those of this moment.
        """
        own = copy.deepcopy(self.home)
        for state, last in zip(own, before, strict=False):
            state.moments, state.residual = copy.deepcopy((last.moments, last.residual))
        return own


def go_to(model: LoadedModel, plan: Plan, state: Mapping[str, Tensor], moment: int | str, settings: Settings) -> Moment:
    """Bring the model to the weights of a moment.

    Args:
        model: at its first weights.
        plan: the policy.
        state: what `train` handed out for the moment; unused for ``start``.
        moment: see `moments`.
        settings: the federation.
    """
    if moment == "start":
        return Moment(1, tuple(LocalState() for _ in range(settings.summed)))
    rounds.set_weights(model.module, dict(state))
    training, trained = local_training(settings), len(views.message_plan(plan, settings).trained)
    home: list[dict[str, Tensor]] = [{} for _ in range(settings.summed)]
    for key in (key for key in state if key.startswith(HOME)):
        place, name = key.removeprefix(HOME).split(":", 1)
        home[int(place)][name] = state[key]
    found = tuple(kept.restored(own, training, trained) for own in home)
    return Moment(settings.rounds if moment == "end" else int(moment), found)


def observe(
    model: LoadedModel,
    plan: Plan,
    corpus: Corpus,
    indices: Sequence[int],
    cell: Cell,
    moment: Moment,
    *,
    seed: int,
    before: Sequence[LocalState] = (),
) -> tuple[leakage.Leak, list[LocalState]]:
    """One message with these texts at the model's weights, attacked and judged; and what it left, for the next one.

    Args:
        before: what the message with the same texts before it left.
    """
    settings = Settings.of(cell.settings["federation"])
    states = moment.states(before)
    threat = FederatedThreat.within(Threat.of(cell.settings["threat"]), settings, states=states, round_=moment.round_)
    leak = leakage.attack_message(
        model, views.message_plan(plan, settings), corpus, indices,
        attacks=cell.settings["panel"]["attacks"], seed=seed, noise_seed=seed + 15_485_863 * (moment.round_ - 1),
        threat=threat,
    )  # fmt: skip
    return leak, [LocalState(moments=state.moments, residual=state.residual) for state in states]


def together(leaks: Sequence[leakage.Leak]) -> leakage.Leak:
    """What several rounds of the same record give away: one answer a text and attack."""
    if len(leaks) == 1:
        return leaks[0]
    scores: list[Score] = several([leak.scores for leak in leaks])
    skipped = {name: why for name, why in leaks[0].skipped.items() if all(name in leak.skipped for leak in leaks)}
    return leakage.Leak(tuple(scores), skipped, leaks[0].truths)
