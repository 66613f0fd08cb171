"""Rehearsals of a tiny model, as an exporter would write them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dpguard.deploy.rehearsal import Budget, MessageForm, ModelCard, Rehearsal
from dpguard.engine.accounting import guarantee
from dpguard.inputs.family import slots
from dpguard.inputs.models import LoadedModel
from dpguard.inputs.texts import Example
from dpguard.policy.table import Policy
from tests import tiny

GRADIENT = MessageForm("gradient", 8, 0.25, 0.1, "sgd", 32, server="fedsgd", server_rate=0.1)
DELTA = MessageForm("delta", 8, 0.25, 0.05, "sgd", 32, local_steps=2)
TABLES: dict[str, tuple[list[dict[str, Any]], MessageForm]] = {
    "dp-sgd, gradients": ([{"layers": "all", "clip": 1.0, "noise": 0.8}], GRADIENT),
    "dp-sgd, differences": ([{"layers": "all", "clip": 1.0, "noise": 0.8}], DELTA),
    "whole update": ([{"layers": "all", "clip": 0.5, "noise": 1.1, "unit": "update"}], DELTA),
    "pruned, no noise": ([{"layers": "all", "keep": 0.25, "prune": "random"}], DELTA),
    "per block, partial": (
        [
            {"layers": "all", "clip": 0.5, "noise": 1.0, "per": "block"},
            {"layers": "embeddings", "share": False, "train": False},
            {"layers": "block[*].mlp", "keep": 0.5, "bits": 4},
        ],
        GRADIENT,
    ),
    "withheld, gradients": (
        [{"layers": "all", "clip": 1.0, "noise": 0.8}, {"layers": "embeddings", "share": False}], GRADIENT,
    ),
    "withheld, whole update": (
        [{"layers": "all", "clip": 1.0, "noise": 0.8, "unit": "update"}, {"layers": "embeddings", "share": False}],
        DELTA,
    ),
}  # fmt: skip


def model() -> LoadedModel:
    return tiny.loaded("bert", width=16, blocks=2)


def rehearsal(
    name: str, *, rounds: int = 4, metrics: tuple[str, ...] = (), made: LoadedModel | None = None
) -> Rehearsal:
    rows, form = TABLES[name]
    made = made or model()
    plan = Policy(rows).plan(slots(made.module))
    draft = Rehearsal("s", name, tuple(rows), ModelCard.of(made, 2), form, Budget(1e-5, 1.0, 1), metrics)
    messages = rounds * draft.messages_a_round
    found = guarantee(plan, sampling_rate=form.sampling_rate, steps=messages, delta=1e-5)
    return replace(draft, budget=Budget(1e-5, found.epsilon, messages))


def texts(count: int = 32, start: int = 0) -> list[Example]:
    words = tiny.WORDS
    return [Example(" ".join(words[(start + 3 * i + k) % 60] for k in range(3 + i % 5)), i % 2) for i in range(count)]
