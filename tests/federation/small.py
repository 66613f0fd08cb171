"""What the tests of this room share: a tiny classifier without dropout, some texts, a short federation."""

from __future__ import annotations

import random

from dpguard.federation import rounds
from dpguard.federation.settings import Settings
from dpguard.federation.split import split
from dpguard.inputs.family import slots
from dpguard.inputs.texts import Example
from dpguard.policy.table import Policy
from tests import tiny

CLIPPED = [{"layers": "all", "clip": 0.5}]
NOISED = [{"layers": "all", "clip": 0.5, "noise": 1.0}]


STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def model(**options):
    return tiny.module("bert", width=16, blocks=2, **STILL, **options)


def texts(count, *, classes=2, seed=0):
    drawn = random.Random(seed)
    return [
        Example(" ".join(drawn.sample(tiny.WORDS, drawn.randint(3, 6))), i % classes, owner=f"site {i % 5}")
        for i in range(count)
    ]


def plan(rows, made):
    return Policy(rows).plan(slots(made))


def run(rows, *, count=24, seed=0, made=None, test=(), **more):
    """(model, plan, settings, run) of a federation over ``count`` texts."""
    extra = {key: more.pop(key) for key in ("on_weights", "delta") if key in more}
    made = made or model()
    settings = Settings(**{"clients": 4, "per_round": 2, "rounds": 3, "batch_size": 3, **more})
    train = texts(count)
    found = plan(rows, made)
    parts, _ = split(train, test, settings)
    return made, found, settings, rounds.run(made, tiny.tokenizer(), train, parts, found, settings, seed=seed, **extra)
