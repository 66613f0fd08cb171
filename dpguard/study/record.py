"""A cell of a study, its identity, and the record that running it leaves. No torch here.

One id function serves the plan and the finished record, so resuming is a set difference.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

Leg = Literal["guarantee", "leakage", "utility"]
Status = Literal["done", "failed", "skipped"]

SCHEMA = 1
TIMINGS = ("seconds", "train_seconds")
"""Entries of a result that say how long something took."""


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, no NaN; the same text for the same meaning.

    >>> canonical({"b": 1, "a": [1.0, True]})
    '{"a":[1.0,true],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def encodable(text: str) -> str:
    """``text`` without lone surrogates (of a file name that is not UTF-8, say), which no file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def is_place(name: str) -> bool:
    """Whether a name of a model says where it lies on this machine; a hub's name has a slash as well.

    >>> is_place("/models/bert"), is_place("./bert"), is_place("google/bert_uncased")
    (True, True, False)
    """
    return Path(name).is_absolute() or name.startswith((".", "~"))


@dataclass(frozen=True)
class Cell:
    """One unit of work: one leg of one policy at one seed.

    Attributes:
        leg: guarantee, leakage or utility.
        policy: the policy's name in the study (with its sweep values, e.g. ``dp-sgd noise=0.6``).
        table: the policy's rows, as plain data.
        model: what identifies the model: {"name": ..., "hash": ...}.
        data: what identifies the texts: {"name": ..., "hash": ..., "train": n, "test": n}.
        settings: everything else that changes the result (panel hash, metric, targets, batch size, at,
            epochs, learning rate, delta, ...). Names are as in the study file.
        seed: the seed of everything random in the cell.
    """

    leg: Leg
    policy: str
    table: list[dict[str, Any]]
    model: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    seed: int = 0

    def content(self) -> dict[str, Any]:
        """What the id hashes: everything but the policy's display name."""
        return {
            "schema": SCHEMA,
            "leg": self.leg,
            "table": self.table,
            "model": self.model,
            "data": self.data,
            "settings": self.settings,
            "seed": self.seed,
        }

    @cached_property
    def id(self) -> str:
        """20 hex digits of the SHA-256 of the canonical content: equal before and after the run."""
        return hashlib.sha256(canonical(self.content()).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Record:
    """What a finished cell leaves in the store. Texts are kept apart from scores (`Store.texts`).

    ``result`` by leg (all numbers finite; infinity is the string "inf"):

    guarantee: {"epsilon", "sigma_eff", "delta", "sampling_rate", "steps", "statement" (text),
        "reasons" (list, why epsilon is inf), "bound" ({"kappa", "success"} or None), "shared_fraction",
        "kappa" (metric -> {"value", "upper", "texts", "bound"}: what a guess scores without the message, and
        the most that one message can raise it to, None without a guarantee),
        "seen" and "federation" (with a federation: messages of one record that the bounds are about, the settings,
        and "worst": whose guarantee it is),
        "table" (list of {"parameters", "share", "train", "clip", "noise", "std", "release"} for print)}
    leakage: {"at": "start"|"tuned"|"end"|"rounds", "scores": [{"target": int, "attack": "span",
        "metrics": {"rouge1","rouge2","rougeL","exact_match","token_recall","entity_recall"(or None)},
        "certain": bool, "inherited": bool (a cheaper attack was certain, this one did not run),
        "seconds", "steps", "candidates"}], "skipped": {attack: reason},
        "defence": {"clip": {...}, "noise": {...}, "judged" (the kind of message, in words)}, "shared_fraction"}
    utility: {"metrics": {"accuracy","mcc","f1","loss"}, "predictions": [int], "labels": [int], "classes": int,
        "steps", "sampling_rate", "clipped_fraction" or None, "train_seconds"}; with a federation "predictions" are
        of each text's owner's model, "steps" are rounds, "sampling_rate" the share of clients in one, and
        "federation" holds {"global" (scores), "commonest" (accuracy of each client's own commonest label),
        "personal" ({"mean", "worst_tenth", "clients"}), "bytes_per_message",
        "bytes_per_round", "bytes", "epsilon" ({"max", "median"} over clients), "texts", "rounds" (by client)}

    ``provenance``: "versions" (name -> version), "git" ({"revision", "dirty", "of"} or None), "device", "started",
    "seconds", "cpu_seconds", "peak_mb", "seed", "plan" (hash of the resolved policy), "trained_again" (of an attack
    whose weights were gone: the device on which they were trained once more); of a failed cell also "failure"
    (`execution.FAILURES`), "traceback", "output". It never enters a figure or an id.
    """

    cell: Cell
    status: Status
    reason: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


def untimed(value: Any) -> Any:
    """A result without the durations in it: what must be the same however and wherever a cell ran.

    >>> untimed({"metrics": {"loss": 1}, "train_seconds": 2.5, "scores": [{"target": 0, "seconds": 0.1}]})
    {'metrics': {'loss': 1}, 'scores': [{'target': 0}]}
    """
    if isinstance(value, dict):
        return {name: untimed(item) for name, item in value.items() if name not in TIMINGS}
    return [untimed(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class TextRow:
    """True and recovered text of one target, for the evidence section only.

    Attributes:
        target: index of the target in the study's data.
        attack: the attack's name, or "truth" for the true text itself.
        text: the text.
    """

    target: int
    attack: str
    text: str
