"""The privacy card of an exported policy: that of its report, and what is exported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpguard.deploy.rehearsal import Rehearsal
from dpguard.policy.guarantee import plain_epsilon
from dpguard.policy.statement import NOT_COVERED
from dpguard.report import card
from dpguard.report.frontier import frontier
from dpguard.report.recommend import Caps, Recommendation
from dpguard.report.result import StudyResult

IN_THE_FIELD = (
    "a server that sends weights made to draw out a text: the first weights and the frozen layers are checked, weights "
    "that were trained since are not",
    "a server whose app is other code than this: keep the exported folder at the site and read what is run",
    "that a client answers, refuses or stays away, and when: a refusal tells the server one bit",
    card.STRONGER,
    "whatever else leaves the site: logs, evaluation metrics, the exported state folder",
)


def make(result: StudyResult, rehearsal: Rehearsal, decision: Recommendation) -> dict[str, Any]:
    """The card as plain data: what the study found out (`dpguard.report.card.content`), and what is exported.

    Args:
        result: the study and its records.
        rehearsal: what is exported.
        decision: under the study's caps.
    """
    plain = card.content(result, frontier(result), decision, rehearsal.policy)
    message, budget = rehearsal.message, rehearsal.budget
    steps = message.local_steps if message.kind == "delta" else 0
    return {
        **plain,
        "plan": rehearsal.plan.hash,
        "study": rehearsal.study,
        "model": {"name": rehearsal.model.name, "hash": rehearsal.model.hash},
        "shared_fraction": rehearsal.plan.shared_fraction,
        "message": {
            "kind": message.kind, "local_steps": steps, "batch_size": message.batch_size,
            "sampling_rate": message.sampling_rate, "examples": message.examples, "rounds": rehearsal.rounds,
        },
        "attacked": {**plain["attacked"], "as_exported": plain["attacked"]["what"] == _kind(message.kind, steps)},
        "guarantee": {
            **plain["guarantee"],
            "epsilon": plain_epsilon(budget.epsilon), "delta": budget.delta,
            "messages": rehearsal.rounds, "noised_steps": budget.messages,
            "unit": "client" if rehearsal.plan.unit == "update" else "example",
            "sampling": message.sampling,
        },
        "metrics_past_the_gate": list(rehearsal.metrics),
        "not_protected": [*NOT_COVERED, *IN_THE_FIELD,
                          *(f"metric {name!r}: it leaves past clip and noise" for name in rehearsal.metrics)],
    }  # fmt: skip


def _kind(kind: str, steps: int) -> str:
    return "gradient" if kind == "gradient" else f"{steps}-step delta"


def write(made: Mapping[str, Any], folder: Path) -> None:
    """`card.json` and `card.md`."""
    words = card.to_markdown(made, leaves=_message_words(made["message"]), counted=_count_words(made["guarantee"]))
    card.write(made, folder, words)


def _count_words(claim: Mapping[str, Any]) -> str:
    """How many messages, and of how many noised steps where one message is made of several."""
    messages, steps = claim["messages"], claim["noised_steps"]
    words = f"{messages} message{'' if messages == 1 else 's'}"
    kind = "local" if math.isinf(float(claim["epsilon"])) else "noised"
    return words if steps == messages else f"{words} ({steps} {kind} steps)"


def _message_words(message: Mapping[str, Any]) -> str:
    size, rounds = message["batch_size"], message["rounds"]
    batch = (
        f"Poisson batch of {size} text{'' if size == 1 else 's'} on average (sampling rate "
        f"{message['sampling_rate']:.4g})"
    )
    ending = f"{rounds} round{'' if rounds == 1 else 's'}."
    if message["kind"] == "gradient":
        return f"A message is the gradient of one {batch}; {ending}"
    steps = message["local_steps"]
    each = f"one local step on a {batch}" if steps == 1 else f"{steps} local steps, each on its own {batch}"
    return f"A message is the change of the weights after {each}; {ending}"


def caps_of(result: StudyResult) -> Caps:
    """The study's caps."""
    return Caps.read(result.spec)
